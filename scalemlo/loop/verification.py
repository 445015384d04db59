"""Is a hypergradient that of the training step? Compared with the live module at first use, and now and then.

Derivatives of second order run on a copy of the module's structure. That copy's own loss and first gradient come out
of the same pass, and must be those of the live module on the same batch. And the derivative of the step can be had in a
way that knows nothing of copies: move the levels above a little, and see how the live gradient moves. A difference
beyond rounding is an error that names the level, the parameters and what is likely behind it: a wrong hypergradient
trains without complaint.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..autodiff.errors import DerivativeError
from ..autodiff.graph_audit import audit
from ..autodiff.stop_gradient import Constants
from ..derivatives.ghost import TOLERANCE as GHOST_TOLERANCE
from ..derivatives.ghost import GhostProducts
from ..derivatives.gradient_hooks import GradientHooks, has_hooks
from ..derivatives.hessian import Products, RetainedHessian, hessian
from ..distributed.group import communication_device, world_size
from ..distributed.shards import Shards
from ..engines import Engine
from ..engines.base import ParameterBlock
from ..hypergradients import CurvatureHypergradient, ImplicitHypergradient, Unrolled
from ..hypergradients.random_directions import gaussian
from .level_trainer import GradientResult, LevelTrainer

Verify = Literal["first", "always", "off"]
VERIFY: tuple[Verify, ...] = ("first", "always", "off")
"""When hypergradients are verified: at first use and what counts as such, at every step, or never."""

GRADIENT_TOLERANCE = {"fp64": 1e-5, "fp32": 2e-3, "bf16": 6e-2, "fp16": 3e-2}
"""How far the copy's gradient may be from the live one, relative to its size, by compute dtype."""

LOSS_TOLERANCE = {"fp64": 1e-6, "fp32": 1e-4, "bf16": 2e-2, "fp16": 1e-2}
"""How far its loss may be."""

DIFFERENCE_TOLERANCE = {"fp64": 1e-3, "fp32": 3e-2, "bf16": 2e-1, "fp16": 1e-1}
"""How far a derivative may be from the difference quotient of live gradients, relative to what it could be at most."""

WITH_KINKS = 3e-1
"""The same, where the graph has operations with kinks: a step of any size crosses some, a derivative none."""

ROUNDING = {"fp64": 1e-14, "fp32": 3e-7, "bf16": 2e-3, "fp16": 5e-4}
"""Of an inner product of gradients, relative to the product of their sizes."""

RELATIVE_STEPS = {"fp64": (1e-3, 1e-6, 1e-2), "fp32": (1e-2, 1e-3, 5e-2), "bf16": (1e-1, 3e-2), "fp16": (5e-2, 1e-2)}
"""By how much weights move in a difference quotient, of their size; the first that agrees is enough."""

MAX_ENTRIES = 50_000_000
"""Of levels with more weights, over all ranks, some units are looked at."""


@dataclass
class _Known:
    """What has been verified of a level."""

    modes: int
    tick: int
    kinds: list[frozenset[str]]


