"""What a program does in one outer iteration, phase by phase, and which states each phase needs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from ..distributed.shards import Shards
from .owner import Owner

if TYPE_CHECKING:
    from ..engines import Engine


class StateName(NamedTuple):
    """One thing that is moved as a whole.

    ``weights`` belong to an engine, which several levels may share; the optimizer's moments, the estimator's memory (a
    second copy of the weights, a sketch, a direction) and the recorded trajectory to a level.
    """

    kind: Literal["weights", "optimizer", "memory", "trajectory"]
    owner: str

    def __str__(self) -> str:
        """For messages."""
        return f"{self.kind} of '{self.owner}'"


@dataclass(frozen=True)
class Phase:
    """One schedulable piece of an outer iteration.

    Args:
        tick: Of the outer iteration, from 1; 0 outside of one.
        level: Whose phase it is.
        name: As in ``History.phases``: ``"data"``, ``"gradient"``, ``"direct gradient"``, ``"solve"``,
            ``"hypergradient"``, ``"gradient and mixed partial"`` or ``"step"``.
        uses: States it reads or writes.
    """

    tick: int
    level: str
    name: str
    uses: tuple[StateName, ...]

    def __str__(self) -> str:
        """For messages."""
        return f"phase {self.name!r} of level {self.level!r}"


def uses_of(trainer: Owner, name: str, asking: Owner | None = None) -> tuple[StateName, ...]:
    """States that a phase of a level needs.

    Args:
        trainer: The level.
        name: Of the phase.
        asking: In a phase that runs the level's estimator, the level whose gradient is being computed.

    Returns:
        Their names, each once.
    """
    if name == "data":
        return ()
    if name == "step":
        found = [StateName("weights", trainer.engine.name), StateName("optimizer", trainer.name)]
        return (*found, StateName("trajectory", trainer.name)) if trainer.unrolls else tuple(found)
    found = _weights_read_by(trainer)
    if asking is not None:
        found.append(StateName("memory", trainer.name))
        if trainer.estimator.reads_optimizer:
            found.append(StateName("optimizer", trainer.name))
        if trainer.estimator.evaluates_upper and trainer.name in asking.depends_on:
            found += _weights_read_by(asking)
        if trainer.unrolls:
            found.append(StateName("trajectory", trainer.name))
    return tuple(dict.fromkeys(found))


def states_of(trainer: Owner) -> tuple[StateName, ...]:
    """All states of a level."""
    own = (StateName("optimizer", trainer.name), StateName("memory", trainer.name))
    return (StateName("weights", trainer.engine.name), *own, StateName("trajectory", trainer.name))


def _weights_read_by(trainer: Owner) -> list[StateName]:
    engines = dict.fromkeys([trainer.engine, *(other.engine for other in trainer.others.values())])
    return [StateName("weights", engine.name) for engine in engines]


# ---- where states lie ------------------------------------------------------------------------------------------------
def tensors_of(trainer: Owner, kind: str) -> Iterable[Tensor]:
    """The live local tensors of a state: what shares their memory moves with them.

    Args:
        trainer: The level, or any of those that share an engine.
        kind: See :class:`StateName`.

    Returns:
        Tensors, some of them perhaps views of the same memory.
    """
    if kind == "weights":
        return trainer.engine.held_tensors()
    if kind == "optimizer":
        return _local(trainer.engine, trainer.optimizer.state.values())
    if kind == "memory":
        return _local(trainer.engine, trainer.memory.values())
    return () if trainer.trajectory is None else trainer.trajectory.held_tensors()


def _local(engine: "Engine", containers: Iterable[Mapping[str, object]]) -> Iterator[Tensor]:
    with torch.no_grad():
        for container in containers:
            for value in container.values():
                if isinstance(value, Tensor):
                    yield engine.to_local(value)
                elif isinstance(value, Shards):
                    yield from value.values()


# ---- their order -----------------------------------------------------------------------------------------------------
class Timeline:
    """The phases of an outer iteration, noted as they run.

    Outer iterations are alike, so the last complete one says what comes next. Where one differs (products of another
    kind, an update that was skipped), what is expected is put right with the iteration after it.
    """

    def __init__(self) -> None:
        self.phases: tuple[Phase, ...] = ()
        """Of the last complete outer iteration."""
        self.tick = 0
        self._running: list[Phase] = []
        self._position = -1  # in `phases`, of the phase in hand or the last one

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Context of one outer iteration."""
        self._running, self._position = [], -1
        try:
            yield
            self.phases = tuple(self._running)
            self._position = len(self.phases) - 1
        finally:
            self.tick = 0

    @property
    def noted(self) -> tuple[Phase, ...]:
        """Of the outer iteration in hand, so far."""
        return tuple(self._running)

    def note(self, phase: Phase) -> None:
        """A phase begins; outside an outer iteration it is no part of the order."""
        if self.tick == 0:
            return
        self._running.append(phase)
        for distance in range(1, len(self.phases) + 1):
            if self._ahead(distance) == phase:
                self._position = (self._position + distance) % len(self.phases)
                return

    def forget(self, num_noted: int) -> None:
        """Phases beyond the first so many of the outer iteration in hand are going to run again."""
        del self._running[num_noted:]

    def next_phase(self) -> Phase | None:
        """What comes after the phase in hand that needs any state; None where it is not known."""
        ahead = (self._ahead(distance) for distance in range(1, len(self.phases) + 1))
        return next((phase for phase in ahead if phase.uses), None)

    def next_use(self, state: StateName) -> float:
        """Phases from now until a state is needed; infinite where it is not known to be."""
        distances = range(1, len(self.phases) + 1)
        return next((distance for distance in distances if state in self._ahead(distance).uses), float("inf"))

    def _ahead(self, distance: int) -> Phase:
        return self.phases[(self._position + distance) % len(self.phases)]
