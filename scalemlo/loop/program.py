"""The program: levels bound to engines, and the loop that trains them."""

import difflib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import torch
from tqdm.auto import tqdm

from ..checkpoint import Checkpointing, load_checkpoint, save_checkpoint, saving
from ..distributed.group import any_rank, is_main_process
from ..distributed.shards import Shards
from ..distributed.watchdog import Watchdog
from ..engines import EngineSpec, ModuleView, engine_of
from ..graph import LevelGraph
from ..history import History
from ..level import Level
from ..memory import Memory, Phase, StateName
from ..memory.phases import states_of
from .iteration import Iteration
from .level_trainer import LevelTrainer
from .listener import Listener
from .summary import table_of
from .verification import VERIFY, Verification, Verify

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
            :class:`DDP` in several. Also by name: ``"fsdp"``, ``"zero3"``.
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
        engine: EngineSpec | str | None = None,
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
        self.iteration = Iteration(
            levels,
            engine=None if engine is None else engine_of(engine),
            seed=seed,
            nonfinite=nonfinite,
            device=device,
            watchdog=Watchdog(phase_timeout_seconds),
            verification=Verification(verify, verify_every),
            verifies_updates=verify != "off",
            memory=memory,
        )
        self._stop = self._is_done = False

    # ---- what there is ---------------------------------------------------------------------------------------------
    @property
    def levels(self) -> list[Level]:
        """The levels, upper ones first."""
        return self.graph.levels

    def __getitem__(self, name: str) -> Level:
        for level in self.levels:
            if level.name == name:
                return level
        close = difflib.get_close_matches(name, self.trainers, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise KeyError(f"there is no level {name!r}; levels are {list(self.trainers)}.{hint}")

    def __iter__(self) -> Iterator[Level]:
        return iter(self.levels)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.trainers)

    def __repr__(self) -> str:
        return f"Program, after {self.num_steps} outer iterations, on {self.device}:\n{table_of(self.iteration)}"

    @property
    def graph(self) -> LevelGraph:
        """Who stands above whom, and which gradient passes through which level."""
        return self.iteration.graph

    @property
    def trainers(self) -> dict[str, LevelTrainer]:
        """The levels at work, by name, upper ones first."""
        return self.iteration.trainers

    @property
    def history(self) -> History:
        """What was measured so far."""
        return self.iteration.history

    @property
    def num_steps(self) -> int:
        """Outer iterations made so far."""
        return self.iteration.num_steps

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return self.iteration.device

    @property
    def extra_state(self) -> dict[str, Any]:
        """Values of callbacks and recipes, as JSON takes them: saved with every checkpoint, put back by :meth:`load`.

        Look them up anew after a load; the same on every rank, of which rank 0's are kept.
        """
        return self.iteration.extra_state

    @property
    def listener(self) -> Listener:
        """Hears of ticks and steps; set another one to listen."""
        return self.iteration.ticks.listener

    @listener.setter
    def listener(self, listener: Listener) -> None:
        self.iteration.ticks.listener = listener

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
            self.iteration.watchdog.watching(),
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
                with self.iteration.watchdog.phase(self.num_steps, "callbacks"):
                    for callback in callbacks:
                        callback(self, record)
                self.history.interrupted = any_rank(self._stop)
                is_last = self.history.interrupted or self._is_done or i == steps - 1
                if checkpoint is not None and (is_last or self.num_steps % checkpoint.every == 0):
                    with self._saving():
                        save(self.iteration)
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
        return self.iteration.step()

    def gradients(self) -> dict[str, Shards]:
        """Total gradients of all levels at the last tick of an outer iteration, clipped, without taking any step.

        For inspection and tests; takes the next batch of every level. A level that is differentiated through its
        steps takes them, and they are undone; its own gradient is that after them. A value that is NaN or infinite
        raises :class:`NonFiniteError`, also under ``nonfinite="skip"``: there is no step to skip.

        Returns:
            One vector per level: what its optimizer would be given.
        """
        return self.iteration.total_gradients()

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
            resident = self.iteration.scheduler.resident([StateName("weights", engine.name)])
            with resident, torch.no_grad(), engine.live_pass(wanted=False, last=True):
                yield self.trainers[level].view
        finally:
            engine.module.train(training)

    @overload
    def state_dict(self, level: str, *, trainable_only: bool = False) -> dict[str, torch.Tensor]: ...

    @overload
    def state_dict(self, level: None = None, *, trainable_only: bool = False) -> dict[str, dict[str, torch.Tensor]]: ...

    def state_dict(self, level: str | None = None, *, trainable_only: bool = False) -> dict[str, Any]:
        """Full tensors of a level's module on the CPU of rank 0, empty elsewhere. Collective.

        Args:
            level: Name of the level; without one, those of all levels are returned, by the level's name.
            trainable_only: Whether to leave frozen parameters and buffers out.
        """
        if level is None:
            return {name: self.state_dict(name, trainable_only=trainable_only) for name in self.trainers}
        engine = self.trainers[level].engine
        with self.iteration.scheduler.resident([StateName("weights", engine.name)]):
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
        with self.iteration.scheduler.resident(states if levels else None):
            yield

    def phases(self) -> tuple[Phase, ...]:
        """What the last outer iteration consisted of, in order, and which states each phase used.

        Returns:
            The phases; the next iteration is expected to be alike.

        Raises:
            ValueError: If none has run yet.
        """
        if not self.iteration.scheduler.timeline.phases:
            raise ValueError("no outer iteration has run yet, so its phases are not known; call step() or run() first.")
        return self.iteration.scheduler.timeline.phases

    def interleaving(self) -> tuple[str, ...]:
        """What the scheduler changed about the order of levels and keeps gathered, one sentence each, and why.

        Within a memory budget the order is chosen after two outer iterations, where that moves fewer bytes, and
        weights stay gathered between passes, where every phase leaves room for them; results do not depend on it. Empty
        without a budget, before that, and where nothing is better.
        """
        return self.iteration.scheduler.choices

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
        self.iteration.ticks.require_between_iterations("save()")
        with self._saving():
            return save_checkpoint(self.iteration, folder)

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
        with self.iteration.scheduler.resident():
            found = load_checkpoint(self.iteration, folder)
        self.iteration.ticks.start_anew()
        return found

    @contextmanager
    def _saving(self) -> Iterator[None]:
        watched = self.iteration.watchdog.phase(self.num_steps, "save checkpoint")
        with watched, self.iteration.scheduler.resident():
            yield

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
