"""What each kind of prepared data is trained with: its collator and its per-example losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..losses.next_token import classification_losses, example_losses
from ..losses.preferences import dpo_losses
from .collate import ClassificationCollator, PadCollator, PreferenceCollator
from .columns import Kind


@dataclass(frozen=True)
class Task:
    """How rows of one kind become losses.

    Attributes:
        collator: Called as ``collator(pad_token_id, pad_to_multiple_of=...)``; makes a batch of B rows.
        losses: Called as ``losses(model, batch)``; gives the losses ``[B]``, in the order of ``batch["example_id"]``.
    """

    collator: Callable[..., Callable[[Any], dict[str, Tensor]]]
    losses: Callable[[Callable[..., Any], Mapping[str, Tensor]], Tensor]


TASKS: dict[Kind, Task] = {
    "language_modeling": Task(PadCollator, example_losses),
    "preference": Task(PreferenceCollator, dpo_losses),
    "classification": Task(ClassificationCollator, classification_losses),
}
"""By ``PreparedDataset.kind``. In the place of the defaults: ``PackingCollator`` for language modelling (same losses),
``reward_losses`` for preferences (a model with one output in the place of a language model)."""