class Verification:
    """Decides when a level's part of a hypergradient is verified, and does it.

    Args:
        when: See :data:`VERIFY`.
        every: Outer steps after which what was verified is verified again.
    """

    def __init__(self, when: Verify, every: int):
        self._when, self._every = when, every
        self._known: dict[str, _Known] = {}

    def forget(self) -> None:
        """Everything is used for the first time again: the program was resumed."""
        self._known.clear()

    def known(self) -> dict[str, "_Known"]:
        """What has been verified, for :meth:`restore`."""
        return {name: replace(known, kinds=list(known.kinds)) for name, known in self._known.items()}

    def restore(self, known: dict[str, "_Known"]) -> None:
        """Forget what was verified since."""
        self._known = known

    def is_due(self, lower: LevelTrainer, outer_step: int) -> bool:
        """Whether a level is to be verified now; the same on every rank.

        Args:
            lower: The level.
            outer_step: The one in hand.

        Returns:
            Whether this is its first use, in its modes (training or evaluation), or after the time given.
        """
        if self._when == "off":
            return False
        known = self._known.get(lower.name)
        if known is None or self._when == "always" or known.modes != _modes(lower):
            return True
        return outer_step - known.tick >= self._every

    def knows(self, lower: LevelTrainer) -> bool:
        """Whether anything of a level has been verified."""
        return self._when == "off" or lower.name in self._known

    def is_known(self, lower: LevelTrainer, kinds: frozenset[str]) -> bool:
        """Whether ghost products were verified for a graph of such operations.

        Args:
            lower: The level.
            kinds: Names of the operations.
        """
        if self._when == "off":
            return True
        known = self._known.get(lower.name)
        return known is not None and any(kinds <= seen for seen in known.kinds)

    def done(self, lower: LevelTrainer, outer_step: int) -> None:
        """Note that a level has been verified.

        Args:
            lower: The level.
            outer_step: The one in hand.
        """
        kinds = self._known[lower.name].kinds if lower.name in self._known else []
        self._known[lower.name] = _Known(_modes(lower), outer_step, kinds)

    def done_with(self, lower: LevelTrainer, kinds: frozenset[str], outer_step: int) -> None:
        """Note that ghost products have been verified for a graph of some operations.

        Args:
            lower: The level.
            kinds: Names of the operations.
            outer_step: The one in hand.
        """
        known = self._known.setdefault(lower.name, _Known(_modes(lower), outer_step - self._every, []))
        known.kinds.append(kinds)


def _modes(lower: LevelTrainer) -> int:
    engines = dict.fromkeys([lower.engine, *(t.engine for t in lower.others.values())])
    return hash(tuple(m.training for engine in engines for m in engine.module.modules()))


# ---- ghost products --------------------------------------------------------------------------------------------------
def error_of_products(lower: LevelTrainer, ghost: GhostProducts, draw: int) -> tuple[float, float]:
    """Compare ghost products with ``<grad l_i, v>`` of the live module, all at once. Collective.

    One more backward pass, of the losses with random factors r_i in the place of their weights, gives
    ``sum_i r_i <grad l_i, v>`` without any product.

    Args:
        lower: The level.
        ghost: What has given products for its batches.
        draw: Decides the factors.

    Returns:
        The difference relative to the size of such a sum, and the limit for it.
    """
    assert ghost.first is not None, "they are there unless they were refused"
    products = ghost.first.double()
    generator = torch.Generator().manual_seed(7919 * draw + _rank())
    factors = torch.randn(len(products), generator=generator, dtype=torch.float64).to(products.device)
    found, square = _summed(torch.stack([(factors * products).sum(), (factors * products).square().sum()])).tolist()
    expected = lower.product_of_examples(ghost.v, factors)
    size = max(math.sqrt(square), abs(expected))
    error = abs(found - expected)
    return (error / size if size > 0 else error), GHOST_TOLERANCE[precision_of(lower)]


