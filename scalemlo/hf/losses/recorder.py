"""A model that keeps its last output: what a loss computed can be looked at without running the model again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Recorder:
    """Passes everything on to a model, and keeps what its last call gave.

    Args:
        model: The model, or a view of it.
        **always: Arguments that every call gets.

    Attributes:
        output: Of the last call; None before it.
    """

    def __init__(self, model: Any, **always: Any):
        self._model, self._always, self.output = model, always, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        self.output = self._model(*args, **(kwargs | self._always))
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def mean_last_hidden_state(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """One embedding per example: the mean of its tokens' last hidden state, standardised over its H numbers.

    Args:
        output: Of a model of transformers that was called with ``output_hidden_states=True``.
        batch: One example per row; with ``attention_mask`` ``[B, T]`` unless no row is padded.

    Returns:
        ``[B, H]``, in fp32 (fp64 if the states are), a constant of every derivative.

    Raises:
        ValueError: If there are no hidden states, or examples share rows.
    """
    states = getattr(output, "hidden_states", None)
    if states is None:
        raise ValueError(
            f"the model's output ({type(output).__name__}) has no hidden_states, which embeddings are made of: use "
            "scorer_features=['loss']."
        )
    if "example_index" in batch:
        raise ValueError(
            "several examples are packed into a row, whose embeddings are not defined: give each example its own row, "
            "or use scorer_features=['loss']."
        )
    hidden = states[-1].detach()  # [B, T, H]
    if hidden.dtype != torch.float64:
        hidden = hidden.float()
    mask = batch.get("attention_mask")
    if mask is None:
        pooled = hidden.mean(dim=1)
    else:
        mask = mask[..., None].to(hidden.dtype)  # [B, T, 1]
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return F.layer_norm(pooled, pooled.shape[-1:])
