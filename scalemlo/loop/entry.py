"""The state of Python from which all passes of one step of a level start."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..autodiff.python_state import PythonState
from ..engines import Engine
from ..level import Level

_NUMBERS = itertools.count()
_OF_SCALEMLO = frozenset(
    ("name", "data", "optimizer", "scheduler", "parameters", "unroll_steps", "gradient_accumulation_steps")
    + ("max_grad_norm", "hypergradient", "engine", "allow_unused", "_module", "_view", "_function", "reads_itself")
)


class StepEntry:
    """What a step of a level finds when its loss is first evaluated.

    A hypergradient evaluates the lower loss more often than plain training does. Whatever a pass leaves behind (buffers
    and attributes of the modules it runs, attributes of the level, counters its loss closes over, the states of
    Python's and numpy's random generators) it must find again when it is repeated, and the step must leave it once.

    Args:
        level: The level.
        engines: Of the modules that its loss runs.
    """

    def __init__(self, level: Level, engines: Sequence[Engine]):
        self._modules = [engine.module for engine in engines]
        self._functions: list[Callable] = [level.loss_function]
        self._level = level
        self._found = self._look()
        self.number = next(_NUMBERS)
        """Later ones have larger numbers."""

    def put_back(self) -> None:
        """What was found then is there again."""
        _put_back(self._found)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Start from it, and put back at the end what was there.

        Yields:
            Nothing.
        """
        now = self._look()
        _put_back(self._found)
        try:
            yield
        finally:
            _put_back(now)

    def _look(self) -> tuple[PythonState, Any, Any]:
        attributes = [(self._level, _OF_SCALEMLO)]
        state = PythonState.of(self._modules, self._functions, attributes)
        return state, random.getstate(), np.random.get_state()


def _put_back(found: tuple[PythonState, Any, Any]) -> None:
    state, of_python, of_numpy = found
    state.restore()
    random.setstate(of_python)
    np.random.set_state(of_numpy)
