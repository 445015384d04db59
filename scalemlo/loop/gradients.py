"""The gradients of all levels at one tick: direct gradients, and hypergradients hop by hop.

All are taken at one point, on the same batches and with the same dropout masks, before any level steps.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..autodiff.errors import DerivativeError
from ..derivatives.ghost import GhostProducts, disagreement
from ..distributed.group import any_rank, is_main_process
from ..distributed.shards import Shards
from ..distributed.watchdog import Watchdog
from ..graph import LevelGraph
from ..history import History
from ..hypergradients import ImplicitHypergradient, Result
from ..memory import Scheduler
from .level_trainer import GradientResult, LevelTrainer
from .lower_level import LowerLevel
from .verification import GRADIENT_TOLERANCE, Hop, Verification, error_of_products, precision_of

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A loss, gradient or hypergradient is NaN or infinite."""


class SkipTick(Exception):
    """Leave this tick's updates out; ``key`` is what to count it under, None for what is no error."""

    def __init__(self, message: str, *, key: str | None):
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class Known:
    """What :class:`TickGradients` knew at one point; attributes as there."""

    found: dict[str, tuple[Shards, float]]
    pulls: dict[str, list[Shards]]
    record: dict[str, int]  # how long its lists were
    reached: dict[str, set[str]]
    probed: set[str]
    plain_values: set[tuple[str, str]]
    without_products: dict[str, str]
    verified: Any