# ---- the hop ---------------------------------------------------------------------------------------------------------
class Hop:
    """One level that is differentiated through, and the levels that its part of the gradient goes to.

    Args:
        lower: The level.
        onward: Where it goes.
        is_ghost: Whether the mixed partial came out of the live module's own backward.
    """

    def __init__(self, lower: LevelTrainer, onward: Sequence[LevelTrainer], *, is_ghost: bool):
        self._lower, self._onward = lower, list(onward)
        self._estimator, self._is_ghost = lower.estimator, is_ghost
        self._precision = precision_of(lower)
        self._kinds: frozenset[str] = frozenset()  # of operations in the loss

    def verify(self, pulled: Shards, mixed: Mapping[str, Shards]) -> None:
        """Compare with the live module; what is off by more than rounding is an error on every rank.

        Args:
            pulled: The vector u of ``d<g, u>/dlambda``, with g the level's gradient.
            mixed: That derivative, by level, as it is used; empty where the estimator takes none.
        """
        if self._takes_products or not self._is_ghost:
            self._compare_copy(pulled)
        if mixed:
            found = [(t.block, mixed[t.name]) for t in self._onward]
            self._compare_difference(pulled, found, "the mixed partial with the levels above")
        if self._takes_products and self._may_differ:
            block = _some_of(self._lower)
            with hessian(self._lower.loss_at(), self._lower.block, self._products) as operator:
                product = operator(pulled)
            part = Shards({n: product[n] for n in block.names}, product.group)
            moves = GradientHooks.of(block).projected  # others are no variables of the level
            self._compare_difference(pulled, [(block, part)], "the product with second derivatives", moves)

    @property
    def _takes_products(self) -> bool:
        return isinstance(self._estimator, (CurvatureHypergradient, Unrolled))

    @property
    def _products(self) -> Products:
        return self._estimator.products if isinstance(self._estimator, CurvatureHypergradient) else "remat"

    @property
    def _may_differ(self) -> bool:
        """Whether something may set the update's second derivatives apart from those of the loss, and would be seen."""
        engine = self._lower.engine
        if engine.group is not None or self._precision not in ("fp64", "fp32"):  # hooks of sharding had to be held
            return False
        hooked = any(has_hooks(engine.parameters[n]) for n in self._lower.block.names)
        return hooked or bool(engine.skeleton.suspects) or engine.skeleton.has_gaps

    # ---- values and gradients of the copy ------------------------------------------------------------------------
    def _compare_copy(self, pulled: Shards) -> None:
        lower = self._lower
        retains = self._products == "retain" or (self._products == "auto" and lower.engine.group is None)
        live = lower.compute_gradient([lower])
        if not all(math.isfinite(float(g.norm())) for g in live.gradients.values()):
            return  # the step itself says so
        loss, some = lower.loss_at(), _some_of(lower)
        blocks = {lower.name: some}
        if retains:
            with hessian(loss, lower.block, "retain") as operator:
                assert isinstance(operator, RetainedHessian)
                self._compare_gradients({lower.name: operator.gradient()}, live, "the graph that is kept")
        if not self._is_ghost or (self._takes_products and not retains):
            is_exact = getattr(self._estimator, "mixed", None) != "finite_difference"
            if self._takes_products or (is_exact and isinstance(self._estimator, ImplicitHypergradient)):
                found = loss.examined([(lower.block, pulled)], blocks)
                self._compare_losses(found.loss, live.loss)
                self._compare_gradients(found.gradient, live, "the copy")
            else:
                self._compare_gradients(loss.gradient(blocks), live, "the copy")

    def _compare_losses(self, found: float, live: float) -> None:
        limit = LOSS_TOLERANCE[self._precision] * max(abs(live), 1e-12)
        if abs(found - live) <= limit or not math.isfinite(live):
            return
        raise DerivativeError(
            f"level {self._lower.name!r}: on the same batch the live module has the loss {live:.9g}, and the copy that "
            f"derivatives run on has {found:.9g}. Its forward pass depends on something that differs between two "
            "calls: random numbers from a generator of its own, a counter or a switch outside the module, a compiled "
            f"part with dropout, a reference to another object. {self._suspects()}{_WAY_OUT}"
        )

    def _compare_gradients(self, found: Mapping[str, Shards], live: GradientResult, what: str) -> None:
        limit = GRADIENT_TOLERANCE[self._precision]
        wrong: list[tuple[float, str]] = []
        is_missing = True
        for name, vector in found.items():
            expected = Shards({n: live.gradients[name][n] for n in vector}, vector.group)
            weights = Shards({n: t for n, t in self._lower.weights().items() if n in vector}, vector.group)
            size, scale = float(live.gradients[name].norm()), max(_root_mean_square([weights]), 1e-3)
            rounding = 50 * torch.finfo(next(iter(vector.values())).dtype).eps * abs(live.loss) / scale
            errors, own, given = _by_parameter(vector - expected), _by_parameter(expected), _by_parameter(vector)
            for parameter, error in errors.items():
                if error > limit * own[parameter] and error > max(0.05 * limit * size, rounding):
                    wrong.append((error / max(own[parameter], 1e-300), f"{name}/{parameter}"))
                    is_missing = is_missing and given[parameter] <= 1e-6 * own[parameter]
        if not wrong:
            return
        cause = (
            "The copy gives them none: the module comes to these weights through a reference to the live module (a "
            "global variable, an object of a library), not through self."
            if is_missing
            else "Likely: the code takes another way when no gradient is recorded, its backward is written by hand (a "
            "torch.autograd.Function), or something outside the module changes between two calls."
        )
        shown = ", ".join(f"{name} (by {error:.1e} of its size)" for error, name in sorted(wrong, reverse=True)[:5])
        raise DerivativeError(
            f"level {self._lower.name!r}: the gradient that {what} of the module gives differs from that of the live "
            f"module in {len(wrong)} parameter(s): {shown}. {cause} {self._suspects()}{_WAY_OUT}"
        )

    # ---- how live gradients move -----------------------------------------------------------------------------------
    def _compare_difference(
        self,
        pulled: Shards,
        parts: Sequence[tuple[ParameterBlock, Shards]],
        what: str,
        moves: Callable[[Shards], Shards] = lambda direction: direction,
    ) -> None:
        moved = [(block, moves(direction)) for block, direction in _directions(parts)]
        expected = sum(float(direction.dot(x)) for (_, direction), (_, x) in zip(moved, parts, strict=True))
        size = math.hypot(*(float(x.norm()) for _, x in parts)) * math.hypot(*(float(d.norm()) for _, d in moved))
        if not (math.isfinite(expected) and math.isfinite(size)):
            return  # the step itself says so
        scale = max(_root_mean_square([b.shards() for b, _ in parts]), 0.1)
        found = 0.0
        for holds in (False, True):  # mostly the first quotient says it all
            for relative in RELATIVE_STEPS[self._precision]:
                found, noise = self._quotient(pulled, moved, relative * scale, holds=holds)
                limit = DIFFERENCE_TOLERANCE[self._rounds_like]
                limit = max(limit, WITH_KINKS) if self._kinds & KINKED else limit
                if not math.isfinite(found) or abs(found - expected) <= limit * max(size, abs(found)) + noise:
                    return
        raise DerivativeError(
            f"level {self._lower.name!r}: {what} is not the derivative of the update that the live module makes: along "
            f"one direction it is {expected:.4g}, and the live gradient changes by {found:.4g}. Likely: a hook or an "
            "autograd.Function changes gradients, weights are used in a way that autograd does not see, or a level "
            f"above enters past the loss. {self._suspects()}{_WAY_OUT}"
        )

    def _quotient(
        self, pulled: Shards, moved: Sequence[tuple[ParameterBlock, Shards]], step: float, *, holds: bool
    ) -> tuple[float, float]:
        """``(<g(+), u> - <g(-), u>) / 2 step`` with live gradients g, and its rounding; weights are put back."""
        lower = self._lower
        evaluate = _held(lower, [block.engine for block, _ in moved]) if holds else self._audited
        values, size = [], 0.0
        for sign in (1.0, -1.0):
            with _moved(moved, sign * step):
                gradient = lower.compute_gradient([lower], evaluate=evaluate).gradients[lower.name]
            values.append(float(gradient.dot(pulled)))
            size = float(gradient.norm()) * float(pulled.norm())
        return (values[0] - values[1]) / (2 * step), ROUNDING[self._rounds_like] * size / step

    @property
    def _rounds_like(self) -> str:
        """Models compute norms in fp32, whatever they are given."""
        return "fp32" if self._precision == "fp64" and "ToCopyBackward0" in self._kinds else self._precision

    def _audited(self, batch: Any) -> Tensor:
        """The loss; its graph is looked at once."""
        loss = self._lower.evaluate(batch)
        if not self._kinds:
            self._kinds = audit(loss, 0).kinds
        return loss

    def _suspects(self) -> str:
        found = self._lower.engine.skeleton.suspects
        return f"This module uses {', '.join(found[:3])}. " if found else ""


