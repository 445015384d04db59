"""One level in a running program: its batches, gradients, mixed partials and steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..autodiff.rng import seeded
from ..derivatives.ghost import GhostProducts
from ..derivatives.products import LossAt
from ..derivatives.trajectory import LevelState, RecordedStep, Trajectory
from ..derivatives.update_rules import update_rule
from ..distributed.group import all_reduce_mean_, world_size
from ..distributed.shards import Shards
from ..engines import Engine, ModuleView
from ..engines.base import ParameterBlock, StepOptions
from ..hypergradients import Hypergradient, Identity, ImplicitHypergradient, UnrollingHypergradient
from ..hypergradients.base import Method
from ..level import Level, check_loss
from ..ops import WeightedMeanTape
from .batches import BatchStream
from .entry import StepEntry
from .lending import Lender
from .optimizers import bind_optimizer, bind_scheduler
from .step_hooks import watched


@dataclass(frozen=True)
class GradientResult:
    """The loss of a level (mean over micro-batches and ranks) and its gradients by level name."""

    loss: float
    gradients: dict[str, Shards]
    reached: dict[str, set[str]]  # level name -> its parameters that the loss reaches; only of levels that were probed


@dataclass(frozen=True)
class PassState:
    """What the passes of one step have in common."""

    batches: list[Any]
    seed: int
    num_heard: int  # micro-batches that listeners have been told of
    entry: StepEntry | None  # what the first pass found
    has_run: bool  # whether a live pass has left behind what a step leaves behind


class LevelTrainer:
    """Binds a :class:`Level` to its engine, optimizer and data.

    Args:
        level: The definition.
        engine: Owns the level's module.
        names: Canonical names of the parameters the level trains.
        stream: Its batches; None where the loss reads none.
    """

    def __init__(self, level: Level, engine: Engine, names: Sequence[str], stream: BatchStream | None):
        self.level, self.name, self.engine, self.stream = level, level.name, engine, stream
        self.block = ParameterBlock(engine, tuple(names))
        self.view = ModuleView(engine)
        self.others: dict[str, LevelTrainer] = {}  # the levels that the loss names
        self.depends_on: frozenset[str] = frozenset()  # all levels that it depends on directly
        self.is_verified = False
        """Whether its update is held against what is differentiated: where a level above goes through it."""
        self.optimizer = bind_optimizer(level, self.block)
        options = StepOptions(level.name, level.max_grad_norm, level.gradient_accumulation_steps)
        engine.spec.check_options(options, self.optimizer)
        engine.adopt(self.optimizer)
        self.scheduler = bind_scheduler(level, self.optimizer)
        self.estimator: Hypergradient = level.hypergradient or Identity()
        self.scaler = engine.spec.loss_scaler()
        self.num_steps = 0
        self.batches: list[Any] = []
        self.memory: dict[str, dict[str, Any]] = {}  # of the estimator, by the level that asks
        self.trajectory: Trajectory | None = None  # the steps since the levels above moved, where an estimator asks
        self.on_micro_batch: Callable[[str], None] = lambda level: None  # see :class:`scalemlo.loop.listener.Listener`
        self._num_heard = 0  # micro-batches of this step that it has been told of
        self._entry: StepEntry | None = None  # what the first pass of this step found
        self._has_run = False  # whether a live pass of this step has left behind what a step leaves behind
        self._seed = 0
        self._lender = Lender(self.name)
        self._groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}

    # ---- what an estimator may ask, see :class:`.lower_level.LowerLevel` --------------------------------------------
    def weights(self) -> Shards:
        """Local weights of the level."""
        return self.block.shards()

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        """State of one parameter as local shards."""
        state = self.optimizer.state.get(self.engine.parameters[name], {})
        local = {key: self.engine.to_local(t) if isinstance(t, Tensor) else t for key, t in state.items()}
        for key, t in local.items():
            if isinstance(t, Tensor) and t.numel() and not t.untyped_storage().nbytes():
                raise ValueError(
                    f"level {self.name!r}: {key!r} of its optimizer is off the device, to keep to the program's memory "
                    "budget. Read it inside `with program.resident(level):`; an estimator that does must say "
                    "reads_optimizer = True."
                )
        return local

    def parameter_group(self, name: str) -> Mapping[str, Any]:
        """The parameter group that holds a parameter."""
        return self._groups[id(self.engine.parameters[name])]

    # ---- passes --------------------------------------------------------------------------------------------------
    def fetch(self, seed: int) -> None:
        """Take the batches of the next step.

        Args:
            seed: Every pass until the next fetch draws its random numbers (dropout masks) from it, micro-batch after
                micro-batch, so that the hypergradient is that of the very loss the step follows. Differs by rank.
        """
        self.batches = (
            [self.stream.next() for _ in range(self.level.gradient_accumulation_steps)] if self.stream else [None]
        )
        self._seed, self._num_heard = seed, 0
        self._entry, self._has_run = None, False

    def evaluate(self, batch: Any) -> Tensor:
        """This rank's loss on one micro-batch, modules seen through their views."""
        views = {name: other.view for name, other in self.others.items()}
        self.level._view = self.view
        try:
            with self._lender.lent(batch) as lent:
                arguments = {"batch": lent, **views} if self.stream else views
                return check_loss(self.level.run_loss(arguments), self.name)
        except Exception as error:
            error.add_note(f"in the loss of level {self.name!r}")
            raise
        finally:
            self.level._view = None

    def compute_gradient(
        self,
        wanted: Sequence["LevelTrainer"],
        probe: Sequence["LevelTrainer"] = (),
        ghost: GhostProducts | None = None,
        evaluate: Callable[[Any], Tensor] | None = None,
    ) -> GradientResult:
        """Gradient of this level's loss by the parameters of some levels, without a step.

        Args:
            wanted: Levels whose gradients are returned (mean over ranks and micro-batches).
            probe: Levels for which it is only noted which of their parameters the loss reaches.
            ghost: If given, ``wanted`` are this level and upper ones; what is returned for the upper ones is not the
                gradient of the loss but the mixed partial with the direction of ``ghost``, from the same pass.
            evaluate: In the place of :meth:`evaluate`: this rank's loss on one micro-batch.

        Returns:
            Loss, gradients, reached parameters.
        """
        engines = self._engines()
        kept = {t.engine for t in (*wanted, *probe)}
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        with seeded(self._seed, self.engine.device), self._leaving_one_trace():
            for i, batch in enumerate(self.batches):
                with ExitStack() as stack:
                    for engine in engines:
                        last = i == len(self.batches) - 1
                        stack.enter_context(engine.live_pass(wanted=engine in kept, last=last))
                    scale = self.scaler.scale / len(self.batches)
                    if ghost is None:
                        loss = (evaluate or self.evaluate)(batch)
                        self._backward(loss, scale, engines)
                    else:
                        with ghost.listening():
                            loss = self.evaluate(batch)
                        ghost.check(loss)
                        self._backward(loss, scale, [self.engine])
                        self._backward(ghost.upper_loss(scale), scale, [e for e in engines if e is not self.engine])
                total += loss.detach() / len(self.batches)
                if self._num_heard == i < len(self.batches) - 1:  # a step may take several passes: the first is told
                    self._num_heard += 1
                    self.on_micro_batch(self.name)
        reached, gradients = {}, {}
        for trainer in (*wanted, *probe):
            taken = trainer.engine.take_gradients(trainer.block.names)
            reached[trainer.name] = {n for n, g in taken.items() if g is not None}
            if trainer in wanted:
                gradients[trainer.name] = trainer.block.vector(taken)
                if self.scaler.scale != 1.0:
                    gradients[trainer.name].mul_(1 / self.scaler.scale)
        for engine in engines:
            engine.clear_gradients()
        return GradientResult(float(all_reduce_mean_(total)), gradients, reached)

    def product_of_examples(self, v: Shards, factors: Tensor) -> float:
        """``sum_i r_i <grad l_i, v>`` over all ranks, by one backward pass of the live module: any kernel.

        For losses that are one :func:`scalemlo.weighted_mean`. Collective.

        Args:
            v: Direction.
            factors: r_i, ``[B]``, of this rank's examples in the first micro-batch.

        Returns:
            The sum.
        """
        engines, tape = self._engines(), WeightedMeanTape()
        with seeded(self._seed, self.engine.device), self._leaving_one_trace(), ExitStack() as stack:
            for engine in engines:
                stack.enter_context(engine.live_pass(wanted=engine is self.engine, last=True))
            with tape.recording():
                self.evaluate(self.batches[0])
            assert tape.losses is not None, "the caller has seen one"
            self._backward((tape.losses * factors.to(tape.losses)).sum(), self.scaler.scale, [self.engine])
        taken = self.engine.take_gradients(self.block.names)
        for engine in engines:
            engine.clear_gradients()
        return float(self.block.vector(taken).dot(v)) * world_size() / self.scaler.scale

    @property
    def entry(self) -> StepEntry:
        """What the first pass of this step found; every other one starts from it."""
        if self._entry is None:
            self._entry = StepEntry(self.level, self._engines())
        return self._entry

    @contextmanager
    def _leaving_one_trace(self) -> Iterator[None]:
        """Context of a live pass: the first of a step leaves behind what it does, others leave nothing.

        A pass that ends in an error, as where ghost products turn out not to apply, was none.
        """
        entry = self.entry
        with entry.replayed() if self._has_run else nullcontext():
            try:
                yield
            except BaseException:
                entry.put_back()
                raise
        self._has_run = True

    def _backward(self, loss: Tensor, scale: float, engines: Sequence[Engine]) -> None:
        for engine in engines:
            loss = engine.watch_loss(loss)
        if loss.requires_grad:
            (loss * scale).backward()

    def compute_mixed(
        self, v: Shards, uppers: Sequence["LevelTrainer"], method: Method | None = None
    ) -> dict[str, Shards]:
        """``d/dlambda <dL/dw, v>`` for several upper levels: mean over all micro-batches and ranks, same masks.

        Args:
            v: Direction.
            uppers: The levels of the parameters lambda.
            method: Overrides the estimator's.

        Returns:
            One vector per upper level.
        """
        blocks = {t.name: t.block for t in uppers}
        if method is None:
            assert isinstance(self.estimator, ImplicitHypergradient), "the others take no mixed partial of this form"
            method = self.estimator.mixed
        if method == "finite_difference":
            return self.loss_at().directional_outputs(self.block, v, blocks)
        return self.loss_at().tangents([(self.block, v)], blocks)

    def loss_at(self) -> LossAt:
        """The level's loss on the batches of its next step, to be differentiated on the modules' skeletons."""
        engines = self._engines()
        return LossAt(
            self.evaluate,
            self.batches,
            self._seed,
            engines,
            self.engine,
            scale=self.scaler.scale,
            entry=self.entry,
        )

    def clip(self, gradient: Shards) -> tuple[Shards, float, float]:
        """Scale a gradient to the level's ``max_grad_norm``.

        Returns:
            The gradient (scaled in place), the factor it was multiplied with, and its norm before.
        """
        norm = float(gradient.norm())
        limit = self.level.max_grad_norm
        factor = min(1.0, limit / (norm + 1e-6)) if limit is not None else 1.0
        return (gradient.mul_(factor) if factor < 1.0 else gradient), factor, norm

    @property
    def unrolls(self) -> bool:
        """Whether the estimator goes through the level's steps, see :attr:`Hypergradient.unrolls`."""
        return self.estimator.unrolls

    def record_step(self, position: int) -> None:
        """Begin or go on recording, before a step.

        Args:
            position: Steps of the level before this one; a multiple of ``unroll_steps`` where levels above may have
                moved since the last one.
        """
        unroll_steps = self.level.unroll_steps
        assert isinstance(self.estimator, UnrollingHypergradient)
        num_steps = self.estimator.steps_of(unroll_steps, self.name)
        if position % unroll_steps == 0:
            self.trajectory = None
        if position % unroll_steps == unroll_steps - num_steps:
            self.trajectory = Trajectory(num_steps, self.engine.shards_device)

    def step(self, gradient: Shards) -> None:
        """One step of the optimizer and of the learning-rate scheduler."""
        if self.trajectory is not None:
            self.trajectory.record(self._recorded_step(), self.state)
        self.engine.put_gradients(gradient)
        with watched(self.optimizer, self.name) if self.is_verified else nullcontext():
            self.optimizer.step()
        self.engine.clear_gradients()
        if self.scheduler is not None:
            self.scheduler.step()
        self.num_steps += 1

    def state(self) -> LevelState:
        """Weights and optimizer state as they are now; aliases the live tensors."""
        return LevelState.of(self.weights(), {name: self.optimizer_state(name) for name in self.block.names})

    def _recorded_step(self) -> RecordedStep:
        groups = {name: self.parameter_group(name) for name in self.block.names}
        rule = update_rule(self.optimizer, self.name)
        return RecordedStep.of(self.loss_at(), self.block, groups, self.level.max_grad_norm, rule)

    # ---- for going back to it ------------------------------------------------------------------------------------
    def pass_state(self) -> PassState:
        """What the passes of the step in hand have in common."""
        return PassState(self.batches, self._seed, self._num_heard, self._entry, self._has_run)

    def restore_pass(self, state: PassState) -> None:
        """Put it back."""
        self.batches, self._seed, self._num_heard = state.batches, state.seed, state.num_heard
        self._entry, self._has_run = state.entry, state.has_run

    def copied_trajectory(self) -> Trajectory | None:
        """The trajectory as far as it goes now; it shares the states that are kept."""
        return None if self.trajectory is None else self.trajectory.copied()

    def _engines(self) -> list[Engine]:
        return list(dict.fromkeys([self.engine, *(t.engine for t in self.others.values())]))
