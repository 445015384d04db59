"""Random vectors over parameters, the same on every engine, precision and number of ranks.

Every rank draws whole parameters, one after the other, and keeps its shards; the global generators are left alone.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..distributed.shards import Shards
from ..engines.base import ParameterBlock
from .base import LowerProblem


def gaussian(block: ParameterBlock, seed: int) -> Shards:
    """A standard normal vector.

    Args:
        block: The parameters.
        seed: Of the vector.

    Returns:
        The vector.
    """
    generator = torch.Generator(block.engine.device).manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=block.engine.device)

    return _sharded(block, draw)


def rademacher(problem: LowerProblem, seed: int) -> dict[str, Shards]:
    """One direction with entries +1 and -1 over all upper levels of a hop; another one at each call.

    ``E[b b^T] = I``, and among the distributions for which that holds this one has the least variance of ``b b^T x``.

    Args:
        problem: The lower level; the number of draws is kept in its memory, so that a resumed run goes on with it.
        seed: Of the estimator.

    Returns:
        The direction by level name.
    """
    number = problem.memory["num_draws"] = problem.memory.get("num_draws", 0) + 1
    generator = torch.Generator().manual_seed(1_000_003 * seed + number)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return 2.0 * torch.randint(0, 2, shape, generator=generator) - 1.0

    return {name: _sharded(block, draw) for name, block in problem.uppers.items()}


def along(directions: Mapping[str, Shards], factor: float) -> dict[str, Shards]:
    """A multiple of a direction."""
    return {name: b * factor for name, b in directions.items()}


def _sharded(block: ParameterBlock, draw: Callable[[tuple[int, ...]], Tensor]) -> Shards:
    shards = {}
    for name in block.names:
        like = block.engine.local(name)
        full = draw(tuple(block.engine.parameters[name].shape)).to(like.device, like.dtype)
        shards |= block.engine.shard({name: full})
    return Shards(shards, block.engine.group)
