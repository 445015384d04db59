"""What has a weight, and how the weights are learned: the two levels of reweighting.

Above, the weights ``lambda`` are learned so that the fine-tuned model does well on the meta set; below, the model is
fine-tuned on the weighted training set, with l_i(w) the loss of example i::

    min_lambda  mean_j l_j(w*(lambda))              over the meta set
    s.t.        w*(lambda) = argmin_w  L(w, lambda)

and the :class:`Reweighting` says what L is. Losses that enter a weight are constants of the derivative.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...level import Level
from ...ops import mean, weighted_mean
from ..data.prepared import PreparedDataset
from ..losses.next_token import token_losses
from ..losses.per_example import Losses, checked_losses
from ..losses.recorder import Recorder, mean_last_hidden_state
from .config import ReweightingConfig


class ExampleWeights(nn.Module):
    """One weight in (0, 1) per training example, 1/2 at the start; or divided by their mean, 1 at the start.

    Args:
        num_examples: N; examples are numbered 0 to N - 1.
        present: Numbers of the examples that exist; given, weights are divided by the mean over these.
    """

    present: Tensor | None

    def __init__(self, num_examples: int, present: Tensor | None = None):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_examples))
        self.register_buffer("present", present, persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """Weights ``[B]`` of the examples ``index [B]``."""
        weights = torch.sigmoid(self.logits[index])
        if self.present is None:
            return weights
        return weights / torch.sigmoid(self.logits[self.present]).mean()


class DomainWeights(nn.Module):
    """A mixture over domains, at the start that of the data.

    Args:
        shares: Share q_d of the training set that is of domain d, ``[K]``.
    """

    shares: Tensor

    def __init__(self, shares: Tensor):
        super().__init__()
        self.logits = nn.Parameter(shares.log())
        self.register_buffer("shares", shares, persistent=False)

    def forward(self, domain: Tensor) -> Tensor:
        """Weights ``p_d / q_d`` ``[B]`` of examples of the domains ``domain [B]``; their mean over the data is 1."""
        return (torch.softmax(self.logits, 0) / self.shares)[domain]


class ScoreNet(nn.Module):
    """A weight in (0, 1) from features: one hidden layer; 1/2 at the start, whatever the features.

    Args:
        num_features: F.
        hidden_size: Width of the hidden layer.
    """

    def __init__(self, num_features: int, hidden_size: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(num_features, hidden_size), nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Weights ``[n]`` of features ``[n, F]``."""
        features = features.to(self.hidden.weight.dtype)
        return torch.sigmoid(self.out(torch.tanh(self.hidden(features)))).squeeze(-1)


