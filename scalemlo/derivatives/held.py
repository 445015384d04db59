"""Losses whose stop-gradients stay where they are while the weights move."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..autodiff.stop_gradient import Constants
from ..engines.base import Engine
from .products import LossAt


class _LossConstants(Constants):
    """Those of a loss itself, not those inside the modules it calls: their passes differ in what they run."""

    def __init__(self, engines: Sequence[Engine], recorded: list[Tensor] | None = None):
        super().__init__(recorded)
        self._engines = engines

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Record or replace, between the calls of modules."""
        if any(engine.skeleton.in_use for engine in self._engines):
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def held_at_weights(loss: LossAt) -> LossAt:
    """The same loss with its stop-gradients held at their values at its point, whatever weights it is given.

    Differences of a loss or of its gradients would otherwise differentiate them. Those inside modules are not held.
    Costs one forward pass.

    Args:
        loss: At the point whose values are to be held.

    Returns:
        A loss on the same batches.
    """
    batches: list[tuple[list[Tensor], Any]] = []

    def record(batch: Any) -> Tensor:
        with _LossConstants(loss.engines) as constants:
            value = loss.evaluate(batch)
        batches.append((constants.values, batch))
        return value

    def replay(pair: tuple[list[Tensor], Any]) -> Tensor:
        values, batch = pair
        with _LossConstants(loss.engines, values):
            return loss.evaluate(batch)

    recording = replace(loss, evaluate=record)
    with loss.running("plain"), torch.enable_grad():  # no weight requires a gradient, so no graph is kept
        for batch in loss.batches:
            recording.local_loss(batch, loss.weights())
    return replace(loss, evaluate=replay, batches=batches)
