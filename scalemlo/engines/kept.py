"""Whole weights that stay gathered from one pass to the next, while nothing changes them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


class Gathers(Protocol):
    """An engine, as far as weights are gathered from it."""

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors of local shards by parameter name."""
        ...


class KeptWeights:
    """Gathers weights that a pass reads as constants, and keeps them for the next pass as far as there is room.

    Nothing is kept but inside :meth:`within`. Ranks keep the same ones, as gathering is collective: the room must be
    the same on all of them, and :meth:`clear` be called at the same point.
    """

    def __init__(self) -> None:
        self.room_bytes = 0
        """How many may be kept now."""
        self.num_bytes = 0
        """Kept now."""
        self.most_bytes = 0
        """The most that were kept so far."""
        self._kept: dict[tuple[Gathers, tuple[str, ...]], dict[str, Tensor]] = {}

    @contextmanager
    def within(self, room_bytes: int) -> Iterator[None]:
        """Context of passes between which weights are kept; freed at its end.

        Args:
            room_bytes: How many at most.

        Yields:
            Nothing.
        """
        self.room_bytes = room_bytes
        try:
            yield
        finally:
            self.room_bytes = 0
            self.clear()

    def gather(self, engine: Gathers, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors of live weights by which nothing is differentiated; collective where they are not kept yet.

        Args:
            engine: Theirs.
            shards: Live local shards by parameter name.

        Returns:
            As :meth:`Engine.gather`, for reading.
        """
        if any(map(is_functorch_wrapped_tensor, shards.values())):
            return engine.gather(shards)
        key = engine, tuple(shards)
        found = self._kept.get(key)
        if found is None:
            with temporarily_clear_interpreter_stack(), torch.no_grad():  # constants of whatever transform reads them
                found = engine.gather(shards)
            size = sum(t.numel() * t.element_size() for t in found.values())
            if self.num_bytes + size <= self.room_bytes:
                self._kept[key] = found
                self.num_bytes += size
                self.most_bytes = max(self.most_bytes, self.num_bytes)
        return found

    def clear(self) -> None:
        """Free everything: weights are about to change, or the room is needed."""
        self._kept.clear()
        self.num_bytes = 0
