"""What losses are written with: means over the global batch, and constants."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Distribution

from .autodiff.rng import own_seed
from .distributed.group import all_reduce_sum, world_size


def mean(values: Tensor) -> Tensor:
    """Mean over the whole batch on all ranks, also where ranks hold different numbers of entries.

    Equation: ``sum_all(values) / count_all``. The result differs by rank; its mean over ranks, which is what engines
    optimize, is that quotient.

    Args:
        values: Any shape, usually per-example losses ``[B]``.

    Returns:
        0-dimensional tensor.

    Raises:
        ValueError: If there is no entry on this rank.
    """
    if values.numel() == 0:
        raise ValueError("mean() got no value on this rank; give every rank at least one example.")
    count = all_reduce_sum(values.new_tensor(float(values.numel())))
    return values.sum() * world_size() / count


def weighted_mean(losses: Tensor, weights: Tensor, *, normalize: bool = True) -> Tensor:
    """Weighted mean of per-example losses over the whole batch on all ranks.

    Equation, with sums over the examples of all ranks::

        normalize=True:   sum_i w_i l_i / sum_i w_i
        normalize=False:  sum_i w_i l_i / B

    The normalised form keeps weights from drifting to zero or growing together, and is differentiated through its
    denominator. The denominator is that of one micro-batch: under gradient accumulation use ``normalize=False`` with
    weights that are normalised elsewhere if 8 x 1 must equal 1 x 8. The result differs by rank; its mean over ranks,
    which is what engines optimize, is the quotient above. Sums are all-reduced (sum) over the default group.

    Args:
        losses: ``[B]``, per-example losses.
        weights: ``[B]``, non-negative.
        normalize: Whether to divide by the sum of the weights or by the number of examples.

    Returns:
        0-dimensional tensor.

    Raises:
        ValueError: If the shapes differ: broadcasting would silently mix examples.
    """
    if losses.shape != weights.shape or losses.dim() != 1:
        raise ValueError(
            f"weighted_mean needs losses [B] and weights [B], got {list(losses.shape)} and {list(weights.shape)}. "
            "Squeeze the output of the weight net, for instance with .squeeze(-1)."
        )
    tape = _tape.get()
    if tape is not None:
        return tape.record(losses, weights, normalize)
    return _weighted_mean(losses, weights, normalize)


def sample(distribution: Distribution) -> Tensor:
    """Draw from a distribution whose parameters upper levels decide; for :class:`scalemlo.Reinforce`.

    A draw is a constant of every derivative. Every pass of one step sees the same draws; each rank draws its own.

    Args:
        distribution: From ``torch.distributions``, ``Bernoulli(logits=rater(index))`` say.

    Returns:
        Its sample.
    """
    with own_seed(), torch.no_grad():
        drawn = distribution.sample()
    tape = _scores.get()
    if tape is not None:
        tape.scores.append(distribution.log_prob(drawn).sum())
    return drawn


def constant(x: Tensor) -> Tensor:
    """A constant of every derivative: the same as ``x.detach()``, said aloud.

    The hypergradient is that of the update the training follows, and in that update a detached value does not move.
    Forward derivatives stop here by construction; finite differences hold the value at the base point.
    """
    return x.detach()


@dataclass
class WeightedMeanTape:
    """Notes the weighted mean that a loss is made of, for :mod:`scalemlo.derivatives.ghost`.

    While recording, the weights are constants of the loss: their part of the derivative is taken from the note.
    """

    losses: Tensor | None = None
    weights: Tensor | None = None
    normalize: bool = True
    result: Tensor | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While inside, :func:`weighted_mean` notes its arguments here."""
        token = _tape.set(self)
        try:
            yield
        finally:
            _tape.reset(token)

    def record(self, losses: Tensor, weights: Tensor, normalize: bool) -> Tensor:
        """Note one weighted mean and return its value.

        Args:
            losses: ``[B]``.
            weights: ``[B]``.
            normalize: As in :func:`weighted_mean`.

        Returns:
            The weighted mean, a constant of the weights.
        """
        self.losses, self.weights, self.normalize = losses, weights, normalize
        self.result = _weighted_mean(losses, weights.detach(), normalize)
        return self.result


@dataclass
class ScoreTape:
    """Notes ``log p`` of what a loss draws with :func:`sample`, differentiable in the distributions' parameters."""

    scores: list[Tensor] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While inside, :func:`sample` notes here."""
        token = _scores.set(self)
        try:
            yield
        finally:
            _scores.reset(token)


_scores: ContextVar[ScoreTape | None] = ContextVar("score_tape", default=None)
_tape: ContextVar[WeightedMeanTape | None] = ContextVar("weighted_mean_tape", default=None)


def _weighted_mean(losses: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    if not normalize:
        return mean(weights * losses)
    return (weights * losses).sum() * world_size() / all_reduce_sum(weights.sum())
