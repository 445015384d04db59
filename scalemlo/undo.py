"""Run steps of some levels and take them back, bit by bit."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .training import LevelTrainer


@contextmanager
def undone(trainers: Sequence["LevelTrainer"]) -> Iterator[None]:
    """Whatever the levels do inside is undone at the end: weights, optimizer, schedule, scaler, estimator's memory.

    Batches that were taken stay taken. Costs a copy of weights and optimizer states, on the device of each.

    Args:
        trainers: The levels.

    Yields:
        Nothing.
    """
    saved = [_Saved(trainer) for trainer in trainers]
    try:
        yield
    finally:
        for state in saved:
            state.restore()


class _Saved:
    """What one level holds."""

    def __init__(self, trainer: "LevelTrainer"):
        self._trainer = trainer
        self._weights = trainer.weights().clone()
        self._states = {p: _copied(dict(state)) for p, state in trainer.optimizer.state.items()}
        self._options = [_copied({k: v for k, v in g.items() if k != "params"}) for g in trainer.optimizer.param_groups]
        self._scheduler = {} if trainer.scheduler is None else copy.deepcopy(trainer.scheduler.state_dict())
        self._scaler = copy.copy(trainer.scaler)
        self._memory = {level: dict(kept) for level, kept in trainer.memory.items()}
        self._num_steps, self._trajectory = trainer.num_steps, trainer.trajectory

    def restore(self) -> None:
        """Put it back, into the live tensors."""
        trainer = self._trainer
        with torch.no_grad():
            for name, live in trainer.weights().items():
                live.copy_(self._weights[name])
        trainer.optimizer.state.clear()
        trainer.optimizer.state.update(self._states)
        for group, options in zip(trainer.optimizer.param_groups, self._options, strict=True):
            group.update(options)
        if trainer.scheduler is not None:
            trainer.scheduler.load_state_dict(self._scheduler)
        trainer.scaler = self._scaler
        trainer.memory.clear()
        trainer.memory.update(self._memory)
        trainer.num_steps, trainer.trajectory = self._num_steps, self._trajectory


def _copied(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else copy.copy(v) for k, v in options.items()}
