"""Per-example losses as the trainers take them: any function of a model and a batch, its result checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Losses = Callable[[Any, Mapping[str, Tensor]], Tensor]
"""``losses(model, batch)`` gives one loss per example, ``[B]``."""


def checked_losses(losses: Losses, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Losses ``[B]`` of the examples of a batch.

    Args:
        losses: Gives them.
        model: The model.
        batch: The examples.

    Returns:
        What ``losses`` gave.

    Raises:
        ValueError: If that is not one loss per example.
        AttributeError: If ``losses`` raises one for another reason than missing logits.
    """
    way_out = "pass losses=, a function (model, batch) -> losses [B]"
    try:
        found = losses(model, batch)
    except AttributeError as error:
        if "logits" not in str(error):
            raise
        raise ValueError(
            f"the model gives no logits, which per-example losses are computed from; {way_out}."
        ) from error
    expected = [len(batch["example_id"])] if "example_id" in batch else None
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if not isinstance(found, Tensor) or found.dim() != 1 or (expected is not None and shape != expected):
        raise ValueError(
            f"the losses of the model are {shape}, not per example ({expected or '[B]'}): in a mean over the batch the "
            f"examples are lost; {way_out}."
        )
    return found
