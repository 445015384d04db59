"""The ticks of an outer iteration, each of which runs as a whole or leaves nothing behind.

An error or Ctrl-C may come anywhere: in a loss, in the middle of a backward pass, between two micro-batches. What a
tick changes before its updates (gradients, trajectories, random states, positions in the data, what forward passes left
in modules, the scaler, the estimators' memory) is put back then as it was at the last :class:`Savepoint`, and the next
call goes on from there. Weights and optimizer states change in updates alone, and those are not cut in two: Ctrl-C
waits for them, and one that fails before it has changed anything is taken again. Only an optimizer that fails half way
through its step leaves a program that must be loaded from a checkpoint, and says so.
"""

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..distributed.group import rank
from ..graph import LevelGraph
from ..history import History
from ..memory import Scheduler
from .gradients import SkipTick, TickGradients
from .level_trainer import LevelTrainer
from .listener import Listener
from .undo import Savepoint

IMPATIENT = 3
"""So many times Ctrl-C within one update, and it is not waited for."""


class Ticks:
    """Runs the ticks of outer iterations.

    Args:
        graph: The levels.
        trainers: By name.
        gradients: Of all levels.
        scheduler: Orders them.
        history: Skipped updates are noted there.
        generator: Seeds are drawn from it.
    """

    def __init__(
        self,
        graph: LevelGraph,
        trainers: Mapping[str, LevelTrainer],
        gradients: TickGradients,
        scheduler: Scheduler,
        history: History,
        generator: torch.Generator,
    ):
        self.listener = Listener()
        self._graph, self._trainers, self._gradients, self._scheduler = graph, trainers, gradients, scheduler
        self._history, self._generator = history, generator
        self.start_anew()

    def start_anew(self) -> None:
        """Forget what an interrupted iteration has left to do: the program was loaded."""
        self._tick = 1  # the next to run
        self._parts: list[_Part] | None = None  # of a tick that has begun, what is left to do
        self._torn: str | None = None  # why the program is in no state to go on from

    @property
    def is_between_iterations(self) -> bool:
        """Whether no iteration has made some of its updates and not the others."""
        return self._tick == 1 and self._parts is None and self._torn is None

    def require_between_iterations(self, what: str) -> None:
        """Refuse what makes sense only between two outer iterations.

        Args:
            what: It.

        Raises:
            ValueError: Where an error has ended an iteration after some of its updates.
        """
        self._require_whole()
        if not self.is_between_iterations:
            raise ValueError(
                f"{what} is for between two outer iterations, and an error ended step {self._gradients.outer_step} "
                "after some of its updates. Call step() to finish it, or load() to go back to a checkpoint."
            )

    def run(self) -> None:
        """All ticks of one outer iteration; of one that an error has ended, those that are left."""
        self._require_whole()
        while self._tick <= self._graph.ticks_per_step:
            self._scheduler.timeline.tick = self._tick
            if self._parts is None:
                self._begin()
            assert self._parts is not None
            while self._parts:
                self._run_part(self._parts[0], self._savepoint())
            self._parts = None
            self._tick += 1
            self.listener.on_tick_end()
        self._tick = 1

    def fetch(self, trainers: Sequence[LevelTrainer]) -> None:
        """Take the batches of a step of some levels, and forget gradients on earlier ones."""
        for trainer in trainers:
            trainer.on_micro_batch = self.listener.on_micro_batch
            seed = int(torch.randint(2**48, (), generator=self._generator)) + rank()
            with self._gradients.phase(trainer, "data"):
                trainer.fetch(seed)
        self._gradients.clear()

    def update(self, trainers: Sequence[LevelTrainer]) -> None:
        """Take all gradients of some levels, then all their steps; or none where one is not finite."""
        if self._take_gradients(trainers):
            part = _Part(trainers)
            self._take_steps(part)
            self._tell_of_steps(part)

    def _begin(self) -> None:
        """Up to the first updates of a tick: levels that are differentiated through their steps make them first."""
        tick, savepoint = self._tick, self._savepoint()
        stepping = [self._trainers[n] for n in self._graph.order if tick % self._graph.period(n) == 0]
        first = [t for t in stepping if t.unrolls]
        parts = [_Part(part) for part in (first, [t for t in stepping if not t.unrolls]) if part]
        with savepoint.restored_on_error():
            self.listener.on_tick_begin()
            self.fetch(stepping)
            for trainer in first:
                trainer.record_step(tick // self._graph.period(trainer.name) - 1)
        self._parts, part = parts, parts[0]
        try:
            self._run_part(part, savepoint)
        finally:
            if not (part.is_done or part.has_stepped):
                self._parts = None

    def _run_part(self, part: "_Part", savepoint: Savepoint) -> None:
        """Gradients and steps of some levels: neither, or both."""
        with savepoint.restored_on_error(unless=lambda: part.has_stepped):
            if not part.has_stepped and not self._take_gradients(part.trainers):
                part.skip()
            self._take_steps(part)
        assert self._parts is not None and self._parts[0] is part
        del self._parts[0]
        self._tell_of_steps(part)

    def _take_gradients(self, trainers: Sequence[LevelTrainer]) -> bool:
        """All gradients of some levels; False where one is not finite and their updates are to be left out."""
        try:
            for trainer in self._scheduler.in_order("gradients", trainers):
                self._gradients.of(trainer)
        except SkipTick as skip:
            if skip.key is not None:
                self._history.skipped[skip.key] = self._history.skipped.get(skip.key, 0) + 1
            self._gradients.clear()
            return False
        self._gradients.check_reached(trainers)
        for trainer in trainers:
            loss, norm = (self._gradients.record[f"{key}/{trainer.name}"][-1] for key in ("loss", "gradient_norm"))
            through = bool(self._graph.depends_on_best_responses(trainer.name))
            self.listener.on_level_gradient(trainer.name, loss, norm, through)
        return True

    def _take_steps(self, part: "_Part") -> None:
        with interrupts_held():
            for trainer in self._scheduler.in_order("steps", tuple(part.left)):
                with self._gradients.phase(trainer, "step"), self._or_torn(trainer):
                    trainer.step(self._gradients.found(trainer.name))
                self._gradients.drop(trainer.name)
                self._gradients.note(f"lr/{trainer.name}", float(trainer.optimizer.param_groups[0]["lr"]))
                part.left.remove(trainer)

    def _tell_of_steps(self, part: "_Part") -> None:
        for trainer in part.trainers if part.has_stepped else ():
            self.listener.on_level_step(trainer.name, self._gradients.record[f"loss/{trainer.name}"][-1])

    @contextmanager
    def _or_torn(self, trainer: LevelTrainer) -> Iterator[None]:
        """A step that fails has changed nothing, or the program is torn."""
        before, trajectory = _versions(trainer), trainer.copied_trajectory()
        try:
            yield
        except BaseException as error:
            trainer.engine.recover()
            trainer.trajectory = trajectory
            if _versions(trainer) != before:
                what = f"{type(error).__name__}: {error}"
                self._torn = (
                    f"the optimizer of level {trainer.name!r} failed half way through step "
                    f"{self._gradients.outer_step} ({what}): its weights are neither those before the step nor those "
                    "after it. Call load() to go back to a checkpoint."
                )
                error.add_note(self._torn)
            raise

    def _require_whole(self) -> None:
        if self._torn is not None:
            raise RuntimeError(self._torn)

    def _savepoint(self) -> Savepoint:
        return Savepoint(
            list(self._trainers.values()), self._gradients, self._history, self._generator, self._scheduler.timeline
        )


class _Part:
    """Levels whose gradients are taken at one point, before any of them steps."""

    def __init__(self, trainers: Sequence[LevelTrainer]):
        self.trainers: tuple[LevelTrainer, ...] = tuple(trainers)
        self.left = list(trainers)
        """Those that have not stepped yet."""

    def skip(self) -> None:
        """None of them is going to step."""
        self.trainers, self.left = (), []

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return not self.left

    @property
    def has_stepped(self) -> bool:
        """Whether a level has."""
        return 0 < len(self.trainers) - len(self.left)


def _versions(trainer: LevelTrainer) -> list[Any]:
    """What differs once an optimizer has changed a weight or its state."""
    found: list[Any] = [t._version for t in trainer.weights().values()]
    for name in trainer.block.names:
        state = trainer.optimizer_state(name)
        found += [(key, x._version if isinstance(x, Tensor) else repr(x)) for key, x in state.items()]
    return found


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C inside takes effect at the end; at once only if it comes again and again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def hold(signum: int, frame: Any) -> None:
        came.append(signum)
        if len(came) >= IMPATIENT:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    for signum in came:
        signal.raise_signal(signum)