_WAY_OUT = (
    "Change the module so; or take an estimator with first derivatives alone, Penalty() say; verify='off' trains with "
    "what may be wrong."
)


@contextmanager
def _moved(moved: Sequence[tuple[ParameterBlock, Shards]], step: float) -> Iterator[None]:
    """Live weights moved along a direction, and put back bit for bit."""
    saved = [(block.shards(), block.shards().clone()) for block, _ in moved]
    try:
        with torch.no_grad():
            for (live, _), (_, direction) in zip(saved, moved, strict=True):
                live.add_(direction, alpha=step)
        yield
    finally:
        with torch.no_grad():
            for live, before in saved:
                for name, t in live.items():
                    t.copy_(before[name])


def _some_of(lower: LevelTrainer) -> ParameterBlock:
    """The level's parameters, or those of some of its units where they are many."""
    engine, sizes = lower.engine, {n: lower.engine.shape(n).numel() for n in lower.block.names}
    if sum(sizes.values()) <= MAX_ENTRIES:
        return lower.block
    units = [[n for n in unit.names if n in sizes] for unit in engine.skeleton.units]
    units = sorted((names for names in units if names), key=lambda names: sum(sizes[n] for n in names))
    chosen: list[str] = []
    for names in units:
        if chosen and sum(sizes[n] for n in (*chosen, *names)) > MAX_ENTRIES:
            break
        chosen += names
    return ParameterBlock(engine, tuple(n for n in lower.block.names if n in set(chosen)))


