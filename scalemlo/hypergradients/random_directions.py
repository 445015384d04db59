"""Random directions in the space of the upper parameters, the same on every number of ranks."""

from collections.abc import Mapping

import torch

from ..engines.base import ParameterBlock
from ..shards import Shards
from .base import LowerProblem


def rademacher(problem: LowerProblem, seed: int) -> dict[str, Shards]:
    """One direction with entries +1 and -1 over all upper levels of a hop; another one at each call.

    ``E[b b^T] = I``, and among the distributions for which that holds this one has the least variance of ``b b^T x``.
    Every rank draws whole parameters, one after the other, and keeps its part.

    Args:
        problem: The lower level; the number of draws is kept in its memory, so that a resumed run goes on with it.
        seed: Of the estimator.

    Returns:
        The direction by level name.
    """
    number = problem.memory["num_draws"] = problem.memory.get("num_draws", 0) + 1
    generator = torch.Generator().manual_seed(1_000_003 * seed + number)
    return {name: _draw(block, generator) for name, block in problem.uppers.items()}


def along(directions: Mapping[str, Shards], factor: float) -> dict[str, Shards]:
    """A multiple of a direction."""
    return {name: b * factor for name, b in directions.items()}


def _draw(block: ParameterBlock, generator: torch.Generator) -> Shards:
    shards = {}
    for name in block.names:
        like = block.engine.local(name)
        bits = torch.randint(0, 2, tuple(block.engine.parameters[name].shape), generator=generator)
        shards |= block.engine.shard({name: (2 * bits - 1).to(like.device, like.dtype)})
    return Shards(shards, block.engine.group)
