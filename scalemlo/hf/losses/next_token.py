"""Per-example next-token losses, in a form that every derivative of this project can pass through.

Nothing here works in place on a differentiable tensor, branches on data or asks a tensor for its value, so the
functions run under `torch.func.jvp`, on meta and fake tensors, and without host-device synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...autodiff.chunks import recomputed

IGNORE_INDEX = -100
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
CHUNK_TOKENS = 512
"""Tokens whose cross entropy is computed at a time: 128k words take 250 MiB in fp32."""


def token_losses(
    model: Callable[..., Any], batch: Mapping[str, Tensor], *, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each next token, `-log p(token_t | tokens_<t)`.

    The model is called without labels, so that no loss of its own (a batch mean, which has lost the examples) is
    computed. `labels` may be narrower than `input_ids`: [B, L] labels belong to the last L positions. The collator
    uses this to cut the columns in which no row has a label, and their logits are dropped before they are cast to
    fp32, which is where the memory of a large vocabulary goes. The rest is cast and reduced to losses
    `chunk_tokens` at a time, and again so in the backward pass: of the whole batch, logits and their gradient (in
    second-order passes their tangents too) exist in the dtype of the model alone.

    Args:
        model: Anything called as `model(input_ids=..., attention_mask=..., use_cache=False)` that returns an object
            with `logits` [B, T, V].
        batch: `input_ids` [B, T], `labels` [B, L] with L <= T and -100 where there is none, and, unless no row is
            padded, `attention_mask` [B, T]; `position_ids` [B, T] where several examples share a row, and then no
            `attention_mask`. Other entries are ignored.
        chunk_tokens: Tokens per chunk, over all B examples; a chunk is at least one position wide.

    Returns:
        Losses [B, K] with K = min(L, T - 1), in fp32 (fp64 if the logits are fp64) and zero where there is no label;
        and the mask [B, K] of the positions that have one.

    Raises:
        ValueError: If `labels` is wider than `input_ids` or has another batch size, or `chunk_tokens` is below 1.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens ({chunk_tokens}) must be at least 1; {CHUNK_TOKENS} is the default")
    input_ids, labels = batch["input_ids"], batch["labels"]
    if labels.shape[0] != input_ids.shape[0] or labels.shape[1] > input_ids.shape[1]:
        raise ValueError(
            f"labels {list(labels.shape)} must be [B, L] with the B of input_ids {list(input_ids.shape)} and L at most "
            "its T; labels of fewer positions belong to the last ones"
        )
    num_targets = min(labels.shape[1], input_ids.shape[1] - 1)  # the first token has no predecessor to predict it
    # Packed rows are kept apart by their positions, which a cache would hide from the model.
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    logits = model(**inputs, use_cache=False).logits
    targets = labels[:, labels.shape[1] - num_targets :]  # [B, K]
    width = max(1, chunk_tokens // targets.shape[0])
    skipped = logits.shape[1] - 1 - num_targets  # position t predicts token t + 1
    sizes = [min(width, num_targets - start) for start in range(0, num_targets, width)]
    chunks = logits.split([skipped, *sizes, 1], dim=1)[1:-1]  # split: its adjoint is one concatenation
    run = partial(recomputed, _cross_entropy) if len(sizes) > 1 else _cross_entropy
    losses = [run(chunk, target) for chunk, target in zip(chunks, targets.split(sizes, dim=1), strict=True)]
    return torch.cat(losses, dim=1), targets != IGNORE_INDEX


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy [B, K] of logits [B, K, V]."""
    flat = _precise(logits).flatten(0, 1)
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view_as(targets)


def example_losses(
    model: Callable[..., Any], batch: Mapping[str, Tensor], *, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Mean next-token cross entropy of each example over its label tokens.

    `l_i = sum_t m_it * ce_it / sum_t m_it`, where m_it says that token t of example i has a label.

    Args:
        model: As in `token_losses`.
        batch: As in `token_losses`. Where examples share rows (`PackingCollator`), `example_index` [R, T] says which of
            the E examples of `example_id` [E] a token is of.
        chunk_tokens: As in `token_losses`.

    Returns:
        Losses, one per entry of `example_id`: [B], or [E] of packed rows; in fp32 (fp64 if the logits are fp64). An
        example without any label gives NaN, not a silent zero; collators refuse such a row and name it.
    """
    losses, mask = token_losses(model, batch, chunk_tokens=chunk_tokens)
    if "example_index" not in batch:
        return losses.sum(dim=1) / mask.sum(dim=1)
    index = batch["example_index"][:, -losses.shape[1] :].flatten()
    num_examples = batch["example_id"].shape[0]
    sums = losses.new_zeros(num_examples).index_add(0, index, losses.flatten())
    return sums / losses.new_zeros(num_examples).index_add(0, index, mask.flatten().to(losses.dtype))


def classification_losses(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
    """Cross entropy of each sequence's class, `l_i = -log p(label_i | tokens_i)`.

    Args:
        model: With logits [B, C]: `AutoModelForSequenceClassification`.
        batch: `input_ids`, `attention_mask` [B, T] and `labels` [B].

    Returns:
        Losses [B], in fp32 (fp64 if the logits are fp64).
    """
    return F.cross_entropy(sequence_logits(model, batch), batch["labels"], reduction="none")


def sequence_logits(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
    """What a model with a head for whole sequences gives: logits [B, C], in fp32 (fp64 if they are fp64)."""
    return _precise(model(**{name: batch[name] for name in MODEL_INPUTS if name in batch}).logits)


def _precise(logits: Tensor) -> Tensor:
    """In bf16 the per-example losses are too coarse for any difference of them."""
    return logits if logits.dtype == torch.float64 else logits.float()