class Reweighting(ABC):
    """What has a weight.

    Args:
        args: The trainer's.
        train: The training set.
        losses: Of the examples.
        model: The fine-tuned model, before an engine takes it; only its config is looked at.

    Attributes:
        module: Holds the parameters lambda.

    Raises:
        ValueError: If the data or the model lacks what weights are computed from.
    """

    module: nn.Module

    def __init__(self, args: ReweightingConfig, train: PreparedDataset, losses: Losses, model: nn.Module):
        self.args, self.losses = args, losses
        self.normalize = args.weight_normalization == "batch"

    @abstractmethod
    def loss(self, model: Any, rater: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The lower level's loss L on this rank's part of a batch.

        Args:
            model: The fine-tuned model.
            rater: The module of the weights.
            batch: The examples.

        Returns:
            A scalar; its mean over ranks is L on the global batch.
        """

    @abstractmethod
    def example_weights(self, model: Any, rater: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Weights ``[B]`` for the table that is exported; runs the model only where weights depend on losses."""


class FromTable(Reweighting):
    """A weight is looked up by a column of the batch: ``L = (1/B) sum_i w_i l_i``, or ``sum_i w_i l_i / sum_i w_i``."""

    column: str

    def loss(self, model: Any, rater: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Reweighting.loss`."""
        losses = checked_losses(self.losses, model, batch)
        return weighted_mean(losses, rater(batch[self.column]), normalize=self.normalize)

    def example_weights(self, model: Any, rater: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Reweighting.example_weights`."""
        return rater(batch[self.column])


class ByExample(FromTable):
    """A table with one logit per training example.

    ``L = (1/B) sum_i w_i l_i`` with ``w_i = sigmoid(lambda_i) / mean_j sigmoid(lambda_j)``, the mean over the training
    set (``weight_normalization="dataset"``), over the batch (``"batch"``), or left out (``"none"``). Starts as plain
    fine-tuning. Ren et al. 2018, *Learning to Reweight Examples for Robust Deep Learning*, eq. 1-2, with weights that
    are kept from step to step.
    """

    column = "example_id"

    def __init__(self, args: ReweightingConfig, train: PreparedDataset, losses: Losses, model: nn.Module):
        super().__init__(args, train, losses, model)
        present = torch.tensor(train.example_ids) if args.weight_normalization == "dataset" else None
        self.module = ExampleWeights(train.num_examples, present)


class ByDomain(FromTable):
    """A mixture of K domains.

    ``L = (1/B) sum_i (p_d(i) / q_d(i)) l_i`` with ``p = softmax(lambda)`` and q the shares of the domains in the
    training set, an unbiased estimate of ``sum_d p_d mean_{i in d} l_i``. Starts at p = q, plain fine-tuning.
    Pan et al. 2024, *ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting*.
    """

    column = "domain_id"

    def __init__(self, args: ReweightingConfig, train: PreparedDataset, losses: Losses, model: nn.Module):
        super().__init__(args, train, losses, model)
        counts = torch.bincount(torch.tensor(train.domain_ids), minlength=len(train.domains)).float()
        empty = [d for d, count in zip(train.domains, counts, strict=True) if count == 0]
        if empty:
            raise ValueError(f"domains {empty} have no row in {train.name}; leave them out of domains.")
        self.module = DomainWeights(counts / counts.sum())


class ByScore(Reweighting):
    """A net that scores examples by their loss, their embedding under the fine-tuned model, or both.

    ``L = sum_i w_i l_i / sum_i w_i`` over the batch (``"batch"``) or ``(1/B) sum_i w_i l_i`` (``"none"``) with
    ``w_i = net_lambda(stop(l_i), stop(e_i))`` and e_i ``[H]`` the mean of the last hidden state over the tokens,
    standardised (:func:`~.losses.recorder.mean_last_hidden_state`). ``scorer_features`` says which of the two the net
    sees; both come out of the pass that gives the losses. By the loss alone: Shu et al. 2019, *Meta-Weight-Net:
    Learning an Explicit Mapping For Sample Weighting*, eq. 1-2.
    """

    def __init__(self, args: ReweightingConfig, train: PreparedDataset, losses: Losses, model: nn.Module):
        super().__init__(args, train, losses, model)
        sizes = {"loss": lambda: 1, "embedding": lambda: _hidden_size(model, train)}
        self.module = ScoreNet(sum(sizes[name]() for name in args.scorer_features), args.scorer_hidden_size)

    def loss(self, model: Any, rater: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Reweighting.loss`."""
        losses, weights = self._losses_and_weights(model, rater, batch)
        return weighted_mean(losses, weights, normalize=self.normalize)

    def example_weights(self, model: Any, rater: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Reweighting.example_weights`."""
        return self._losses_and_weights(model, rater, batch)[1]

    def _losses_and_weights(self, model: Any, rater: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        features, wanted = [], self.args.scorer_features
        recorder = Recorder(model, output_hidden_states=True) if "embedding" in wanted else model
        losses = checked_losses(self.losses, recorder, batch)
        if "loss" in wanted:
            features.append(losses.detach()[:, None])
        if "embedding" in wanted:
            features.append(mean_last_hidden_state(recorder.output, batch))
        return losses, rater(torch.cat(features, dim=1))


def _hidden_size(model: nn.Module, train: PreparedDataset) -> int:
    """H of the last hidden state of a transformers model."""
    if train.kind == "preference":
        raise ValueError(
            f"scorer_features has 'embedding', and {train.name} has pairs of sequences, which have none; use "
            "scorer_features=['loss']."
        )
    config = getattr(model, "config", None)
    size = getattr(config.get_text_config(), "hidden_size", None) if hasattr(config, "get_text_config") else None
    if size is None:
        raise ValueError(
            f"scorer_features has 'embedding', and {type(model).__name__} has no config.hidden_size, as models of "
            "transformers have; use scorer_features=['loss']."
        )
    return size


class ByToken(Reweighting):
    """A net that scores tokens by their loss and their example's.

    ``L = sum_it m_it w_it l_it / sum_it m_it w_it`` over the tokens t of the batch's examples i that have a label
    (``m_it = 1``), with ``w_it = net_lambda(stop(l_it), stop(mean_t l_it))``. The exported weight of an example is the
    mean over its tokens.
    """

    def __init__(self, args: ReweightingConfig, train: PreparedDataset, losses: Losses, model: nn.Module):
        super().__init__(args, train, losses, model)
        if train.kind != "language_modeling":
            raise ValueError(
                f"reweighting='token' needs sequences with next-token labels; {train.name} has {train.format}."
            )
        self.module = ScoreNet(2, args.scorer_hidden_size)

    def loss(self, model: Any, rater: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Reweighting.loss`."""
        losses, weights, _ = self._tokens(model, rater, batch)
        return weighted_mean(losses.flatten(), weights.flatten(), normalize=self.normalize)

    def example_weights(self, model: Any, rater: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Reweighting.example_weights`."""
        _, weights, mask = self._tokens(model, rater, batch)
        return weights.sum(1) / mask.sum(1)

    def _tokens(self, model: Any, rater: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, weights and mask ``[B, K]`` of the tokens that are predicted."""
        if "example_index" in batch:
            raise ValueError(
                "reweighting='token' needs one example per row, and data_collator packs several into one; use "
                "PadCollator."
            )
        losses, mask = token_losses(model, batch)
        seen = losses.detach()
        of_example = (seen.sum(1) / mask.sum(1))[:, None].expand_as(seen)
        features = torch.stack([seen, of_example], dim=-1).flatten(0, 1)
        return losses, rater(features).view_as(seen) * mask, mask


REWEIGHTINGS: dict[str, type[Reweighting]] = {
    "example": ByExample,
    "domain": ByDomain,
    "scorer": ByScore,
    "token": ByToken,
}
"""By the name that configurations use."""


class Rate(Level):
    """Upper level: the fine-tuned model should do well on the meta set.

    Args:
        *args: As :class:`scalemlo.Level`.
        losses: Of the examples.
        **options: As :class:`scalemlo.Level`.
    """

    def __init__(self, *args: Any, losses: Losses, **options: Any):
        super().__init__(*args, **options)
        self._losses = losses

    def loss(self, batch, finetune):
        """Mean loss over examples of the meta set."""
        return mean(checked_losses(self._losses, finetune, batch))


class Finetune(Level):
    """Lower level: fine-tune on weighted data.

    Args:
        *args: As :class:`scalemlo.Level`.
        reweighting: What has a weight.
        **options: As :class:`scalemlo.Level`.
    """

    def __init__(self, *args: Any, reweighting: Reweighting, **options: Any):
        super().__init__(*args, **options)
        self._reweighting = reweighting

    def loss(self, batch, rater):
        """Weighted loss, see :class:`Reweighting`."""
        return self._reweighting.loss(self.module, rater, batch)