def _held(lower: LevelTrainer, engines: Sequence[Engine]) -> Callable[[Any], Tensor]:
    """The level's loss with its stop-gradients held where they are now: those of the loss, and of modules that move."""
    held: dict[int, list[Tensor]] = {}

    def record(batch: Any) -> Tensor:
        with _LiveConstants(engines) as constants:
            loss = lower.evaluate(batch)
        held[id(batch)] = constants.values
        return loss

    lower.compute_gradient([lower], evaluate=record)

    def replay(batch: Any) -> Tensor:
        with _LiveConstants(engines, held[id(batch)]):
            return lower.evaluate(batch)

    return replay


class _LiveConstants(Constants):
    """Stop-gradients of a loss on live modules, except inside those that shard their weights."""

    def __init__(self, engines: Sequence[Engine], recorded: list[Tensor] | None = None):
        super().__init__(recorded)
        self._engines = engines

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Record or replace."""
        if any(engine.is_running and engine.group is not None for engine in self._engines):
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def _directions(parts: Sequence[tuple[ParameterBlock, Shards]]) -> list[tuple[ParameterBlock, Shards]]:
    """Along what was found and a random vector of the same size, of root mean square 1 over all that moves."""
    size = _root_mean_square([x for _, x in parts])
    found = []
    for i, (block, x) in enumerate(parts):
        random = gaussian(block, 12345 + i)
        found.append(random.add_(x, alpha=1 / size) if size > 0 else random)
    scale = 1 / max(_root_mean_square(found), 1e-300)
    return [(block, d.mul_(scale)) for (block, _), d in zip(parts, found, strict=True)]


def _root_mean_square(vectors: Sequence[Shards]) -> float:
    squares = sum(float(x.norm()) ** 2 for x in vectors)
    ones = sum(float(x.map(torch.ones_like).norm()) ** 2 for x in vectors)
    return math.sqrt(squares / max(ones, 1.0))


def _by_parameter(x: Shards) -> dict[str, float]:
    """The norm of each parameter's part, over all ranks."""
    squares = torch.stack([t.double().square().sum() for t in x.values()])
    if x.group is not None:
        squares = squares.to(communication_device())
        dist.all_reduce(squares, group=x.group)
    return dict(zip(x, squares.sqrt().tolist(), strict=True))


def precision_of(lower: LevelTrainer) -> str:
    """How precisely a level computes, as tolerances are listed: by the least precise of what its module holds."""
    if lower.engine.spec.dtype != "fp32":
        return lower.engine.spec.dtype
    held = set(lower.engine.dtypes.values())
    if torch.bfloat16 in held:
        return "bf16"
    if torch.float16 in held:
        return "fp16"
    return "fp64" if held <= {torch.float64} else "fp32"


KINKED = frozenset(
    f"{name}Backward{i}"
    for name in ("Relu", "LeakyRelu", "Hardtanh", "Threshold", "Abs", "Clamp", "ClampMin", "ClampMax", "Max", "Min")
    + ("Amax", "Amin", "MaxPool2DWithIndices", "MaxPool1D", "Hardswish", "Hardsigmoid", "Prelu", "Rrelu", "Maximum")
    + ("Minimum", "Sort", "Topk", "Elu", "L1Loss", "SmoothL1Loss", "HuberLoss", "Where")
    for i in range(3)
)
"""Operations that are not smooth."""


def _summed(x: Tensor) -> Tensor:
    if world_size() > 1:
        x = x.to(communication_device(), copy=True)
        dist.all_reduce(x)
    return x


def _rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0
