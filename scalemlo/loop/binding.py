"""Binding levels to engines, optimizers and data, with every check that can be made before training."""

import zlib
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from ..derivatives.gradient_hooks import has_hooks
from ..derivatives.update_rules import update_rule
from ..engines import FSDP, DeepSpeed, Engine, EngineSpec
from ..graph import LevelGraph
from ..hypergradients import UnrollingHypergradient
from ..level import Level
from .batches import BatchStream
from .level_trainer import LevelTrainer
from .optimizers import optimizer_parameter_names, swap_parameters


def bind(graph: LevelGraph, default: EngineSpec, device: torch.device, seed: int) -> dict[str, LevelTrainer]:
    """Wrap every module in its engine and give every level its optimizer and batches.

    Args:
        graph: The levels.
        default: Engine of those that name none.
        device: Of this rank.
        seed: Of shuffling.

    Returns:
        One trainer per level, upper ones first.

    Raises:
        ValueError: For anything that cannot work; messages name the level and the way out.
    """
    levels = graph.levels
    names = {level.name: level.owned_parameters() for level in levels}
    by_module: dict[int, list[Level]] = {}
    for level in levels:
        by_module.setdefault(id(level._module), []).append(level)
    _check_modules_are_disjoint([group[0] for group in by_module.values()])
    held = {level.name: optimizer_parameter_names(level, names[level.name]) for level in levels}
    engines = {key: _wrap(graph, group, names, default, device) for key, group in by_module.items()}
    trainers = {}
    for level in levels:
        engine = engines[id(level._module)]
        if isinstance(level.optimizer, Optimizer):
            swap_parameters(level.optimizer, held[level.name], engine.parameters)
        stream = None
        if graph.reads_batch(level.name):
            assert level.data is not None, "the graph has refused that"
            shuffle_seed = seed + zlib.crc32(level.name.encode())
            stream = BatchStream(level.data, level=level.name, device=device, seed=shuffle_seed)
        trainers[level.name] = LevelTrainer(level, engine, names[level.name], stream)
    for trainer in trainers.values():
        if isinstance(trainer.estimator, UnrollingHypergradient):
            check_unrolling(graph, trainer, trainer.estimator)
        if trainer.estimator.only_direct and trainer.level.unroll_steps > 1:
            raise ValueError(
                f"level {trainer.name!r}: unroll_steps={trainer.level.unroll_steps}, but "
                f"{type(trainer.estimator).__name__} is single-loop: at its other steps the levels above have no "
                "loss to pull it with. Set unroll_steps=1."
            )
        trainer.others = {n: trainers[n] for n in graph.reads(trainer.name)}
        trainer.depends_on = frozenset(graph.uppers(trainer.name) + graph.lowers(trainer.name))
    return trainers


def check_unrolling(graph: LevelGraph, trainer: LevelTrainer, estimator: UnrollingHypergradient) -> None:
    """Check that an estimator can go through a level's steps.

    Args:
        graph: The levels.
        trainer: The level.
        estimator: The estimator.

    Raises:
        ValueError: If there are fewer steps than it wants, the optimizer's update is not known, or levels stand
            below it.
    """
    estimator.steps_of(trainer.level.unroll_steps, trainer.name)
    update_rule(trainer.optimizer, trainer.name)
    below = graph.below(trainer.name)
    if below:
        raise ValueError(
            f"level {trainer.name!r}: {type(estimator).__name__} takes its steps again, but levels {below} stand below "
            "it and move with them. Use an implicit estimator for it, ConjugateGradient() say."
        )


def _wrap(
    graph: LevelGraph, levels: list[Level], names: dict[str, list[str]], default: EngineSpec, device: torch.device
) -> Engine:
    specs = {level.engine or default for level in levels}
    label = " and ".join(repr(level.name) for level in levels)
    if len(specs) > 1:
        raise ValueError(f"levels {label} share one module, so they need one engine; got {sorted(map(repr, specs))}.")
    owner: dict[str, str] = {}
    for level in levels:
        for name in names[level.name]:
            if name in owner:
                raise ValueError(f"levels {owner[name]!r} and {level.name!r} both own the parameter {name!r}.")
            owner[name] = level.name
    module = levels[0]._module
    for name, parameter in module.named_parameters():
        if name not in owner:
            parameter.requires_grad_(False)
    # Another level's loss may use a part of this module only, and its gradients are taken through the engine too.
    may_skip = len(graph.order) > 1 or any(level.allow_unused for level in levels)
    spec = specs.pop()
    _check_weights(module, list(owner), spec, label)
    engine = spec.wrap(module, name=label.strip("'"), device=device, may_skip_parameters=may_skip)
    engine.skeleton.settle()
    return engine


def _check_weights(module: nn.Module, names: Sequence[str], spec: EngineSpec, label: str) -> None:
    """Refuse weights whose updates have no second derivative here, or lose what the user attached to them."""
    parameters = dict(module.named_parameters())
    for name in names:
        parameter = parameters[name]
        if parameter.is_complex():
            raise ValueError(
                f"level {label}: parameter {name!r} is {parameter.dtype}; Hessian-vector products are taken over "
                "real parameters. Keep real and imaginary part in one real parameter, and use torch.view_as_complex() "
                "of it in forward; or freeze it with requires_grad_(False)."
            )
        if isinstance(spec, (FSDP, DeepSpeed)) and has_hooks(parameter):
            raise ValueError(
                f"level {label}: parameter {name!r} has a hook, and {type(spec).__name__} puts shards in the place of "
                "parameters, which hooks do not follow. Do what it does in the loss or in the optimizer, or use "
                "engine=DDP()."
            )
    for path, m in module.named_modules():
        if not isinstance(m, (nn.Embedding, nn.EmbeddingBag)) or not m.weight.requires_grad:
            continue
        if m.sparse:
            raise ValueError(
                f"level {label}: {path!r} has sparse=True, and gradients are added, reduced and multiplied as dense "
                "tensors here. Set sparse=False."
            )
        if m.max_norm is not None:
            raise ValueError(
                f"level {label}: {path!r} has max_norm={m.max_norm}: it changes its weights in the forward pass, which "
                "no derivative follows. Normalise the looked-up rows instead, or clip the weights in a callback."
            )


def describe(level: Level, engine: EngineSpec | None) -> list[str]:
    """What all ranks must have in common of a level."""
    facts = dict(
        kind=type(level).__name__,
        engine=level.engine or engine,
        hypergradient=level.hypergradient,
        unroll_steps=level.unroll_steps,
        gradient_accumulation_steps=level.gradient_accumulation_steps,
        max_grad_norm=level.max_grad_norm,
    )
    lines = [f"level {level.name!r} with {key}={value!r}" for key, value in facts.items()]
    parameters = dict(level._module.named_parameters())
    shapes = [f"{n} {list(parameters[n].shape)} {parameters[n].dtype}" for n in level.owned_parameters()]
    return [*lines, *(f"level {level.name!r} with parameter {shape}" for shape in shapes)]


def _check_modules_are_disjoint(levels: Sequence[Level]) -> None:
    owner: dict[int, tuple[str, nn.Module]] = {}
    for level in levels:
        for name, parameter in level._module.named_parameters():
            if id(parameter) in owner:
                raise ValueError(
                    f"levels {owner[id(parameter)][0]!r} and {level.name!r} have different modules that share the "
                    f"parameter {name!r}. Give both levels the same module and divide it with `parameters`."
                )
        owner |= {id(p): (level.name, level._module) for p in level._module.parameters()}
