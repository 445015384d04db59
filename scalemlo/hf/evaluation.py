"""A model on a whole data set, all ranks sharing the work: losses per example, predictions, values of other levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..distributed.group import all_reduce_sum, gather_objects, rank, world_size
from ..loop.batches import map_tensors
from ..loop.program import Program
from .losses.next_token import IGNORE_INDEX
from .losses.per_example import Losses, checked_losses
from .losses.recorder import Recorder


def map_examples(
    program: Program,
    dataset: Any,
    collate: Callable[[list], Mapping[str, Tensor]],
    batch_size: int,
    values: Callable[[Mapping[str, Tensor]], Tensor],
    after_batch: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """One value per example. Collective; call it inside :meth:`Program.inference` of what ``values`` uses.

    Args:
        program: On whose device batches are computed.
        dataset: N examples.
        collate: Makes a batch of a list of examples.
        batch_size: Examples per batch and rank.
        values: From a batch of B examples to values ``[B]``, in the order of its ``example_id`` if it has them, else in
            that of the list that was collated.
        after_batch: Called after each.

    Returns:
        Values ``[N]`` in fp64, equal on every rank.
    """
    found = torch.zeros(len(dataset), dtype=torch.float64, device=program.device)
    for indices in _my_batches(len(dataset), batch_size):
        rows = [dataset[i] for i in indices or [0]]  # a rank without examples still joins the collectives
        batch = map_tensors(lambda t: t.to(program.device), collate(rows))
        found[indices] = values(batch)[_order(rows, batch)][: len(indices)].double()
        after_batch()
    return all_reduce_sum(found).cpu().numpy()


def _order(rows: list, batch: Mapping[str, Tensor]) -> list[int]:
    """Where the values of the rows stand: a collator that packs examples changes their order."""
    if "example_id" not in batch:
        return list(range(len(rows)))
    ids = batch["example_id"].tolist()
    wanted = [row["example_id"] for row in rows]
    return list(range(len(rows))) if ids == wanted else [ids.index(i) for i in wanted]


class Evaluated(NamedTuple):
    """What a pass over a data set gave, equal on every rank: losses ``[N]``; predictions and labels where wanted."""

    losses: np.ndarray
    predictions: np.ndarray | None
    labels: np.ndarray | None


def run_over(
    program: Program,
    level: str,
    dataset: Any,
    collate: Callable[[list], Mapping[str, Tensor]],
    losses: Losses,
    batch_size: int,
    *,
    predictions: Predictions | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluated:
    """A level's model on a data set. Collective.

    Args:
        program: The program.
        level: Name of the level.
        dataset: N examples.
        collate: Makes a batch of a list of examples.
        losses: Of the examples.
        batch_size: Examples per batch and rank.
        predictions: Where to put logits and labels; they are those of the pass that gives the losses.
        after_batch: Called after each.

    Returns:
        Losses, predictions and labels.
    """
    if predictions is not None and hasattr(collate, "trim_labels"):
        collate.trim_labels = False  # ty: ignore[invalid-assignment]  # labels in the shape of the logits
    positions = iter(_my_batches(len(dataset), batch_size))
    with program.inference(level) as view:
        model = Recorder(view)

        def values(batch: Mapping[str, Tensor]) -> Tensor:
            found = checked_losses(losses, model, batch)
            if predictions is not None:
                predictions.add(next(positions), *_logits_and_labels(model.output, batch))
            return found

        found = map_examples(program, dataset, collate, batch_size, values, after_batch)
    return Evaluated(found, *(predictions.gathered() if predictions is not None else (None, None)))


def _logits_and_labels(output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    if "example_index" in batch:
        raise ValueError(
            "predict() and compute_metrics need one example per row, and data_collator packs several: give another "
            "one, or set prediction_loss_only=True."
        )
    logits, labels = getattr(output, "logits", None), batch.get("labels")
    if logits is None or labels is None:
        missing = "logits of the model" if logits is None else "labels in the batch"
        raise ValueError(
            f"predict() and compute_metrics need {missing}: return them from the module's forward and data_collator, "
            "or set prediction_loss_only=True."
        )
    return logits, labels


def _my_batches(size: int, batch_size: int) -> list[list[int]]:
    """Positions of this rank's examples; the same number of batches on every rank."""
    mine = list(range(rank(), size, world_size()))
    per_rank = math.ceil(size / world_size())
    return [mine[start : start + batch_size] for start in range(0, per_rank, batch_size)]


class Predictions:
    """Predictions and labels of examples as they come, put together as transformers' Trainer does.

    Args:
        preprocess: From logits and labels to what is kept, or None.
    """

    def __init__(self, preprocess: Callable[[Tensor, Tensor], Tensor] | None = None):
        self._preprocess = preprocess
        self._kept: list[tuple[int, np.ndarray, np.ndarray]] = []

    def add(self, positions: Sequence[int], logits: Tensor, labels: Tensor) -> None:
        """Keep those of a batch on the host.

        Args:
            positions: In the data set.
            logits: ``[B, ...]``.
            labels: ``[B, ...]``.
        """
        if self._preprocess is not None:
            logits = self._preprocess(logits, labels)
        logits = logits.float() if logits.is_floating_point() else logits
        for i, position in enumerate(positions):
            self._kept.append((position, logits[i].cpu().numpy(), labels[i].cpu().numpy()))

    def gathered(self) -> tuple[np.ndarray, np.ndarray]:
        """All ranks' in the order of the data set, padded with -100. Collective.

        Returns:
            Predictions and labels.
        """
        ordered = sorted((kept for part in gather_objects(self._kept) for kept in part), key=lambda kept: kept[0])
        return _stacked([kept[1] for kept in ordered]), _stacked([kept[2] for kept in ordered])


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    shape = [max(sizes) for sizes in zip(*(a.shape for a in arrays), strict=True)]
    out = np.full([len(arrays), *shape], IGNORE_INDEX, dtype=arrays[0].dtype)
    for i, a in enumerate(arrays):
        out[(i, *(slice(0, size) for size in a.shape))] = a
    return out
