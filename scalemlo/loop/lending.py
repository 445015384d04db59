"""Batches are lent to a loss: what it does to them must not reach the passes that come after."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunction
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from .batches import map_tensors


class Lender:
    """Lends the batches of one level.

    A hypergradient evaluates the lower loss on one batch several times. Containers are made anew for every evaluation
    (``batch.pop("labels")`` is fine); tensors are copied where the loss has been seen to write into them.

    Args:
        level: Name for messages.
    """

    def __init__(self, level: str):
        self._level = level
        self._writes: bool | None = None  # whether the loss does; None before its first evaluation

    @contextmanager
    def lent(self, batch: Any) -> Iterator[Any]:
        """Context of one evaluation.

        Args:
            batch: As it must be at the next one.

        Yields:
            What the loss may have.

        Raises:
            ValueError: If the loss writes into a batch and did not at first.
        """
        is_copied = self._writes is not False
        lent = map_tensors(_copied if is_copied else _same, batch)
        before = _versions(lent)
        yield lent
        writes = _versions(lent) != before
        if writes and not is_copied:
            raise ValueError(
                f"level {self._level!r}: its loss writes into its batch, which it did not do at first, so that "
                "the next evaluation on that batch finds other values. Copy before writing: "
                "labels = batch['labels'].clone()."
            )
        self._writes = writes or bool(self._writes)


def _copied(x: Tensor) -> Tensor:
    """A constant, also where derivatives are being taken."""
    with DisableTorchFunction(), temporarily_clear_interpreter_stack(), torch.no_grad():
        return x.clone()


def _same(x: Tensor) -> Tensor:
    return x


def _versions(batch: Any) -> list[int]:
    found: list[int] = []

    def note(t: Tensor) -> Tensor:
        found.append(0 if t.is_inference() else t._version)
        return t

    map_tensors(note, batch)
    return found
