"""A level's optimizer and schedule, bound to the parameters that its engine holds."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..engines.base import ParameterBlock
from ..level import Level


def bind_optimizer(level: Level, block: ParameterBlock) -> Optimizer:
    """The user's optimizer over the engine's parameters; an instance keeps its groups, options and order.

    Args:
        level: The definition.
        block: Its parameters, in their engine.

    Returns:
        The optimizer.

    Raises:
        ValueError: If the level's function makes none, or not of exactly these parameters.
    """
    parameters = {name: block.engine.parameters[name] for name in block.names}
    if not isinstance(level.optimizer, Optimizer):
        optimizer = level.optimizer(list(parameters.values()))
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"level {level.name!r}: optimizer(...) returned {type(optimizer).__name__}, no optimizer.")
        _check_parameters(level, optimizer, {id(p): name for name, p in parameters.items()})
        return optimizer
    return level.optimizer


def bind_scheduler(level: Level, optimizer: Optimizer) -> LRScheduler | None:
    """The user's schedule of an optimizer, if there is one.

    Args:
        level: The definition.
        optimizer: The level's.

    Returns:
        The schedule.

    Raises:
        ValueError: If it depends on a metric, or belongs to another optimizer.
    """
    scheduler = level.scheduler
    if scheduler is None:
        return None
    if not isinstance(scheduler, LRScheduler):
        scheduler = scheduler(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau) or "metrics" in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"level {level.name!r}: {type(scheduler).__name__} needs a metric; step it in a callback.")
    if scheduler.optimizer is not optimizer:
        raise ValueError(f"level {level.name!r}: the scheduler belongs to another optimizer than the level's.")
    return scheduler


def optimizer_parameter_names(level: Level, names: Sequence[str]) -> dict[int, str]:
    """Check that an optimizer instance holds exactly a level's parameters.

    Args:
        level: The level, before its module is wrapped.
        names: Canonical names of its parameters.

    Returns:
        Name by ``id`` of the parameter object in the optimizer; empty for an optimizer that is yet to be made.

    Raises:
        ValueError: Naming what is missing or foreign.
    """
    if not isinstance(level.optimizer, Optimizer):
        return {}
    parameters = dict(level._module.named_parameters())
    by_id = {id(parameters[n]): n for n in names}
    _check_parameters(level, level.optimizer, by_id)
    if level.optimizer.state:
        raise ValueError(f"level {level.name!r}: its optimizer has stepped already; give a fresh one.")
    return by_id


def _check_parameters(level: Level, optimizer: Optimizer, by_id: Mapping[int, str]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for i, n in by_id.items() if i not in held]
    foreign = len(held - set(by_id))
    if missing or foreign:
        raise ValueError(
            f"level {level.name!r}: its optimizer must hold exactly the level's parameters; it lacks {missing[:5]} "
            f"({len(missing)} in all) and holds {foreign} that are not the level's. Build it from the parameters of "
            "the module that have requires_grad=True (and match `parameters`)."
        )


def swap_parameters(optimizer: Optimizer, names: Mapping[int, str], parameters: Mapping[str, Any]) -> None:
    """Put an engine's parameters in the place of the originals in an optimizer's groups.

    Args:
        optimizer: Changed in place; groups, options and order stay.
        names: Name by ``id`` of the original, from :func:`optimizer_parameter_names`.
        parameters: The engine's parameters by name.
    """
    for group in optimizer.param_groups:
        group["params"] = [parameters[names[id(p)]] for p in group["params"]]
