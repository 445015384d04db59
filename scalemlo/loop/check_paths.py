"""Whole gradients, over all hops and paths, held against what the live levels do.

Two things can be wrong with a gradient through several levels although every product is right: a hop's part may belong
to another step than the live module makes, and a path may be missing. The first shows hop by hop, in how live gradients
move (:mod:`.verification`); the second in whether the loss above changes at all once its parameters were moved while
the levels below stepped.
"""

from collections.abc import Sequence

from ..autodiff.errors import DerivativeError
from ..distributed.shards import Shards
from ..hypergradients.random_directions import gaussian
from .iteration import Iteration
from .level_trainer import LevelTrainer
from .undo import undone
from .verification import Verification

NEGLIGIBLE = 1e-9
"""A response below this part of the direct gradients' size counts as none."""

ANTISYMMETRIC = 0.05
"""A response is of first order where the loss changes by at least this part of what it does, with the other sign."""


def hops_agree(iteration: Iteration, level: LevelTrainer) -> str | None:
    """Take a level's whole gradient with every hop compared with the live modules.

    Args:
        iteration: With batches fetched.
        level: One that depends on best responses.

    Returns:
        What a hop does not agree with, in words; None where all do.
    """
    gradients = iteration.gradients
    kept, gradients.verification = gradients.verification, Verification("always", 1)
    try:
        gradients.clear()
        gradients.hypergradient(level)
    except DerivativeError as error:
        return str(error)
    finally:
        gradients.verification = kept
        gradients.clear()
    return None


def lost_path(iteration: Iteration, level: LevelTrainer) -> str | None:
    """Whether the levels below answer a level along a path that its gradient lacks.

    Its parameters are moved along a direction and back, the levels below step in between, and its loss is looked at.

    Args:
        iteration: With batches fetched; left as it is.
        level: One that depends on best responses.

    Returns:
        What is lost, in words; None where nothing is, or where an estimator gives the direct gradient alone.
    """
    responding = [iteration.trainers[n] for n in iteration.graph.order if n in iteration.graph.responding(level.name)]
    if any(t.estimator.only_direct or t.estimator.scores or t.estimator.needs_gradient for t in responding):
        return None
    gradients = iteration.gradients
    gradients.clear()
    direct = level.compute_gradient([level, *responding])
    _, whole = gradients.hypergradient(level)
    gradients.clear()
    response = whole - direct.gradients[level.name]
    scale = sum(float(g.norm()) for g in direct.gradients.values())
    if float(response.norm()) > NEGLIGIBLE * scale or scale == 0.0:
        return None
    direction = gaussian(level.block, 7919)
    radius = 1e-2 * max(float(level.weights().norm()), 1.0) / float(direction.norm())
    losses = [_loss_after(level, responding, direction * (sign * radius)) for sign in (-1.0, 0.0, 1.0)]
    down, up = losses[0] - losses[1], losses[2] - losses[1]
    if abs(up - down) <= ANTISYMMETRIC * (abs(up) + abs(down)):
        return None
    names = [t.name for t in responding]
    return (
        f"the response part of its gradient is {float(response.norm()):.1e}, but where its parameters move while "
        f"{names} step, its loss goes from {losses[1]:.6g} to {losses[0]:.6g} and {losses[2]:.6g}"
    )


def _loss_after(level: LevelTrainer, responding: Sequence[LevelTrainer], change: Shards) -> float:
    """The level's loss at its own parameters, after steps of the levels below at changed ones."""
    live = level.weights()
    with undone([level, *responding]):
        before = live.clone()
        live.add_(change)
        for _ in responding:  # so often that the longest path has been gone
            for lower in responding:
                lower.step(lower.compute_gradient([lower]).gradients[lower.name])
        for name, t in live.items():
            t.copy_(before[name])
        return level.compute_gradient([level]).loss
