"""The levels of a program at work: their trainers, one outer iteration after the other, and looks in between."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from ..distributed.group import check_same_on_all_ranks, initialize, world_size
from ..distributed.shards import Shards
from ..distributed.watchdog import Watchdog
from ..engines import DDP, EngineSpec, Single
from ..graph import LevelGraph
from ..history import History
from ..level import Level
from ..memory import Memory, scheduler_of
from ..memory.phases import states_of
from .binding import bind, describe
from .gradients import NonFiniteError, SkipTick, TickGradients
from .ticks import Ticks
from .undo import undone
from .verification import Verification


class Iteration:
    """What :class:`scalemlo.Program` runs, checkpoints hold, and checks and plans look into.

    Args:
        levels: Top to bottom.
        engine: Of the levels that name none; None chooses by the number of processes.
        seed: Of shuffling and dropout.
        nonfinite: ``"raise"`` or ``"skip"``.
        device: Of this rank; None chooses.
        watchdog: Is told each phase.
        verification: When derivatives are compared with the live modules.
        verifies_updates: Whether the optimizers' updates are held against what is differentiated.
        memory: Of a rank's device; None moves nothing.

    Attributes:
        graph: Who stands above whom.
        trainers: The levels at work, by name, upper ones first.
        history: What was measured.
        extra_state: Values of callbacks and recipes that checkpoints keep.
        num_steps: Outer iterations made.
        generator: Seeds of steps are drawn from it.
        gradients: Takes the gradients of a tick.
        ticks: Runs the ticks.
        scheduler: Orders phases and keeps to the memory budget.
        watchdog: Ends a run in which a rank hangs.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        engine: EngineSpec | None,
        seed: int,
        nonfinite: Literal["raise", "skip"],
        device: torch.device | None,
        watchdog: Watchdog,
        verification: Verification,
        verifies_updates: bool,
        memory: Memory | int | str | None,
    ):
        self.watchdog = watchdog
        self.graph = LevelGraph(levels)
        self.device = initialize(device)
        check_same_on_all_ranks([line for level in self.graph.levels for line in describe(level, engine)])
        self.history = History()
        self.extra_state: dict[str, Any] = {}
        self.num_steps = 0
        self.generator = torch.Generator().manual_seed(seed)
        default = engine or (Single() if world_size() == 1 else DDP())
        self.trainers = bind(self.graph, default, self.device, seed)
        below = {n: {m for m in self.graph.order if n in self.graph.ancestors(m)} for n in self.graph.order}
        self.scheduler = scheduler_of(self.trainers, self.device, below, memory)
        self.gradients = TickGradients(
            self.graph, self.trainers, self.history, nonfinite, watchdog, self.scheduler, verification
        )
        for name, trainer in self.trainers.items():
            answers = any(name in self.graph.responding(other) for other in self.graph.order)
            trainer.is_verified = answers and verifies_updates
        self.ticks = Ticks(self.graph, self.trainers, self.gradients, self.scheduler, self.history, self.generator)

    def step(self) -> dict[str, float]:
        """One outer iteration.

        An error or Ctrl-C inside leaves everything as it was before the iteration, or after the last updates that it
        made; the next call takes up the work there, with the same batches and random numbers. See
        :mod:`.ticks`.

        Returns:
            Its record, see :class:`History`.
        """
        if self.ticks.is_between_iterations:
            self.gradients.outer_step, self.gradients.record = self.num_steps + 1, {}
        with self.scheduler.iteration():
            self.ticks.run()
        self.num_steps += 1
        record = {"step": float(self.num_steps)} | {k: sum(v) / len(v) for k, v in self.gradients.record.items()}
        self.history.steps.append(record)
        return record

    def total_gradients(self) -> dict[str, Shards]:
        """Total gradients of all levels at the last tick of an outer iteration, clipped, without taking any step.

        For inspection and tests; takes the next batch of every level. A level that is differentiated through its
        steps takes them, and they are undone; its own gradient is that after them.

        Returns:
            One vector per level: what its optimizer would be given.

        Raises:
            NonFiniteError: If a value is NaN or infinite, also under ``nonfinite="skip"``: there is no step to skip.
        """
        with self.after_unrolled_steps():
            try:
                gradients = {name: self.gradients.of(trainer)[0] for name, trainer in self.trainers.items()}
            except SkipTick as skip:
                raise NonFiniteError(str(skip)) from None
            self.gradients.clear()
        return gradients

    @contextmanager
    def after_unrolled_steps(self) -> Iterator[None]:
        """Context of a look at the last tick of an outer iteration: batches are taken, and steps are undone at its end.

        Yields:
            Nothing.
        """
        self.ticks.require_between_iterations("gradients()")
        self.ticks.fetch(list(self.trainers.values()))
        unrolled = [t for t in self.trainers.values() if t.unrolls]
        states = [state for trainer in unrolled for state in states_of(trainer)]
        with self.scheduler.outside(), self.scheduler.resident(states), undone(unrolled):
            for trainer in unrolled:
                for position in range(trainer.level.unroll_steps):
                    if position > 0:
                        self.ticks.fetch([trainer])
                    trainer.record_step(position)
                    self.ticks.update([trainer])
            yield
