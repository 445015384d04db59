"""Batches of a stream of rows, whose position can be saved and found again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch import Tensor

from ...distributed.group import world_size
from .packing import PackingCollator
from .prepared import PreparedStream


class StreamLoader:
    """Batches of a :class:`~scalemlo.hf.data.prepared.PreparedStream`; a level's ``data``.

    Rows are read when their batch is asked for and none before, so that the stream's position is that of the training,
    and a resumed run goes on with the next row. Each pass is an epoch, by whose number a source that shuffles does so
    anew. Rows that do not fill a batch at the end of a pass are dropped. Every rank reads the whole stream and keeps
    its 1/W of each batch.

    Args:
        stream: The rows.
        batch_size: Rows per batch, over all ranks.
        collate: Makes a batch of rows.

    Raises:
        ValueError: If ``batch_size`` is below 1, or packed batches would have to be divided among ranks.
    """

    def __init__(
        self,
        stream: PreparedStream,
        batch_size: int,
        collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1")
        if isinstance(collate, PackingCollator) and world_size() > 1:
            raise ValueError(
                f"{stream.name} is a stream, whose batches are cut into {world_size()} equal parts, and "
                "packed rows hold different numbers of examples; train without packing, or on a data set with a "
                "length, whose batches each rank makes for itself"
            )
        self.stream, self.batch_size, self.collate = stream, batch_size, collate
        self._epoch = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.stream.set_epoch(self._epoch)
        rows = iter(self.stream)
        while len(batch := list(islice(rows, self.batch_size))) == self.batch_size:
            yield self.collate(batch)
        self._epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """The position: epoch, and the stream's own."""
        return {"epoch": self._epoch, "stream": self.stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass begin at a position."""
        self._epoch = state["epoch"]
        self.stream.set_epoch(self._epoch)
        self.stream.load_state_dict(state["stream"])
