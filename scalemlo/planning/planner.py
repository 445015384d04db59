"""The plan of a program that has been built: its levels again, in a forked process, on tensors without data.

A fork, since making a plan iterates the data, makes a process group and leaves entries in torch's caches: there, none
of it is the live program's. The child mutates what it finds as it likes.
"""

import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from ..distributed import group
from ..engines import EngineSpec
from ..loop.program import Program
from .plan import Plan, plan_build

if TYPE_CHECKING:
    from ..engines import Engine
    from ..loop.level_trainer import LevelTrainer

_NOT_OF_DERIVATIVES = ("training", "gradient_checkpointing", "config")
"""What a skeleton has otherwise than the live module, as double derivatives want it (attention, checkpointing)."""


_kept: list[Any] = []
"""Groups and stores of the parent, which must not be destroyed in the child."""


def plan(
    program: Program | Callable[[], Program],
    *,
    world_size: int | None = None,
    engine: EngineSpec | None = None,
    timeout_seconds: float | None = 600.0,
    **options: Any,
) -> Plan:
    """What one outer iteration takes per rank at any world size, without data, launcher or GPU.

    A function that builds a program is run under the simulation, so that models which it makes from a configuration
    have no weights: that is how programs are planned that are too large for this machine. A program that has been built
    is planned in a fork of this process and stays as it is.

    Args:
        program: It, or what builds it.
        world_size: Number of ranks; by default, of a built program, of those that run.
        engine: Of a built program, in the place of every level's own; :class:`Single` has no plan for several ranks.
        timeout_seconds: A fork that has no plan by then is ended, with a ``ValueError``; None waits for ever.
        **options: ``device_memory``, ``hardware``, ``accelerator`` (by default, of a built program, what this rank
            computes on) and ``num_layers`` of :func:`.plan.plan_build`.

    Returns:
        The plan.

    Raises:
        ValueError: What the program itself raises on so many ranks; an engine that cannot be simulated; where
            processes cannot be forked, or the fork fails or takes too long.
    """
    if isinstance(program, Program):
        return _of_built(program, world_size, engine, timeout_seconds, options)
    if world_size is None or engine is not None:
        raise ValueError(
            "mlo.plan(build, ...) needs world_size=, and takes the engines that build gives its levels: "
            f"world_size={world_size!r}, engine={engine!r}."
        )
    return plan_build(program, world_size=world_size, **options)


def _of_built(
    program: Program,
    num_ranks: int | None,
    engine: EngineSpec | None,
    timeout_seconds: float | None,
    options: Mapping[str, Any],
) -> Plan:
    instead = "Plan from a function that builds the program instead: mlo.plan(build, ...)."
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError(f"mlo.plan(program) forks this process, which this system cannot. {instead}")
    ranks = group.world_size() if num_ranks is None else num_ranks
    options = {"world_size": ranks, "accelerator": program.device.type != "cpu", **options}
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(theirs, program, engine, options), daemon=False)
    child.start()
    theirs.close()
    try:
        if not ours.poll(timeout_seconds):
            raise ValueError(
                f"the forked process had no plan after timeout_seconds={timeout_seconds:g} and was ended. Wait longer "
                f"(None: for ever), or: {instead}"
            )
        found = ours.recv()
    except EOFError:
        child.join()
        raise ValueError(f"the forked process ended with status {child.exitcode}, without a plan. {instead}") from None
    except BaseException:  # Ctrl-C too: what is not waited for here would be waited for at exit
        child.kill()
        raise
    finally:
        ours.close()
        child.join()
    if isinstance(found, Plan):
        return found
    is_users, said = found
    raise ValueError(said if is_users else f"this program cannot be planned as it is: {said}. {instead}")


def _in_child(answer: Any, program: Program, engine: EngineSpec | None, options: Mapping[str, Any]) -> None:
    try:
        torch.set_num_threads(1)  # a pool of OpenMP does not survive a fork
        _forget_group()
        answer.send(plan_build(lambda: _again(program, engine), **options))
    except ValueError as error:
        answer.send((True, str(error)))
    except Exception as error:
        answer.send((False, f"{type(error).__name__}: {error}"))
    finally:
        answer.close()


def _forget_group() -> None:
    """Be in no process group, without a word to those of the parent: their threads are not here to be joined."""
    if dist.is_initialized():
        _kept.extend(dist.distributed_c10d._world.pg_map.items())
        with mock.patch.object(dist.ProcessGroup, "shutdown", lambda group: None):
            dist.destroy_process_group()


def _again(program: Program, spec: EngineSpec | None) -> Program:
    """The program once more, from its own levels, on the tensors that are made where this runs."""
    structures: dict[int, nn.Module] = {}
    for trainer in program.trainers.values():
        level, engine = trainer.level, trainer.engine
        optimizer = level.optimizer
        if id(engine) not in structures:
            structures[id(engine)] = _structure(engine)
        level._module, level._view = structures[id(engine)], None
        for name, value in vars(level).items():
            if isinstance(value, nn.Module) and name != "_module":
                _replace_tensors(value, {})
        level.engine = spec or engine.spec
        if isinstance(optimizer, Optimizer):
            level.optimizer = _fresh(trainer, level._module)
        if isinstance(level.scheduler, LRScheduler):
            level.scheduler = None  # of the live optimizer; changes no size
        if isinstance(level.data, DataLoader):
            level.data.num_workers = 0  # workers that wait are the parent's
    within = program.iteration.scheduler.residency
    return Program(program.graph.levels, memory=None if within is None else within.memory)


def _structure(engine: "Engine") -> nn.Module:
    """The module as it was given to the engine."""
    structure = engine.skeleton.module
    for copied, live in zip(structure.modules(), engine.module.modules(), strict=True):
        if isinstance(copied.__dict__.get("forward"), FunctionType):
            del copied.forward  # lends weights
        known = live.__dict__
        copied.__dict__.update({name: known[name] for name in _NOT_OF_DERIVATIVES if name in known})
    trained = {name: p.requires_grad for name, p in engine.parameters.items()}
    _replace_tensors(structure, trained)
    return structure


def _replace_tensors(module: nn.Module, requires_grad: Mapping[str, bool]) -> None:
    """Put new parameters and buffers in the place of all old ones."""
    made: dict[int, Tensor] = {}

    def new(old: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        if id(old) not in made:
            made[id(old)] = make(torch.empty(old.shape, dtype=old.dtype))
        return made[id(old)]

    for prefix, owner in module.named_modules():
        for name, p in owner._parameters.items():
            if p is not None:
                wanted = requires_grad.get(f"{prefix}.{name}" if prefix else name, p.requires_grad)
                owner._parameters[name] = new(p, lambda t, wanted=wanted: nn.Parameter(t, wanted))
        for name, b in owner._buffers.items():
            owner._buffers[name] = None if b is None else new(b, lambda t: t)


def _fresh(trainer: "LevelTrainer", module: nn.Module) -> Optimizer:
    """An optimizer like the one that a level was given, over new parameters, as if it was read from a pickle."""
    given = trainer.optimizer
    names = {id(p): name for name, p in trainer.engine.parameters.items()}
    groups = [
        {**group, "params": [module.get_parameter(names[id(p)]) for p in group["params"]]}
        for group in given.param_groups
    ]
    fresh = type(given).__new__(type(given))
    fresh.__setstate__({"defaults": given.defaults, "state": defaultdict(dict), "param_groups": groups})
    return fresh
