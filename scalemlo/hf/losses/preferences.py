"""Per-example losses of preferences: a chosen and a rejected sequence for the same prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.collate import LOGP_COLUMNS, PreferenceCollator
from ..data.prepared import PreparedDataset
from .next_token import sequence_logits, token_losses


def sequence_logps(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probabilities of the completions, ``log pi(y | x)``: sums over their label tokens.

    Args:
        model: As in :func:`~scalemlo.hf.losses.next_token.token_losses`.
        batch: Of :class:`~scalemlo.hf.data.collate.PreferenceCollator`.

    Returns:
        ``[B, 2]``, of the chosen and the rejected sequence.
    """
    return -token_losses(model, _flat(batch))[0].sum(dim=1).unflatten(0, (-1, 2))


def dpo_losses(model: Callable[..., Any], batch: Mapping[str, Tensor], *, beta: float = 0.1) -> Tensor:
    """Direct preference optimization, Rafailov et al. 2023 (arXiv:2305.18290), equation 7, for each pair.

    ``l_i = -log sigmoid(beta ((log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))))``, with y_w
    the chosen and y_l the rejected completion.

    Args:
        model: The policy, a language model.
        batch: Of :class:`~scalemlo.hf.data.collate.PreferenceCollator`, with the reference model's log-probabilities;
            :func:`add_reference_logps` computes them once.
        beta: Strength of the pull to the reference.

    Returns:
        Losses ``[B]``.

    Raises:
        ValueError: If the batch has no reference log-probabilities.
    """
    missing = [column for column in LOGP_COLUMNS if column not in batch]
    if missing:
        raise ValueError(
            f"the batch has no {' and '.join(missing)}, which dpo_losses needs; call add_reference_logps before "
            "training, or use reward_losses with a model that has one output"
        )
    logps = sequence_logps(model, batch)  # [B, 2]
    reference = torch.stack([batch[column] for column in LOGP_COLUMNS], dim=1)
    ratios = logps - reference.to(logps.dtype)
    return -F.logsigmoid(beta * (ratios[:, 0] - ratios[:, 1]))


def reward_losses(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
    """Bradley-Terry loss of a reward model, Ouyang et al. 2022 (arXiv:2203.02155), equation 1, for each pair.

    ``l_i = -log sigmoid(r(x, y_w) - r(x, y_l))``.

    Args:
        model: With one logit per sequence: ``AutoModelForSequenceClassification`` with ``num_labels=1``.
        batch: Of :class:`~scalemlo.hf.data.collate.PreferenceCollator`.

    Returns:
        Losses ``[B]``.

    Raises:
        ValueError: If the model gives more than one logit.
    """
    rewards = sequence_logits(model, _flat(batch))
    if rewards.shape[-1] != 1:
        raise ValueError(f"the model gives {rewards.shape[-1]} logits per sequence; load it with num_labels=1")
    pairs = rewards.unflatten(0, (-1, 2)).squeeze(-1)  # [B, 2]
    return -F.logsigmoid(pairs[:, 0] - pairs[:, 1])


@torch.no_grad()
def add_reference_logps(
    dataset: PreparedDataset,
    model: Callable[..., Any],
    pad_token_id: int,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> None:
    """Compute the reference model's log-probabilities of every pair, and keep them with the rows.

    Every rank computes all of them: no collective of its own, so that it runs before or after sharding.

    Args:
        dataset: Of kind ``"preference"``; gets the columns ``ref_chosen_logps`` and ``ref_rejected_logps``.
        model: The reference, usually the model before training, in evaluation mode.
        pad_token_id: For the batches.
        batch_size: Pairs at a time.
        device: Where the model is.
    """
    loader = DataLoader(dataset, batch_size, collate_fn=PreferenceCollator(pad_token_id))
    logps = torch.cat(
        [sequence_logps(model, {k: t.to(device) for k, t in batch.items()}).cpu().double() for batch in loader]
    )
    for column, values in zip(LOGP_COLUMNS, logps.unbind(dim=1), strict=True):
        dataset.add_column(column, values.tolist())


def _flat(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's inputs ``[2B, T]``."""
    return {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")}
