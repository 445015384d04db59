"""Batches out of rows: padded on the right, with the ids that weights are found by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..losses.next_token import IGNORE_INDEX

ID_COLUMNS = ("example_id", "domain_id")
"""Integers that every row of a batch has, or none."""

LOGP_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""Log-probabilities of a preference row under the reference model; TRL's names."""


class Padding:
    """How rows are made as long as the longest of them: on the right, with a token that is attended to by none.

    Args:
        pad_token_id: Written where `attention_mask` is 0.
        pad_to_multiple_of: Round the padded length up; 8 or more suits tensor cores and lowers the number of shapes
            that a compiler sees.

    Raises:
        ValueError: If `pad_to_multiple_of` is below 1.
    """

    def __init__(self, pad_token_id: int, *, pad_to_multiple_of: int = 1):
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of ({pad_to_multiple_of}) must be at least 1; 1 means no rounding")
        self.pad_token_id, self.pad_to_multiple_of = pad_token_id, pad_to_multiple_of


class PadCollator(Padding):
    """Pad a list of rows on the right to the longest of them and make tensors.

    Columns of `labels` at the left in which no row has a label are cut (`token_losses` aligns narrower labels with
    the last positions), so that no loss is computed for what is prompt in every row. This is decided here, on the
    CPU, because the loss must not look at the data.

    Args:
        pad_token_id: As in :class:`Padding`.
        pad_to_multiple_of: As in :class:`Padding`.
        trim_labels: Cut label columns as said above. Turn off for code that expects `labels` [B, T].

    Raises:
        ValueError: If `pad_to_multiple_of` is below 1.
    """

    def __init__(self, pad_token_id: int, *, pad_to_multiple_of: int = 1, trim_labels: bool = True):
        super().__init__(pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
        self.trim_labels = trim_labels

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch; a `ValueError` names a row without a label to predict, whose mean loss would be 0 / 0.

        Args:
            rows: B rows of T_i tokens: `input_ids`, `labels`, `example_id` and, if they have it, `domain_id`.

        Returns:
            int64 tensors `input_ids`, `attention_mask` [B, T], `labels` [B, L] with L <= T, `example_id` [B].
        """
        check_targets(rows, "labels")
        length = padded_length(rows, "input_ids", self.pad_to_multiple_of)
        labels = padded([row["labels"] for row in rows], length, IGNORE_INDEX)
        return {
            **_inputs([row["input_ids"] for row in rows], length, self.pad_token_id),
            "labels": _trimmed(labels) if self.trim_labels else labels,
            **stacked_ids(rows),
        }


class PreferenceCollator(Padding):
    """Pairs of sequences to compare, stacked: first the chosen one, then the rejected one; see :class:`Padding`."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch; a ``ValueError`` names a row with a side that has no label to predict.

        Args:
            rows: B rows with ``input_ids`` and ``labels`` of ``chosen_`` and ``rejected_``.

        Returns:
            int64 tensors ``input_ids``, ``attention_mask`` ``[B, 2, T]``, ``labels`` ``[B, 2, L]``, ``example_id``
            ``[B]``; and, where rows have them, fp32 ``ref_chosen_logps`` and ``ref_rejected_logps`` ``[B]``.
        """
        sides = ("chosen_", "rejected_")
        for side in sides:
            check_targets(rows, f"{side}labels")
        length = max(padded_length(rows, f"{side}input_ids", self.pad_to_multiple_of) for side in sides)
        flat = {
            **_inputs([row[f"{side}input_ids"] for row in rows for side in sides], length, self.pad_token_id),
            "labels": _trimmed(padded([row[f"{side}labels"] for row in rows for side in sides], length, IGNORE_INDEX)),
        }
        logps = [column for column in LOGP_COLUMNS if column in rows[0]]
        return {
            **{name: tensor.unflatten(0, (len(rows), 2)) for name, tensor in flat.items()},
            **stacked_ids(rows),
            **{column: torch.tensor([row[column] for row in rows]) for column in logps},
        }


class ClassificationCollator(Padding):
    """Sequences with one class each; see :class:`Padding`."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            rows: B rows with ``input_ids`` and ``label``.

        Returns:
            int64 tensors ``input_ids``, ``attention_mask`` ``[B, T]``, ``labels`` and ``example_id`` ``[B]``.
        """
        length = padded_length(rows, "input_ids", self.pad_to_multiple_of)
        return {
            **_inputs([row["input_ids"] for row in rows], length, self.pad_token_id),
            "labels": torch.tensor([row["label"] for row in rows]),
            **stacked_ids(rows),
        }


# ---- what collators share --------------------------------------------------------------------------------------------
def has_target(labels: Sequence[int]) -> bool:
    """Whether a label can be predicted: the first position has no token before it."""
    return any(label != IGNORE_INDEX for label in labels[1:])


def check_targets(rows: Sequence[Mapping[str, Any]], column: str) -> None:
    """A ``ValueError`` that names the first row without a label that can be predicted."""
    for position, row in enumerate(rows):
        if not has_target(row[column]):
            raise ValueError(
                f"row {position} of the batch (example_id {row['example_id']}) has no label after its first token, "
                "so that its loss is undefined; drop it, or raise max_length so that its answer is not cut off"
            )


def padded_length(rows: Sequence[Mapping[str, Any]], column: str, multiple: int) -> int:
    """Length of the longest list, rounded up."""
    return round_up(max(len(row[column]) for row in rows), multiple)


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple that is no less."""
    return -(-length // multiple) * multiple


def padded(lists: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    """Lists of at most ``length`` integers as int64 ``[B, length]``."""
    return torch.tensor([[*items, *[value] * (length - len(items))] for items in lists])


def stacked_ids(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The id columns that the rows have, ``[B]`` each."""
    return {column: torch.tensor([row[column] for row in rows]) for column in ID_COLUMNS if column in rows[0]}


def _inputs(lists: Sequence[Sequence[int]], length: int, pad_token_id: int) -> dict[str, Tensor]:
    return {
        "input_ids": padded(lists, length, pad_token_id),
        "attention_mask": padded([[1] * len(items) for items in lists], length, 0),
    }


def _trimmed(labels: Tensor) -> Tensor:
    """Labels ``[B, T]`` without the columns before the first label of any row."""
    first = int((labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero()[0]) + 1
    return labels[:, first:]
