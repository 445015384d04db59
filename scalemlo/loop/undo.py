"""Take back what some levels have done: whole steps, or what an error has left of one that was not finished."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..autodiff.rng import RNGState

if TYPE_CHECKING:
    from ..history import History
    from ..memory.phases import Timeline
    from .entry import StepEntry
    from .gradients import TickGradients
    from .level_trainer import LevelTrainer


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


class Savepoint:
    """All that a tick changes before its updates: everything but weights, optimizer states and learning rates.

    Args:
        trainers: All levels.
        gradients: Of the tick.
        history: Of the run; seconds and bytes that were spent stay spent.
        generator: Of the program's seeds.
        timeline: Of phases.
    """

    def __init__(
        self,
        trainers: Sequence["LevelTrainer"],
        gradients: "TickGradients",
        history: "History",
        generator: torch.Generator,
        timeline: "Timeline",
    ):
        self._levels = [_BeforeUpdates(trainer) for trainer in trainers]
        self._gradients, self._of_gradients = gradients, gradients.known()
        self._history, self._counts = history, (dict(history.skipped), dict(history.solves))
        self._generator, self._seeds = generator, generator.get_state()
        self._timeline, self._num_phases = timeline, len(timeline.noted)
        self._random = random.getstate(), np.random.get_state(), RNGState.capture(trainers[0].engine.device)

    @contextmanager
    def restored_on_error(self, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Context of what may fail: all is as it was here then.

        Args:
            unless: Asked on an error: whether it has gone too far for that.

        Yields:
            Nothing.
        """
        try:
            yield
        except BaseException:
            if not unless():
                self._restore()
            raise

    def _restore(self) -> None:
        for engine in dict.fromkeys(level.trainer.engine for level in self._levels):
            engine.recover()
        entries = [entry for level in self._levels if (entry := level.new_entry()) is not None]
        for entry in sorted(entries, key=lambda entry: entry.number, reverse=True):
            entry.put_back()
        for level in self._levels:
            level.restore()
        self._gradients.restore(self._of_gradients)
        for live, kept in zip((self._history.skipped, self._history.solves), self._counts, strict=True):
            live.clear()
            live.update(kept)
        self._generator.set_state(self._seeds)
        self._timeline.forget(self._num_phases)
        of_python, of_numpy, of_torch = self._random
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        of_torch.restore()


class _BeforeUpdates:
    """What one level holds beside weights and optimizer."""

    def __init__(self, trainer: "LevelTrainer"):
        self.trainer = trainer
        self._pass = trainer.pass_state()
        self._scaler = copy.copy(trainer.scaler)
        self._memory = {level: dict(kept) for level, kept in trainer.memory.items()}
        self._trajectory = trainer.copied_trajectory()
        if trainer.stream is not None:
            trainer.stream.mark()

    def new_entry(self) -> "StepEntry | None":
        """What a first pass since then found, if there was one."""
        entry = self.trainer.pass_state().entry
        return None if entry is self._pass.entry else entry

    def restore(self) -> None:
        """Put it back."""
        trainer = self.trainer
        trainer.restore_pass(self._pass)
        trainer.scaler = self._scaler
        trainer.memory.clear()
        trainer.memory.update(self._memory)
        trainer.trajectory = self._trajectory
        if trainer.stream is not None:
            trainer.stream.give_back()
