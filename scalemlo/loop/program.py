"""The program: levels bound to engines, and the loop that trains them."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm.auto import tqdm

from ..checkpoint import Checkpointing, load_checkpoint, save_checkpoint, saving
from ..distributed.group import any_rank, check_same_on_all_ranks, initialize, is_main_process, world_size
from ..distributed.shards import Shards
from ..distributed.watchdog import Watchdog
from ..engines import DDP, EngineSpec, ModuleView, Single
from ..graph import LevelGraph
from ..history import History
from ..hypergradients import Hypergradient
from ..level import Level
from ..memory import Memory, Phase, StateName, scheduler_of
from ..memory.phases import states_of
from .binding import bind, describe
from .gradients import NonFiniteError, SkipTick, TickGradients
from .listener import Listener
from .ticks import Ticks
from .undo import undone
from .verification import VERIFY, Verification, Verify

if TYPE_CHECKING:
    from ..planning.plan import Plan
    from .check import CheckReport

Callback = Callable[["Program", dict[str, float]], None]
"""Called after every outer iteration with the program and the record of the iteration."""


class Program:
    """A multilevel program.

    Within one outer iteration every level steps as often as its ``unroll_steps`` say. Where an upper level steps, the
    levels below step at the same tick, and all gradients and hypergradients of that tick are taken at one and the same
    point, on the same batches and with the same dropout masks as the steps, before any of them is applied.

    A level's gradient is the direct gradient of its loss plus, for every path of the graph through lower levels whose
    best response it influences, the product of the hops along it (:class:`scalemlo.hypergradients.Hypergradient`);
    sums over paths are accumulated from the bottom up, one hop per level.

    Args:
        levels: Top to bottom (see :class:`LevelGraph`).
        engine: How modules are held, unless a level says otherwise; by default :class:`Single` in one process and
            :class:`DDP` in several.
        seed: Seeds shuffling and dropout. With the same seed and the same global batches, W processes follow one.
        nonfinite: What to do when a loss, gradient or hypergradient is NaN or infinite: ``"raise"`` an error naming
            level, step and phase, or ``"skip"`` all updates of that tick and count it in ``history.skipped``.
        device: Device of this rank; by default the accelerator that ``LOCAL_RANK`` picks, else the CPU.
        phase_timeout_seconds: A run on several ranks in which one stays longer than this in one phase (a gradient, a
            solve, a step, the callbacks, a checkpoint), or between two, is ended: every rank prints where all are, and
            leaves with status 124. By default 25 minutes, before the process group gives up; None waits for ever.
        verify: When derivatives are compared with the live modules, see :mod:`.verification`: ``"first"``, at
            the first use of each level's part, after each change of mode or resume, and every ``verify_every`` outer
            steps; ``"always"``; or ``"off"``. What is off by more than rounding is an error that says what.
        verify_every: See ``verify``.
        memory: How much of its device a rank may take, as ``"70GiB"`` or :class:`scalemlo.Memory`. States that a phase
            does not need then leave the device for the host or a disk where they must, see ``docs/memory.md``; results
            are the same bit for bit. None moves nothing.

    Raises:
        ValueError: For anything that cannot work, before any training; messages name the level and the way out.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        engine: EngineSpec | None = None,
        seed: int = 0,
        nonfinite: Literal["raise", "skip"] = "raise",
        device: torch.device | None = None,
        phase_timeout_seconds: float | None = 1500.0,
        verify: Verify = "first",
        verify_every: int = 1000,
        memory: Memory | int | str | None = None,
    ):
        if verify not in VERIFY:
            raise ValueError(f"verify={verify!r} is unknown; choose one of {list(VERIFY)}.")
        if not isinstance(verify_every, int) or verify_every < 1:
            raise ValueError(f"verify_every={verify_every!r} must be an integer of at least 1.")
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"nonfinite={nonfinite!r} is unknown; choose 'raise' or 'skip'.")
        self._watchdog = Watchdog(phase_timeout_seconds)
        self.graph = LevelGraph(levels)
        self.device = initialize(device)
        check_same_on_all_ranks([line for level in self.graph.levels for line in describe(level, engine)])
        self.history = History()
        self.extra_state: dict[str, Any] = {}
        """Values of callbacks and recipes, as JSON takes them: saved with every checkpoint, put back by :meth:`load`.
        Look them up anew after a load; the same on every rank, of which rank 0's are kept."""
        self.num_steps = 0
        self._generator = torch.Generator().manual_seed(seed)
        default = engine or (Single() if world_size() == 1 else DDP())
        self.trainers = bind(self.graph, default, self.device, seed)
        below = {n: {m for m in self.graph.order if n in self.graph.ancestors(m)} for n in self.graph.order}
        self._scheduler = scheduler_of(self.trainers, self.device, below, memory)
        self._gradients = TickGradients(
            self.graph,
            self.trainers,
            self.history,
            nonfinite,
            self._watchdog,
            self._scheduler,
            Verification(verify, verify_every),
        )
        for name, trainer in self.trainers.items():
            answers = any(name in self.graph.responding(other) for other in self.graph.order)
            trainer.is_verified = answers and verify != "off"
        self._ticks = Ticks(self.graph, self.trainers, self._gradients, self._scheduler, self.history, self._generator)
        self._stop = self._is_done = False

    @property
    def listener(self) -> Listener:
        """Hears of ticks and steps; set another one to listen."""
        return self._ticks.listener

    @listener.setter
    def listener(self, listener: Listener) -> None:
        self._ticks.listener = listener

    # ---- running -------------------------------------------------------------------------------------------------
    def run(
        self,
        steps: int,
        *,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
        checkpoint: Checkpointing | None = None,
        resume: bool | str | Path = False,
    ) -> History:
        """Train for some outer iterations (steps of the top levels).

        Ctrl-C, or the SIGTERM of a scheduler that takes the machine back, ends the run after the iteration in hand, on
        all ranks, with ``history.interrupted`` set; a second Ctrl-C raises ``KeyboardInterrupt`` at once.

        Args:
            steps: Number of outer iterations; with ``resume``, those before the checkpoint included, so that the same
                call finishes what an earlier one began.
            callbacks: Called after each. One that is a context manager is entered before the first and left at the end,
                however that comes.
            progress: Whether rank 0 shows a progress bar with a loss per level.
            checkpoint: When and where to write checkpoints; see :meth:`save` for what they hold.
            resume: True goes on from the latest complete checkpoint in the folder of ``checkpoint``; a path, from the
                one there.

        Returns:
            The record of all iterations so far.

        Raises:
            ValueError: If ``steps`` is not a positive integer, there is nothing to resume from, or the folder holds
                checkpoints of another run.
        """
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} must be an integer of at least 1.")
        if resume is True:
            if checkpoint is None:
                raise ValueError("resume=True needs checkpoint=Checkpointing(folder), or give a path: resume='runs/a'.")
            resume = checkpoint.folder
        if resume is not False:
            self.load(resume)
            steps -= self.num_steps
        if checkpoint is not None:
            checkpoint.check_folder(self.num_steps)
        self._stop = self._is_done = self.history.interrupted = False
        bar = tqdm(total=max(steps, 0), disable=not (progress and is_main_process()), unit="step")
        with (
            bar,
            self._stop_on_interrupt(),
            self._watchdog.watching(),
            ExitStack() as entered,
            saving(checkpoint) as save,
        ):
            for callback in callbacks:
                if isinstance(callback, AbstractContextManager):
                    entered.enter_context(callback)
            for i in range(steps):
                record = self.step()
                bar.set_postfix({n: f"{record[f'loss/{n}']:.4g}" for n in self.graph.order if f"loss/{n}" in record})
                bar.update()
                with self._watchdog.phase(self.num_steps, "callbacks"):
                    for callback in callbacks:
                        callback(self, record)
                self.history.interrupted = any_rank(self._stop)
                is_last = self.history.interrupted or self._is_done or i == steps - 1
                if checkpoint is not None and (is_last or self.num_steps % checkpoint.every == 0):
                    with self._watchdog.phase(self.num_steps, "save checkpoint"), self._scheduler.resident():
                        save(self)
                if is_last:
                    break
        return self.history

    def stop(self) -> None:
        """End :meth:`run` after the iteration in hand; for callbacks and listeners, on every rank."""
        self._is_done = True

    def step(self) -> dict[str, float]:
        """One outer iteration.

        An error or Ctrl-C inside leaves everything as it was before the iteration, or after the last updates that it
        made; the next call takes up the work there, with the same batches and random numbers. See
        :mod:`scalemlo.loop.ticks`.

        Returns:
            Its record, see :class:`History`.
        """
        if self._ticks.is_between_iterations:
            self._gradients.outer_step, self._gradients.record = self.num_steps + 1, {}
        with self._scheduler.iteration():
            self._ticks.run()
        self.num_steps += 1
        record = {"step": float(self.num_steps)} | {k: sum(v) / len(v) for k, v in self._gradients.record.items()}
        self.history.steps.append(record)
        return record

    def gradients(self) -> dict[str, Shards]:
        """Total gradients of all levels at the last tick of an outer iteration, clipped, without taking any step.

        For inspection and tests; takes the next batch of every level. A level that is differentiated through its
        steps takes them, and they are undone; its own gradient is that after them.

        Returns:
            One vector per level: what its optimizer would be given.

        Raises:
            NonFiniteError: If a value is NaN or infinite, also under ``nonfinite="skip"``: there is no step to skip.
        """
        with self._after_unrolled_steps():
            try:
                gradients = {name: self._gradients.of(trainer)[0] for name, trainer in self.trainers.items()}
            except SkipTick as skip:
                raise NonFiniteError(str(skip)) from None
            self._gradients.clear()
        return gradients

    @contextmanager
    def _after_unrolled_steps(self) -> Iterator[None]:
        """At the last tick of an outer iteration, batches taken, for a look; the steps that it needs are undone."""
        self._ticks.require_between_iterations("gradients()")
        self._ticks.fetch(list(self.trainers.values()))
        unrolled = [t for t in self.trainers.values() if t.unrolls]
        states = [state for trainer in unrolled for state in states_of(trainer)]
        with self._scheduler.outside(), self._scheduler.resident(states), undone(unrolled):
            for trainer in unrolled:
                for position in range(trainer.level.unroll_steps):
                    if position > 0:
                        self._ticks.fetch([trainer])
                    trainer.record_step(position)
                    self._ticks.update([trainer])
            yield

    def check(self, estimators: Sequence[Hypergradient] | None = None) -> "CheckReport":
        """Compare estimators of every hop with the exact hypergradient, and derivatives with a second way to have them.

        At the point reached, on the next batches; nothing is trained, weights and states are bit for bit as before.
        Where a lower level's steps cannot be taken again (unknown optimizer, moving levels below it) only the second
        ways are compared. Costs some lower steps and one hypergradient per estimator; collective.

        Args:
            estimators: What to compare beside the program's own; by default a few of each kind.

        Returns:
            Findings, comparisons, and a verdict in words.
        """
        from .check import check_program

        self._ticks.require_between_iterations("check()")
        with self._scheduler.resident():
            return check_program(self, estimators)

    @contextmanager
    def inference(self, level: str) -> Iterator[ModuleView]:
        """A level's module for evaluation: eval mode, no gradients. Collective where the engine shards.

        Args:
            level: Name of the level.

        Yields:
            A view to call as a loss would; every rank must call it equally often.
        """
        engine = self.trainers[level].engine
        training = engine.module.training
        engine.module.eval()
        try:
            resident = self._scheduler.resident([StateName("weights", engine.name)])
            with resident, torch.no_grad(), engine.live_pass(wanted=False, last=True):
                yield self.trainers[level].view
        finally:
            engine.module.train(training)

    def state_dict(self, level: str, *, trainable_only: bool = False) -> dict[str, torch.Tensor]:
        """Full tensors of a level's module on the CPU of rank 0, empty elsewhere. Collective.

        Args:
            level: Name of the level.
            trainable_only: Whether to leave frozen parameters and buffers out.
        """
        engine = self.trainers[level].engine
        with self._scheduler.resident([StateName("weights", engine.name)]):
            return engine.full_state_dict(trainable_only=trainable_only)

    @contextmanager
    def resident(self, *levels: str) -> Iterator[None]:
        """Have the states of some levels on the device, to read or change their tensors between outer iterations.

        Within a memory budget they may be elsewhere. Tensors got inside must not be used after it.

        Args:
            *levels: Names; none for all levels, whatever the budget.

        Yields:
            Nothing.
        """
        states = [state for level in levels for state in states_of(self.trainers[level])]
        with self._scheduler.resident(states if levels else None):
            yield

    def phases(self) -> tuple[Phase, ...]:
        """What the last outer iteration consisted of, in order, and which states each phase used.

        Returns:
            The phases; the next iteration is expected to be alike.

        Raises:
            ValueError: If none has run yet.
        """
        if not self._scheduler.timeline.phases:
            raise ValueError("no outer iteration has run yet, so its phases are not known; call step() or run() first.")
        return self._scheduler.timeline.phases

    def interleaving(self) -> tuple[str, ...]:
        """What the scheduler changed about the order of levels and keeps gathered, one sentence each, and why.

        Within a memory budget the order is chosen after two outer iterations, where that moves fewer bytes, and
        weights stay gathered between passes, where every phase leaves room for them; results do not depend on it. Empty
        without a budget, before that, and where nothing is better.
        """
        return self._scheduler.choices

    def plan(
        self,
        *,
        world_size: int | None = None,
        engine: EngineSpec | None = None,
        timeout_seconds: float | None = 1800.0,
        **options: Any,
    ) -> "Plan":
        """What one outer iteration takes per rank at any world size; :func:`scalemlo.plan` does it without weights.

        Works in a fork of this process, on tensors without data, and leaves the program as it is. Not collective.

        Args:
            world_size: Number of ranks; by default, of those that run.
            engine: In the place of every level's own; :class:`Single` has no plan for several ranks.
            timeout_seconds: A fork that has no plan by then is ended, with a ``ValueError``; None waits for ever.
            **options: ``device_memory``, ``accelerator`` (by default what this rank computes on) and ``hardware`` of
                :func:`scalemlo.plan`.

        Returns:
            The plan.
        """
        from ..planning.replan import plan_of

        return plan_of(self, world_size, engine, timeout_seconds, options)

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint: ``folder/step-000123``, complete or not there. Collective, between outer iterations.

        Holds per level weights, optimizer state by parameter name, optimizer options, scheduler, loss scaler and the
        estimator's memory; of the program steps, history, ``extra_state`` and generator; of every rank random states,
        positions in the data and persistent buffers. Frozen parameters are not in it: they come from the model itself,
        and only their names, shapes and dtypes are compared when it is loaded. Each rank writes its own shards.

        Args:
            folder: Of this run's checkpoints, on a file system that all ranks share; created if needed.

        Returns:
            The folder of this one.
        """
        self._ticks.require_between_iterations("save()")
        with self._watchdog.phase(self.num_steps, "save checkpoint"), self._scheduler.resident():
            return save_checkpoint(self, folder)

    def load(self, folder: str | Path) -> Path:
        """Go on from a checkpoint. Collective.

        With the world size and engines of the run that wrote it, what follows is bit for bit what followed there.
        Others are fine too: the state is the same, sums are rounded in another order; on another world size the random
        states are not restored, and a warning says so.

        Args:
            folder: One checkpoint, or a run's folder: then the latest complete one in it.

        Returns:
            The checkpoint that was read.
        """
        with self._scheduler.resident():
            found = load_checkpoint(self, folder)
        self._ticks.start_anew()
        return found

    # ---- small things ----------------------------------------------------------------------------------------------
    @contextmanager
    def _stop_on_interrupt(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handler(signum: int, frame: Any) -> None:
            if self._stop and signum == signal.SIGINT:  # a scheduler's SIGTERM comes twice: the launcher forwards it
                raise KeyboardInterrupt
            self._stop = True

        previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, before in previous.items():
                signal.signal(number, before)