class TickGradients:
    """Computes each level's total gradient once per tick, and what it needs below.

    Args:
        graph: The levels.
        trainers: By name.
        history: Phases, skipped updates and solves are noted there.
        nonfinite: ``"raise"`` or ``"skip"``.
        watchdog: Is told each phase.
        scheduler: Has what a phase needs on the device.
        verification: When derivatives are compared with the live modules.
    """

    def __init__(
        self,
        graph: LevelGraph,
        trainers: Mapping[str, LevelTrainer],
        history: History,
        nonfinite: str,
        watchdog: Watchdog,
        scheduler: Scheduler,
        verification: Verification,
    ):
        self.verification = verification
        self._graph, self._trainers, self._history, self._nonfinite = graph, trainers, history, nonfinite
        self._watchdog, self._scheduler = watchdog, scheduler
        self.outer_step = 1
        self.record: dict[str, list[float]] = {}  # of the outer iteration in hand
        self._found: dict[str, tuple[Shards, float]] = {}
        self._pulls: dict[str, list[Shards]] = {}  # on lower levels at this tick, of estimators that change their loss
        self._reached: dict[str, set[str]] = {name: set() for name in trainers}
        self._probed: set[str] = set()
        self._plain_values: set[tuple[str, str]] = set()  # of levels, the gradients of whose losses nothing changes
        self._without_products: dict[str, str] = {}  # why levels that leave it open take the forward derivative

    def clear(self) -> None:
        """Forget the gradients of the tick before."""
        self._found, self._pulls = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """What is known of the levels since their first gradients, in plain containers."""
        return {
            "reached": {name: sorted(parameters) for name, parameters in self._reached.items()},
            "probed": sorted(self._probed),
            "without_products": dict(self._without_products),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state_dict` gave."""
        self._reached = {name: set(parameters) for name, parameters in state["reached"].items()}
        self._probed = set(state["probed"])
        self._without_products = dict(state["without_products"])
        self.verification.forget()
        self.clear()

    def known(self) -> "Known":
        """All that is known now, for :meth:`restore`."""
        return Known(
            found=dict(self._found),
            pulls={name: list(pulls) for name, pulls in self._pulls.items()},
            record={key: len(values) for key, values in self.record.items()},
            reached={name: set(parameters) for name, parameters in self._reached.items()},
            probed=set(self._probed),
            plain_values=set(self._plain_values),
            without_products=dict(self._without_products),
            verified=self.verification.known(),
        )

    def restore(self, known: "Known") -> None:
        """Forget what was found since; see :meth:`known`."""
        self._found, self._pulls = known.found, known.pulls
        self.record = {key: self.record[key][:length] for key, length in known.record.items()}
        self._reached, self._probed, self._plain_values = known.reached, known.probed, known.plain_values
        self._without_products = known.without_products
        self.verification.restore(known.verified)

    def found(self, name: str) -> Shards:
        """The gradient of a level, for its step."""
        return self._found[name][0]

    def drop(self, name: str) -> None:
        """The step has been made."""
        del self._found[name]

    def of(self, trainer: LevelTrainer) -> tuple[Shards, float]:
        """The clipped total gradient of a level at this tick, computed once, and its clipping factor.

        Args:
            trainer: The level.

        Returns:
            Gradient and factor.
        """
        name = trainer.name
        if name not in self._found:
            through = self._graph.depends_on_best_responses(name)
            loss, total = self.hypergradient(trainer) if through else self._plain_gradient(trainer)
            self._keep_gradient(trainer, loss, total, "hypergradient" if through else "gradient")
        return self._found[name]

    def _keep_gradient(self, trainer: LevelTrainer, loss: float, total: Shards, phase: str) -> None:
        clipped, factor, norm = trainer.clip(total)
        if phase == "hypergradient" and not math.isfinite(norm):
            self._blame_lower(trainer.name)
        self._check_finite(norm, trainer, phase)
        trainer.scaler.update(overflowed=False)
        self.note(f"loss/{trainer.name}", loss)
        self.note(f"gradient_norm/{trainer.name}", norm)
        self._found[trainer.name] = clipped, factor

    def _plain_gradient(self, trainer: LevelTrainer) -> tuple[float, Shards]:
        probe = self._to_probe(trainer)
        with self.phase(trainer, "gradient"):
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

    def hypergradient(self, trainer: LevelTrainer) -> tuple[float, Shards]:
        """Loss and total gradient of a level that depends on best responses, not clipped.

        Reverse accumulation over the levels below: each is solved once, whatever the number of paths.

        Args:
            trainer: The level.

        Returns:
            Loss and gradient.
        """
        name = trainer.name
        dependent = [self._trainers[n] for n in self._graph.order if n in self._graph.responding(name)]
        wanted = [trainer, *(t for t in dependent if t.name in self._graph.lowers(name))]
        for lower in dependent:
            if lower.estimator.needs_gradient:
                self.of(lower)
        with self.phase(trainer, "direct gradient"):
            result = trainer.compute_gradient(wanted, self._to_probe(trainer))
        self._note_reached(trainer, result.reached)
        self._check_finite(result.loss, trainer, "loss")
        self._check_direct_gradient(trainer, result, wanted[1:], dependent)
        adjoints = result.gradients
        for lower in wanted[1:]:
            if lower.unrolls:
                adjoints[lower.name] = self._gradient_of_value(trainer, lower, adjoints[lower.name])
        self._sweep(adjoints, trainer, ())
        return result.loss, adjoints[name]

    def _gradient_of_value(self, trainer: LevelTrainer, lower: LevelTrainer, v: Shards) -> Shards:
        """The derivative of a loss by lower weights that steps have made: no step follows it, so nothing changes it.

        Hooks and rows of padding change gradients, and v is a gradient as the live module gives it. Where they do not,
        it is enough to have seen so once.
        """
        pair = trainer.name, lower.name
        is_due = self.verification.is_due(lower, self.outer_step)
        if pair in self._plain_values and not is_due:
            return v
        with self._beside(trainer):
            loss = replace(trainer.loss_at(), required=lower.engine)
            exact = loss.gradient_of_value({lower.name: lower.block})[lower.name]
        limit = GRADIENT_TOLERANCE[precision_of(lower)]
        if float((exact - v).norm()) <= limit * float(v.norm()):
            self._plain_values.add(pair)
            return v
        self._plain_values.discard(pair)
        return exact

    def _check_direct_gradient(
        self,
        trainer: LevelTrainer,
        result: GradientResult,
        read: Sequence[LevelTrainer],
        dependent: Sequence[LevelTrainer],
    ) -> None:
        """That there is something to send down to the levels below."""
        name = trainer.name
        for lower in read:
            is_named = lower.name in self._graph.reads(name)
            if is_named and not result.reached[lower.name] and lower.estimator.differentiates_upper:
                raise ValueError(
                    f"level {name!r}: its loss reads {lower.name!r}, but no gradient reaches that level's parameters, "
                    "so the hypergradient through it would be zero. If what it computes has no derivative, use "
                    f"ZerothOrder() or Reinforce() as the hypergradient of {lower.name!r}; if it stands behind "
                    "detach() or no_grad(), take it out from there."
                )
        for lower in dependent:
            if lower.estimator.only_direct and not result.reached[name]:
                raise ValueError(
                    f"level {name!r}: its loss does not depend on its own parameters, and "
                    f"{type(lower.estimator).__name__} of level {lower.name!r} gives the direct gradient alone: the "
                    "hypergradient would be zero. Use Penalty(), or let the loss read self.module."
                )

    def _sweep(self, adjoints: dict[str, Shards], level: LevelTrainer, fixed: tuple[str, ...]) -> None:
        """Send gradients by the weights of lower levels on, hop by hop, until they have reached the level above.

        What comes back to a level that was passed already, from one that it answers, is sent on from there in a sweep
        of its own, in which the latter stays fixed: how it moves is what that hop has solved for.

        Args:
            adjoints: By level, changed in place: those of the levels passed are taken out and sent on.
            level: The level whose gradient is being computed.
            fixed: Levels that are held, see :meth:`LevelGraph.hops`.
        """
        for hop in self._graph.hops(level.name, fixed):
            v = adjoints.pop(hop.name, None)
            if v is None or not hop.onward:
                continue
            lower = self._trainers[hop.name]
            back: dict[str, Shards] = {}
            onward = [self._trainers[n] for n in hop.onward]
            for target, product in self._pull_back(v, lower, level, onward, fixed).items():
                if lower.estimator.scores:
                    self._reached[target] |= set(product)
                if target in hop.back:
                    if float(product.norm()) > 0.0:  # it is zero where the loss does not tie the two together
                        back[target] = product
                else:
                    adjoints[target] = adjoints[target].add_(product) if target in adjoints else product
            del v
            if back:
                self._sweep(back, level, (*fixed, hop.name))
                for target, product in back.items():
                    adjoints[target] = adjoints[target].add_(product) if target in adjoints else product

    def _pull_back(
        self,
        v: Shards,
        lower: LevelTrainer,
        level: LevelTrainer,
        onward: Sequence[LevelTrainer],
        fixed: tuple[str, ...],
    ) -> dict[str, Shards]:
        """One hop: from the lower level's weights to the levels that it goes on to."""
        problem, estimator = LowerLevel(lower, level, onward, self.of, fixed), lower.estimator
        is_ghost = False
        if isinstance(estimator, ImplicitHypergradient) and self._takes_products(lower, estimator, onward):
            with self.phase(lower, "solve", level):
                result = estimator.solve(v, problem)
            products, is_ghost = self._products(lower, result.value, onward, estimator.mixed == "ghost")
            found = {n: -x for n, x in products.items()}
        else:
            with self.phase(lower, "hypergradient", level):
                found, result = estimator.pull_back(v, problem)
            if isinstance(estimator, ImplicitHypergradient) and estimator.chooses_method:
                self.note(f"ghost/{lower.name}", 0.0)
        if found and not fixed and self.verification.is_due(lower, self.outer_step):
            is_implicit = isinstance(estimator, ImplicitHypergradient)
            pulled, mixed = (result.value, {n: -x for n, x in found.items()}) if is_implicit else (v, {})
            with self._beside(lower, level):
                Hop(lower, onward, is_ghost=is_ghost).verify(pulled, mixed)
            self.verification.done(lower, self.outer_step)
        self._note_solve(lower, result)
        if result.pull is not None:
            assert lower.name not in self._found, "upper levels come first"
            self._pulls.setdefault(lower.name, []).append(result.pull)
        return found

    def _products(
        self, lower: LevelTrainer, s: Shards, onward: Sequence[LevelTrainer], is_asked_for: bool
    ) -> tuple[dict[str, Shards], bool]:
        """Mixed partials with s, by ghost products where they can be had; and whether they could."""
        by_weights = [t for t in onward if t.name in self._graph.uppers(lower.name)]
        if not by_weights:
            raise DerivativeError(
                f"level {lower.name!r}: mixed='ghost' gives products with the weights of examples, which levels above "
                "decide, but its loss reads only levels below. Use mixed='forward'."
            )
        products, is_ghost = self._gradient_with_products(lower, s, by_weights, is_asked_for)
        in_losses = [t for t in onward if t not in by_weights]  # levels below, which the losses themselves read
        if in_losses:
            products |= self._forward_mixed(lower, s, in_losses)
        return products, is_ghost

    def _takes_products(
        self, lower: LevelTrainer, estimator: ImplicitHypergradient, targets: Sequence[LevelTrainer]
    ) -> bool:
        """Whether to try ghost products: always where asked for, by default where they may apply and save a pass."""
        return estimator.mixed == "ghost" or (
            estimator.chooses_method
            and lower.name not in self._without_products
            and lower.name not in self._found
            and not self._graph.depends_on_best_responses(lower.name)  # its gradient takes more than this pass
            and not any(t.engine is lower.engine for t in targets)  # a shared module: they enter the losses themselves
            and any(t.name in self._graph.uppers(lower.name) for t in targets)
        )

    def _gradient_with_products(
        self, lower: LevelTrainer, v: Shards, uppers: Sequence[LevelTrainer], is_asked_for: bool
    ) -> tuple[dict[str, Shards], bool]:
        """Mixed partials out of the pass that also gives the lower level's gradient, which is kept for its step.

        Where the estimator leaves the method open, whatever stands against products (known on all ranks or on none)
        means the forward derivative: for good if it lies in the loss or the module, else for these batches.

        Returns:
            The mixed partials, and whether they are by products.

        Raises:
            DerivativeError: Where products were asked for and cannot be had.
        """
        name, ghost = lower.name, GhostProducts(lower.block, v)
        try:
            with self.phase(lower, "gradient and mixed partial"):
                result = lower.compute_gradient([lower, *uppers], ghost=ghost)
        except DerivativeError as error:
            for engine in dict.fromkeys([lower.engine, *(t.engine for t in lower.others.values())]):
                engine.clear_gradients()
            if is_asked_for:
                raise
            self.note(f"ghost/{name}", 0.0)
            self._do_without_products(name, str(error))
            return self._forward_mixed(lower, v, uppers), False
        mixed = {upper.name: result.gradients.pop(upper.name) for upper in uppers}
        if ghost.refusal is None:
            past = [u.name for u in uppers if any_rank(not result.reached[u.name])]
            if past:  # it has no part in the weights
                ghost.refusal = f"ghost products: level {past[0]!r} enters the losses themselves. Use mixed='forward'."
                self._do_without_products(name, ghost.refusal)
        if ghost.refusal is not None and is_asked_for:
            raise DerivativeError(f"level {name!r}: {ghost.refusal}")
        if ghost.is_mixed and not self.verification.knows(lower):  # at its first use: so it will be
            self._do_without_products(name, str(ghost.refusal))
        is_good = ghost.refusal is None and self._verify_products(lower, ghost, is_asked_for)
        if not is_good:
            mixed = self._forward_mixed(lower, v, uppers)
        # A first gradient also notes which parameters of the levels above the loss reaches: only a good pass shows it.
        may_keep = is_good or name in self._probed
        if may_keep and name not in self._found and not self._graph.depends_on_best_responses(name):
            self._probed.add(name)
            self._keep_gradient(lower, result.loss, self._checked_gradient(lower, result), "gradient")
        self.note(f"ghost/{name}", float(is_good))
        return mixed, is_good

    def _do_without_products(self, name: str, reason: str) -> None:
        """Take the forward derivative from here on, and say so once: it is exact too, but takes a pass of its own."""
        if name not in self._without_products and is_main_process():
            logger.warning("level %r: its mixed partials take the forward derivative, a pass more: %s", name, reason)
        self._without_products[name] = reason

    def _forward_mixed(self, lower: LevelTrainer, v: Shards, uppers: Sequence[LevelTrainer]) -> dict[str, Shards]:
        with self.phase(lower, "hypergradient"):
            return lower.compute_mixed(v, uppers, "forward")

    def _verify_products(self, lower: LevelTrainer, ghost: GhostProducts, is_asked_for: bool) -> bool:
        """Compare products with single examples' gradients where that is due; False where they must not be used.

        Raises:
            DerivativeError: Where products were asked for and are wrong.
        """
        is_new = any_rank(not self.verification.is_known(lower, ghost.kinds))
        if not (is_new or self.verification.is_due(lower, self.outer_step)):
            return True
        with self._beside(lower):
            error, limit = error_of_products(lower, ghost, self.outer_step)
        if error <= limit:
            self.verification.done_with(lower, ghost.kinds, self.outer_step)
            return True
        message = f"level {lower.name!r}: {disagreement(error, limit)}"
        if is_asked_for:
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
        return [self._trainers[n] for n in self._graph.uppers(trainer.name)]

    def _note_reached(self, trainer: LevelTrainer, reached: dict[str, set[str]]) -> None:
        for name, parameters in reached.items():
            if name == trainer.name or name in self._graph.uppers(trainer.name):
                self._reached[name] |= parameters

    def check_reached(self, stepping: Sequence[LevelTrainer]) -> None:
        """At the first step of a level: that some loss depends on each of its parameters.

        Args:
            stepping: Levels that are about to step.

        Raises:
            ValueError: Naming parameters that none does.
        """
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
        for other in self._graph.order:
            if name in self._graph.ancestors(other):
                self.of(self._trainers[other])

    def _check_finite(self, value: float, trainer: LevelTrainer, phase: str) -> None:
        if math.isfinite(value):
            return
        message = (
            f"level {trainer.name!r}, step {trainer.num_steps + 1} (outer step {self.outer_step}), phase {phase!r}: "
            f"the {phase} is {value}. Lower the learning rate, set max_grad_norm, or use nonfinite='skip' to leave "
            "such updates out."
        )
        scalers = [t.scaler for t in self._scaling(trainer, phase) if t.scaler.enabled]
        if scalers and phase != "loss":  # fp16 overflow: part of dynamic loss scaling, not an error
            for scaler in scalers:
                scaler.update(overflowed=True)
            raise SkipTick(message, key=None)
        if self._nonfinite == "skip":
            raise SkipTick(message, key=f"{trainer.name}/{phase}")
        raise NonFiniteError(message)

    def _scaling(self, trainer: LevelTrainer, phase: str) -> list[LevelTrainer]:
        """Levels whose scale a phase's passes use: products of a hypergradient are taken of the losses below."""
        below = [n for n in self._graph.order if trainer.name in self._graph.ancestors(n)]
        return [trainer, *(self._trainers[n] for n in below if phase == "hypergradient")]

    # ---- notes ----------------------------------------------------------------------------------------------------
    @contextmanager
    def phase(self, trainer: LevelTrainer, name: str, asking: LevelTrainer | None = None) -> Iterator[None]:
        """Run a phase of a level: its states on the device, timed, and the watchdog told.

        Args:
            trainer: The level.
            name: Of the phase.
            asking: Where it runs the level's estimator, the level whose gradient is being computed.
        """
        with (
            self._watchdog.phase(self.outer_step, f"{trainer.name}: {name}"),
            self._scheduler.phase(trainer, name, asking) as moves,
            self._history.phase(trainer.name, name, trainer.engine.device),
        ):
            yield
        self._history.note_moves(trainer.name, name, moves.num_bytes, moves.seconds)

    @contextmanager
    def _beside(self, trainer: LevelTrainer, asking: LevelTrainer | None = None) -> Iterator[None]:
        """What is done now and then and belongs to no phase of an iteration."""
        with (
            self._watchdog.phase(self.outer_step, f"{trainer.name}: verify"),
            self._scheduler.beside(trainer, asking),
            self._history.phase(trainer.name, "verify", trainer.engine.device),
        ):
            yield

    def _note_solve(self, lower: LevelTrainer, result: Result) -> None:
        """Record how a solve ended; say once per level and ending what was not as asked for."""
        if result.num_hvps:
            self.note(f"hvps/{lower.name}", result.num_hvps)
            self.note(f"iterations/{lower.name}", result.num_iterations)
        if result.residual is not None:
            self.note(f"residual/{lower.name}", result.residual)
        if result.status.is_good:
            return
        key = f"{lower.name}/{result.status.name.lower()}"
        self._history.solves[key] = self._history.solves.get(key, 0) + 1
        if self._history.solves[key] == 1 and is_main_process():
            residual = "" if result.residual is None else f", relative residual {result.residual:.1e}"
            warnings.warn(
                f"level {lower.name!r}, outer step {self.outer_step}: {type(lower.estimator).__name__}: "
                f"{result.status.value} ({result.num_iterations} iterations{residual}). Said once; "
                "history.solves counts them.",
                stacklevel=2,
            )

    def note(self, key: str, value: float) -> None:
        """Add a value to the record of the outer iteration."""
        self.record.setdefault(key, []).append(value)
