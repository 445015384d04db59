"""Second derivatives that are alike are simulated twice, and counted as often as they are taken.

A solver takes the same product again and again, and dispatching one on fake tensors takes seconds. What a call
allocates depends on its shapes alone, but for what the first one leaves behind, so that from the third on the second
one's bytes (relative to those alive when it began), collectives and FLOPs are counted, and results of its shapes given
out.
"""

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from ..derivatives.products import LossAt
from ..distributed.shards import Shards
from ..loop.batches import map_tensors
from ..memory.bytes_tracker import MemoryTracker, PhaseUse


@dataclass
class _Call:
    before: dict[str, float]
    use: PhaseUse
    results: list[dict[str, Shards]]  # without data


@contextmanager
def replayed_derivatives(tracker: MemoryTracker) -> Iterator[None]:
    """While inside, calls of :class:`~scalemlo.derivatives.products.LossAt` that are alike are run twice only.

    Alike are calls of the same loss, on batches of the same shapes, at live weights or others, moving the same
    parameters and asking for the same derivatives.

    Args:
        tracker: Of the simulation.

    Yields:
        Nothing.
    """
    differentiate = LossAt._differentiate
    calls: dict[Hashable, _Call | None] = {}

    def replayed(
        loss: LossAt,
        moving: Sequence,
        wanted: Any,
        parts: Sequence[Callable],
        difference: Any = None,
        follows: bool = False,
    ) -> Any:
        key = (_key(loss, moving, wanted, parts, difference), follows)
        call = calls.get(key)
        if call is not None:
            tracker.replay(call.before, call.use)
            return _like(call.results, "cpu")
        if key not in calls:
            calls[key] = None
            return differentiate(loss, moving, wanted, parts, difference, follows)
        gc.collect()  # no graph of an earlier call may die in this one
        with tracker.recording() as (before, use):
            found = differentiate(loss, moving, wanted, parts, difference, follows)
        calls[key] = _Call(before, use, _like(found, "meta"))
        return found

    with mock.patch.object(LossAt, "_differentiate", replayed):
        yield


def _key(loss: LossAt, moving: Sequence, wanted: Any, parts: Sequence[Callable], difference: Any) -> Hashable:
    shapes: list[tuple] = []
    map_tensors(lambda t: shapes.append((tuple(t.shape), t.dtype)), list(loss.batches))
    blocks = [_name(block) for block, _ in moving]
    asked = [(key, _name(block)) for key, block in wanted.items()]
    point = [_name(block) for block, _ in loss.point]
    means = None if difference is None else _name(difference.lower)
    return (loss.evaluate, *shapes, None, *blocks, None, *asked, None, *point, *parts, means)


def _name(block: Any) -> Hashable:
    return (block.engine, tuple(block.names))


def _like(found: list[dict[str, Shards]], device: str) -> list[dict[str, Shards]]:
    """Vectors of the same shapes on a device; on ``meta`` they take no memory and are not counted."""
    return [{key: x.map(lambda t: torch.empty_like(t, device=device)) for key, x in by.items()} for by in found]
