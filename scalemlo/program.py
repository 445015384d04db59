"""The program: levels bound to engines, and the loop that trains them."""

import logging
import math
import signal
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from .data import BatchStream
from .distributed import any_rank, check_same_on_all_ranks, initialize, is_main_process, rank, world_size
from .engines import DDP, Engine, EngineSpec, ModuleView, Single
from .graph import LevelGraph
from .hypergradients import Hypergradient, ImplicitHypergradient, Result, UnrollingHypergradient
from .level import Level
from .second_order.errors import DerivativeError
from .second_order.ghost import TOLERANCE, GhostProducts, disagreement, relative_difference
from .shards import Shards
from .tracking import History
from .training import GradientResult, LevelTrainer, optimizer_parameter_names, swap_parameters
from .undo import undone
from .update_rules import update_rule

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from .check import CheckReport

Callback = Callable[["Program", dict[str, float]], None]
"""Called after every outer iteration with the program and the record of the iteration."""


class NonFiniteError(RuntimeError):
    """A loss, gradient or hypergradient is NaN or infinite."""


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
    ):
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"nonfinite={nonfinite!r} is unknown; choose 'raise' or 'skip'.")
        self.graph = LevelGraph(levels)
        self.device = initialize(device)
        check_same_on_all_ranks([line for level in self.graph.levels for line in _description(level, engine)])
        self.nonfinite = nonfinite
        self.history = History()
        self.num_steps = 0
        self._generator = torch.Generator().manual_seed(seed)
        default = engine or (Single() if world_size() == 1 else DDP())
        self.trainers = self._bind(default, seed)
        self._reached: dict[str, set[str]] = {level.name: set() for level in levels}
        self._probed: set[str] = set()
        self._verified: set[str] = set()  # levels whose ghost products have been compared with the forward derivative
        self._without_products: dict[str, str] = {}  # why levels that leave it open take the forward derivative
        self._gradients: dict[str, tuple[Shards, float]] = {}
        self._pulls: dict[str, list[Shards]] = {}  # on lower levels at this tick, of estimators that change their loss
        self._record: dict[str, list[float]] = {}
        self._stop = False

    # ---- running -------------------------------------------------------------------------------------------------
    def run(self, steps: int, *, callbacks: Sequence[Callback] = (), progress: bool = True) -> History:
        """Train for some outer iterations (steps of the top levels).

        Ctrl-C ends the run after the iteration in hand, on all ranks, with ``history.interrupted`` set; a second one
        raises ``KeyboardInterrupt`` at once.

        Args:
            steps: Number of outer iterations.
            callbacks: Called after each.
            progress: Whether rank 0 shows a progress bar with a loss per level.

        Returns:
            The record of all iterations so far.

        Raises:
            ValueError: If ``steps`` is not a positive integer.
        """
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} must be an integer of at least 1.")
        self._stop = self.history.interrupted = False
        bar = tqdm(total=steps, disable=not (progress and is_main_process()), unit="step")
        with bar, self._stop_on_interrupt():
            for _ in range(steps):
                record = self.step()
                bar.set_postfix({n: f"{record[f'loss/{n}']:.4g}" for n in self.graph.order if f"loss/{n}" in record})
                bar.update()
                for callback in callbacks:
                    callback(self, record)
                if any_rank(self._stop):
                    self.history.interrupted = True
                    break
        return self.history

    def step(self) -> dict[str, float]:
        """One outer iteration.

        Returns:
            Its record, see :class:`History`.
        """
        self._record = {}
        for tick in range(1, self.graph.ticks_per_step + 1):
            self._tick(tick)
        self.num_steps += 1
        record = {"step": float(self.num_steps)} | {k: sum(v) / len(v) for k, v in self._record.items()}
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
                for trainer in self.trainers.values():
                    self._gradient(trainer)
            except _SkipTick as skip:
                raise NonFiniteError(str(skip)) from None
            gradients = {name: gradient for name, (gradient, _) in self._gradients.items()}
            self._gradients = {}
        return gradients

    @contextmanager
    def _after_unrolled_steps(self) -> Iterator[None]:
        """At the last tick of an outer iteration, batches taken, for a look; the steps that it needs are undone."""
        self._fetch(list(self.trainers.values()))
        unrolled = [t for t in self.trainers.values() if t.unrolls]
        with undone(unrolled):
            for trainer in unrolled:
                for position in range(trainer.level.unroll_steps):
                    if position > 0:
                        self._fetch([trainer])
                    trainer.record_step(position)
                    self._update([trainer])
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
            with torch.no_grad(), engine.live_pass(wanted=False, last=True):
                yield self.trainers[level].view
        finally:
            engine.module.train(training)

    def state_dict(self, level: str, *, trainable_only: bool = False) -> dict[str, torch.Tensor]:
        """Full tensors of a level's module on the CPU of rank 0, empty elsewhere. Collective.

        Args:
            level: Name of the level.
            trainable_only: Whether to leave frozen parameters and buffers out.
        """
        return self.trainers[level].engine.full_state_dict(trainable_only=trainable_only)

    # ---- one tick ------------------------------------------------------------------------------------------------
    def _tick(self, tick: int) -> None:
        stepping = [self.trainers[n] for n in self.graph.order if tick % self.graph.period(n) == 0]
        self._fetch(stepping)
        first = [t for t in stepping if t.unrolls]
        for trainer in first:
            trainer.record_step(tick // self.graph.period(trainer.name) - 1)
        self._update(first)
        self._update([t for t in stepping if not t.unrolls])

    def _update(self, trainers: Sequence[LevelTrainer]) -> None:
        """Take all gradients of some levels, then all their steps; or none where one is not finite."""
        try:
            for trainer in trainers:
                self._gradient(trainer)
        except _SkipTick as skip:
            if skip.key is not None:
                self.history.skipped[skip.key] = self.history.skipped.get(skip.key, 0) + 1
            self._gradients = {}
            return
        self._check_reached(trainers)
        for trainer in trainers:
            with self._phase(trainer, "step"):
                trainer.step(self._gradients.pop(trainer.name)[0])
            self._note(f"lr/{trainer.name}", float(trainer.optimizer.param_groups[0]["lr"]))

    def _fetch(self, trainers: Sequence[LevelTrainer]) -> None:
        for trainer in trainers:
            seed = int(torch.randint(2**48, (), generator=self._generator)) + rank()
            with self._phase(trainer, "data"):
                trainer.fetch(seed)
        self._gradients, self._pulls = {}, {}

    def _gradient(self, trainer: LevelTrainer) -> tuple[Shards, float]:
        """The clipped total gradient of a level at this tick, computed once, and its clipping factor."""
        name = trainer.name
        if name not in self._gradients:
            through = self.graph.depends_on_best_responses(name)
            loss, total = self._hypergradient(trainer) if through else self._plain_gradient(trainer)
            self._keep_gradient(trainer, loss, total, "hypergradient" if through else "gradient")
        return self._gradients[name]

    def _keep_gradient(self, trainer: LevelTrainer, loss: float, total: Shards, phase: str) -> None:
        clipped, factor, norm = trainer.clip(total)
        if phase == "hypergradient" and not math.isfinite(norm):
            self._blame_lower(trainer.name)
        self._check_finite(norm, trainer, phase)
        trainer.scaler.update(overflowed=False)
        self._note(f"loss/{trainer.name}", loss)
        self._note(f"gradient_norm/{trainer.name}", norm)
        self._gradients[trainer.name] = clipped, factor

    def _plain_gradient(self, trainer: LevelTrainer) -> tuple[float, Shards]:
        probe = self._to_probe(trainer)
        with self._phase(trainer, "gradient"):
            result = trainer.compute_gradient([trainer], probe)
        return result.loss, self._checked_gradient(trainer, result)

    def _checked_gradient(self, trainer: LevelTrainer, result: GradientResult) -> Shards:
        self._note_reached(trainer, result.reached)  # also of a step that is skipped: levels are probed once
        self._check_finite(result.loss, trainer, "loss")
        missing = [n for n in trainer.block.names if n not in result.reached[trainer.name]]
        if missing and not trainer.level.allow_unused:
            raise ValueError(
                f"level {trainer.name!r}: its loss gives no gradient to {missing[:5]} ({len(missing)} parameter(s)). "
                "Freeze them with requires_grad_(False), select others with `parameters`, or set allow_unused=True "
                "where some batches leave parameters out."
            )
        gradient = result.gradients[trainer.name]
        for pull in self._pulls.pop(trainer.name, ()):
            gradient.add_(pull)
        return gradient

    def _hypergradient(self, trainer: LevelTrainer) -> tuple[float, Shards]:
        """Reverse accumulation over the levels below: each is solved once, whatever the number of paths."""
        name = trainer.name
        dependent = [n for n in self.graph.order if name in self.graph.ancestors(n)]
        wanted = [trainer, *(self.trainers[n] for n in self.graph.lowers(name) if n in dependent)]
        for lower in (self.trainers[n] for n in dependent):
            if lower.estimator.needs_gradient:
                self._gradient(lower)
        with self._phase(trainer, "direct gradient"):
            result = trainer.compute_gradient(wanted, self._to_probe(trainer))
        self._note_reached(trainer, result.reached)
        self._check_finite(result.loss, trainer, "loss")
        for lower in wanted[1:]:
            if not result.reached[lower.name] and lower.estimator.differentiates_upper:
                raise ValueError(
                    f"level {name!r}: its loss reads {lower.name!r}, but no gradient reaches that level's parameters, "
                    "so the hypergradient through it would be zero. If what it computes has no derivative, use "
                    f"ZerothOrder() or Reinforce() as the hypergradient of {lower.name!r}; if it stands behind "
                    "detach() or no_grad(), take it out from there."
                )
        for lower in (self.trainers[n] for n in dependent):
            if lower.estimator.only_direct and not result.reached[name]:
                raise ValueError(
                    f"level {name!r}: its loss does not depend on its own parameters, and "
                    f"{type(lower.estimator).__name__} of level {lower.name!r} gives the direct gradient alone: the "
                    "hypergradient would be zero. Use Penalty(), or let the loss read self.module."
                )
        adjoints = result.gradients
        for lower_name in reversed(dependent):
            v = adjoints.pop(lower_name, None)
            targets = [n for n in self.graph.uppers(lower_name) if n == name or n in dependent]
            if v is None or not targets:
                continue
            lower = self.trainers[lower_name]
            for target, product in self._pull_back(v, lower, trainer, [self.trainers[n] for n in targets]).items():
                if lower.estimator.scores:
                    self._reached[target] |= set(product)
                adjoints[target] = adjoints[target].add_(product) if target in adjoints else product
            del v
        return result.loss, adjoints[name]

    def _pull_back(
        self, v: Shards, lower: LevelTrainer, level: LevelTrainer, uppers: Sequence[LevelTrainer]
    ) -> dict[str, Shards]:
        """One hop: from the lower level's weights to the levels above it on the way to ``level``."""
        problem = lower.asked_by(level, uppers)
        if self._takes_products(lower):
            with self._phase(lower, "solve"):
                result = lower.estimator.solve(v, problem)
            found = {n: -x for n, x in self._gradient_with_products(lower, result.value, uppers).items()}
        else:
            with self._phase(lower, "hypergradient"):
                found, result = lower.estimator.pull_back(v, problem)
            if isinstance(lower.estimator, ImplicitHypergradient) and lower.estimator.chooses_method:
                self._note(f"ghost/{lower.name}", 0.0)
        self._note_solve(lower, result)
        if result.pull is not None:
            assert lower.name not in self._gradients, "upper levels come first"
            self._pulls.setdefault(lower.name, []).append(result.pull)
        return found

    def _takes_products(self, lower: LevelTrainer) -> bool:
        """Whether to try ghost products: always where asked for, by default where they may apply and save a pass."""
        estimator = lower.estimator
        if not isinstance(estimator, ImplicitHypergradient):
            return False
        return estimator.mixed == "ghost" or (
            estimator.chooses_method
            and lower.name not in self._without_products
            and lower.name not in self._gradients
            and not self.graph.depends_on_best_responses(lower.name)  # its gradient takes more than this pass
        )

    def _gradient_with_products(
        self, lower: LevelTrainer, v: Shards, uppers: Sequence[LevelTrainer]
    ) -> dict[str, Shards]:
        """Mixed partials out of the pass that also gives the lower level's gradient, which is kept for its step.

        Where the estimator leaves the method open, whatever stands against products (known on all ranks or on none)
        means the forward derivative: for good if it lies in the loss or the module, else for these batches.

        Raises:
            DerivativeError: Where products were asked for and cannot be had.
        """
        name, is_asked_for = lower.name, lower.estimator.mixed == "ghost"
        ghost = GhostProducts(lower.block, v)
        try:
            with self._phase(lower, "gradient and mixed partial"):
                result = lower.compute_gradient([lower, *uppers], ghost=ghost)
        except DerivativeError as error:
            for engine in dict.fromkeys([lower.engine, *(t.engine for t in lower.others.values())]):
                engine.clear_gradients()
            if is_asked_for:
                raise
            self._note(f"ghost/{name}", 0.0)
            self._without_products[name] = str(error)
            logger.debug("level %r: mixed partials by the forward derivative: %s", name, error)
            return self._forward_mixed(lower, v, uppers)
        mixed = {upper.name: result.gradients.pop(upper.name) for upper in uppers}
        if ghost.refusal is not None and is_asked_for:
            raise DerivativeError(f"level {name!r}: {ghost.refusal}")
        is_good = ghost.refusal is None
        if not is_good:
            mixed = self._forward_mixed(lower, v, uppers)
        elif name not in self._verified:
            expected = self._forward_mixed(lower, v, uppers)
            is_good = self._verify(lower, mixed, expected)
            mixed = mixed if is_good else expected
        # A first gradient also notes which parameters of the levels above the loss reaches: only a good pass shows it.
        may_keep = is_good or name in self._probed
        if may_keep and name not in self._gradients and not self.graph.depends_on_best_responses(name):
            self._probed.add(name)
            self._keep_gradient(lower, result.loss, self._checked_gradient(lower, result), "gradient")
        self._note(f"ghost/{name}", float(is_good))
        return mixed

    def _forward_mixed(self, lower: LevelTrainer, v: Shards, uppers: Sequence[LevelTrainer]) -> dict[str, Shards]:
        with self._phase(lower, "hypergradient"):
            return lower.compute_mixed(v, uppers, "forward")

    def _verify(self, lower: LevelTrainer, found: dict[str, Shards], expected: dict[str, Shards]) -> bool:
        """Compare the first products with the forward derivative; False where they must not be used.

        Raises:
            DerivativeError: Where products were asked for and are wrong.
        """
        error, limit = relative_difference(found, expected), TOLERANCE[lower.engine.spec.dtype]
        if math.isnan(error):  # nothing to compare with: zero or not finite
            return False
        if error <= limit:
            self._verified.add(lower.name)
            return True
        message = f"level {lower.name!r}: {disagreement(error, limit)}"
        if lower.estimator.mixed == "ghost":
            raise DerivativeError(f"{message}. Use mixed='forward', which has no such condition.")
        self._without_products[lower.name] = message
        if is_main_process():
            warnings.warn(f"{message}. The forward derivative is used from here on.", stacklevel=2)
        return False

    # ---- checks --------------------------------------------------------------------------------------------------
    def _to_probe(self, trainer: LevelTrainer) -> list[LevelTrainer]:
        """At a level's first gradient: the upper levels it reads, to note which of their parameters it reaches."""
        if trainer.name in self._probed:
            return []
        self._probed.add(trainer.name)
        return [self.trainers[n] for n in self.graph.uppers(trainer.name)]

    def _note_reached(self, trainer: LevelTrainer, reached: dict[str, set[str]]) -> None:
        for name, parameters in reached.items():
            if name == trainer.name or name in self.graph.uppers(trainer.name):
                self._reached[name] |= parameters

    def _check_reached(self, stepping: Sequence[LevelTrainer]) -> None:
        for trainer in stepping:
            missing = [n for n in trainer.block.names if n not in self._reached[trainer.name]]
            if missing and not trainer.level.allow_unused and trainer.num_steps == 0:
                raise ValueError(
                    f"level {trainer.name!r}: no loss reaches {missing[:5]} ({len(missing)} parameter(s)): neither its "
                    "own nor that of a lower level that reads it. Is their effect behind detach() or no_grad()? If "
                    "not, freeze them with requires_grad_(False), or select others with `parameters`."
                )

    def _blame_lower(self, name: str) -> None:
        """Name the lower level whose own loss or gradient is not finite, where that is why a hypergradient is not."""
        for other in self.graph.order:
            if name in self.graph.ancestors(other):
                self._gradient(self.trainers[other])

    def _check_finite(self, value: float, trainer: LevelTrainer, phase: str) -> None:
        if math.isfinite(value):
            return
        message = (
            f"level {trainer.name!r}, step {trainer.num_steps + 1} (outer step {self.num_steps + 1}), phase {phase!r}: "
            f"the {phase} is {value}. Lower the learning rate, set max_grad_norm, or use nonfinite='skip' to leave "
            "such updates out."
        )
        if trainer.scaler.enabled and phase != "loss":  # fp16 overflow: part of dynamic loss scaling, not an error
            trainer.scaler.update(overflowed=True)
            raise _SkipTick(message, key=None)
        if self.nonfinite == "skip":
            raise _SkipTick(message, key=f"{trainer.name}/{phase}")
        raise NonFiniteError(message)

    # ---- set-up --------------------------------------------------------------------------------------------------
    def _bind(self, default: EngineSpec, seed: int) -> dict[str, LevelTrainer]:
        levels = self.graph.levels
        names = {level.name: level.owned_parameters() for level in levels}
        by_module: dict[int, list[Level]] = {}
        for level in levels:
            by_module.setdefault(id(level._module), []).append(level)
        _check_modules_are_disjoint([group[0] for group in by_module.values()])
        held = {level.name: optimizer_parameter_names(level, names[level.name]) for level in levels}
        engines = {key: self._wrap(group, names, default) for key, group in by_module.items()}
        trainers = {}
        for level in levels:
            engine = engines[id(level._module)]
            if held[level.name]:
                swap_parameters(level.optimizer, held[level.name], engine.parameters)  # type: ignore[arg-type]
            stream = None
            if self.graph.reads_batch(level.name):
                shuffle_seed = seed + zlib.crc32(level.name.encode())
                stream = BatchStream(level.data, level=level.name, device=self.device, seed=shuffle_seed)  # type: ignore[arg-type]
            trainers[level.name] = LevelTrainer(level, engine, names[level.name], stream)
        for trainer in trainers.values():
            if isinstance(trainer.estimator, UnrollingHypergradient):
                self._check_unrolling(trainer, trainer.estimator)
            if trainer.estimator.only_direct and trainer.level.unroll_steps > 1:
                raise ValueError(
                    f"level {trainer.name!r}: unroll_steps={trainer.level.unroll_steps}, but "
                    f"{type(trainer.estimator).__name__} is single-loop: at its other steps the levels above have no "
                    "loss to pull it with. Set unroll_steps=1."
                )
            trainer.others = {n: trainers[n] for n in self.graph.reads(trainer.name)}
            trainer.gradient = lambda trainer=trainer: self._gradient(trainer)
        return trainers

    def _check_unrolling(self, trainer: LevelTrainer, estimator: UnrollingHypergradient) -> None:
        estimator.steps_of(trainer.level.unroll_steps, trainer.name)
        update_rule(trainer.optimizer, trainer.name)
        lowers = self.graph.lowers(trainer.name)
        if lowers:
            raise ValueError(
                f"level {trainer.name!r}: {type(estimator).__name__} takes its steps again, but they depend on "
                f"the moving levels {lowers} below it. Use an implicit estimator for it, ConjugateGradient() say."
            )

    def _wrap(self, levels: list[Level], names: dict[str, list[str]], default: EngineSpec) -> Engine:
        specs = {level.engine or default for level in levels}
        label = " and ".join(repr(level.name) for level in levels)
        if len(specs) > 1:
            raise ValueError(
                f"levels {label} share one module, so they need one engine; got {sorted(map(repr, specs))}."
            )
        owner: dict[str, str] = {}
        for level in levels:
            for name in names[level.name]:
                if name in owner:
                    raise ValueError(f"levels {owner[name]!r} and {level.name!r} both own the parameter {name!r}.")
                owner[name] = level.name
        module = levels[0]._module
        for name, parameter in module.named_parameters():
            if name not in owner:
                parameter.requires_grad_(False)
        # Another level's loss may use a part of this module only, and its gradients are taken through the engine too.
        may_skip = len(self.graph.order) > 1 or any(level.allow_unused for level in levels)
        spec = specs.pop()
        return spec.wrap(module, name=label.strip("'"), device=self.device, may_skip_parameters=may_skip)

    # ---- small things ----------------------------------------------------------------------------------------------
    def _phase(self, trainer: LevelTrainer, name: str):
        return self.history.phase(trainer.name, name, self.device)

    def _note_solve(self, lower: LevelTrainer, result: Result) -> None:
        """Record how a solve ended; say once per level and ending what was not as asked for."""
        if result.num_hvps:
            self._note(f"hvps/{lower.name}", result.num_hvps)
            self._note(f"iterations/{lower.name}", result.num_iterations)
        if result.residual is not None:
            self._note(f"residual/{lower.name}", result.residual)
        if result.status.is_good:
            return
        key = f"{lower.name}/{result.status.name.lower()}"
        self.history.solves[key] = self.history.solves.get(key, 0) + 1
        if self.history.solves[key] == 1 and is_main_process():
            residual = "" if result.residual is None else f", relative residual {result.residual:.1e}"
            warnings.warn(
                f"level {lower.name!r}, outer step {self.num_steps + 1}: {type(lower.estimator).__name__} "
                f"{result.status.value} ({result.num_iterations} iterations{residual}). Said once; "
                "history.solves counts them.",
                stacklevel=2,
            )

    def _note(self, key: str, value: float) -> None:
        self._record.setdefault(key, []).append(value)

    @contextmanager
    def _stop_on_interrupt(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handler(signum: int, frame: Any) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        previous = signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _description(level: Level, engine: EngineSpec | None) -> list[str]:
    """What all ranks must have in common of a level."""
    facts = dict(
        kind=type(level).__name__,
        engine=level.engine or engine,
        hypergradient=level.hypergradient,
        unroll_steps=level.unroll_steps,
        gradient_accumulation_steps=level.gradient_accumulation_steps,
        max_grad_norm=level.max_grad_norm,
    )
    lines = [f"level {level.name!r} with {key}={value!r}" for key, value in facts.items()]
    parameters = dict(level._module.named_parameters())
    shapes = [f"{n} {list(parameters[n].shape)} {parameters[n].dtype}" for n in level.owned_parameters()]
    return [*lines, *(f"level {level.name!r} with parameter {shape}" for shape in shapes)]


class _SkipTick(Exception):
    """Leave this tick's updates out; ``key`` is what to count it under, None for what is no error."""

    def __init__(self, message: str, *, key: str | None):
        super().__init__(message)
        self.key = key


def _check_modules_are_disjoint(levels: Sequence[Level]) -> None:
    owner: dict[int, tuple[str, nn.Module]] = {}
    for level in levels:
        for name, parameter in level._module.named_parameters():
            if id(parameter) in owner:
                raise ValueError(
                    f"levels {owner[id(parameter)][0]!r} and {level.name!r} have different modules that share the "
                    f"parameter {name!r}. Give both levels the same module and divide it with `parameters`."
                )
        owner |= {id(p): (level.name, level._module) for p in level._module.parameters()}
