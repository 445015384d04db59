"""Lower levels that begin anew after every step of the levels above them: few-shot tasks, states, whole trainings."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ...loop.program import Program


class Restart:
    """A callback that puts a level back to where it began: its weights, and its optimizer without state.

    Where the level begins at a point that depends on a level above (an initialisation phi, say), train the displacement
    from that point, which begins at zero: the dependence is then part of the losses, and differentiated.

    Args:
        program: The program, before its first step. A level with a learning-rate scheduler goes on with its schedule.
        level: Name of the level.
    """

    def __init__(self, program: Program, level: str):
        self._level = level
        with program.resident(level):
            self._weights = program.trainers[level].weights().clone()

    def __call__(self, program: Program, record: Mapping[str, float]) -> None:
        """Put it back; called after every outer step."""
        trainer = program.trainers[self._level]
        with program.resident(self._level), torch.no_grad():
            for name, weight in trainer.weights().items():
                weight.copy_(self._weights[name])
            trainer.optimizer.state.clear()


class Repeated:
    """Every batch of an iterable several times in a row, for a lower level's steps on what the level above sees once.

    Args:
        batches: Iterated again and again; has to give the same batches in the same order as the level above.
        times: How often each.
    """

    def __init__(self, batches: Iterable, times: int):
        self._batches, self._times = batches, times

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            for _ in range(self._times):
                yield batch
