"""The mixed partial ``d/dlambda <dL/dw, v>`` of a level's loss, on the shards of any engine.

Both ways below evaluate one function of a scalar step e,

    phi(e) = dL/dlambda (w + e v, lambda),        mixed = dphi/de at 0,

forward over reverse: the reverse part differentiates with respect to the upper parameters only. Where they enter
outside the large model (example weights, mixtures), no backward pass runs through that model and no graph of it is
stored; what remains is the forward directional derivative of its losses.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..distributed import any_rank
from ..engines.base import Engine, ParameterBlock
from ..rng import RNGState
from ..shards import Shards
from .stop_gradient import Constants, NoGradIsConstant

Method = Literal["forward", "finite_difference", "ghost"]
METHODS: tuple[Method, ...] = ("forward", "finite_difference", "ghost")
"""``ghost`` is in :mod:`scalemlo.second_order.ghost`: it needs no pass of its own."""

RELATIVE_STEP = {torch.float64: 5e-6, torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 3e-3}
"""Size of a finite-difference step, ``|e v| / |w|``, by the dtype the module computes in."""


class DerivativeError(RuntimeError):
    """A derivative cannot be taken the way it was asked for; says which operation and the way out."""


def mixed_partial(
    loss: Callable[[], Tensor],
    engines: Sequence[Engine],
    lower: ParameterBlock,
    v: Shards,
    uppers: Mapping[str, ParameterBlock],
    method: Method = "forward",
) -> dict[str, Shards]:
    """``d/dlambda <dL/dw, v>`` for every upper block at once.

    Args:
        loss: Evaluates the lower loss on this rank's part of the batch, calling modules through their views. L is the
            mean over ranks of what it returns.
        engines: All engines the loss may call.
        lower: The parameters w.
        v: Direction, same layout as w.
        uppers: The parameters lambda, by any key.
        method: ``"forward"`` is exact to rounding. ``"finite_difference"`` takes the derivative of the lower module's
            outputs by central differences with step e = r |w| / |v| (two forwards, r from :data:`RELATIVE_STEP`), for
            modules with operations that have no forward derivative; the rest of the loss stays exact.

    Returns:
        One vector per key, mean over ranks, laid out like the upper block.

    Raises:
        DerivativeError: If an operation does not support the derivative, or the loss uses a weight behind its unit's
            back.
    """
    traced: dict[str, dict[str, Tensor]] = {key: dict(block.shards()) for key, block in uppers.items()}
    directional = {"forward": _Forward, "finite_difference": _FiniteDifference}[method](engines, lower, v)

    def gradient_at(step: Tensor) -> dict[str, dict[str, Tensor]]:
        def local_loss(upper_shards: dict[str, dict[str, Tensor]]) -> Tensor:
            with ExitStack() as stack:
                for engine in engines:
                    overlay = {k: t for key, block in uppers.items() if block.engine is engine
                               for k, t in upper_shards[key].items()}  # fmt: skip
                    call = partial(directional.noting, engine, partial(directional.call, engine, overlay, step))
                    stack.enter_context(engine.functional(call))
                return loss()

        return torch.func.grad(local_loss)(traced)

    weights = next(iter(v.values()))
    zero = torch.zeros((), dtype=weights.dtype, device=weights.device)
    with _explained(), sdpa_kernel(SDPBackend.MATH), NoGradIsConstant():
        _, tangents = torch.func.jvp(gradient_at, (zero,), (torch.ones_like(zero),))
    if lower.engine not in directional.called:
        raise DerivativeError(
            f"the loss of level '{lower.engine.name}' never calls its module through `self.module`: derivatives by "
            "its weights would be zero. Do not keep the module under another name."
        )
    averaged = {key: block.engine.average_gradients(tangents[key]) for key, block in uppers.items()}
    return {key: uppers[key].vector(gradients) for key, gradients in averaged.items()}


class _Directional(ABC):
    """Runs modules with w moved along v by a traced scalar step."""

    def __init__(self, engines: Sequence[Engine], lower: ParameterBlock, v: Shards):
        self.lower, self.v = lower, v
        self.called: set[Engine] = set()
        self.weights = {e: {n: e.local(n) for n in e.parameters} for e in engines}  # taken outside torch.func

    @abstractmethod
    def call(self, engine: Engine, overlay: Mapping[str, Tensor], step: Tensor, method: str, args, kwargs) -> Any:
        """Run one method of a module."""

    def noting(self, engine: Engine, call: Callable, method: str, args, kwargs) -> Any:
        self.called.add(engine)
        return call(method, args, kwargs)

    def lend(
        self, engine: Engine, overlay: Mapping[str, Tensor], move: Callable[[list[str]], dict], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Full tensors for one unit: moved weights, traced upper parameters, and the rest as it is."""
        moved = [n for n in names if engine is self.lower.engine and n in self.v]
        traced = {n: overlay[n] for n in names if n in overlay}
        rest = {n: self.weights[engine][n] for n in names if n not in traced and n not in moved}
        full = engine.gather(rest) if rest else {}
        if traced:
            full |= engine.gather(traced, cast_first=False)
        if moved:
            full |= move(moved)
        return full


class _Forward(_Directional):
    def call(self, engine, overlay, step, method, args, kwargs):
        def move(names: list[str]) -> dict[str, Tensor]:
            weights = engine.gather({n: self.weights[engine][n] for n in names})
            tangents = engine.gather({n: self.v[n] for n in names})
            return {n: _Along.apply(weights[n], tangents[n], step) for n in names}

        with engine.skeleton.lent(partial(self.lend, engine, overlay, move)):
            return engine.call_skeleton(method, args, kwargs)


class _Along(torch.autograd.Function):
    """``w + e v`` at e = 0, where e has tangent 1: the weights themselves, the direction as tangent, no copies."""

    @staticmethod
    def forward(weight: Tensor, direction: Tensor, step: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx, _weight, _direction, _step) -> Tensor:
        (direction,) = ctx.saved_tensors
        return direction.view_as(direction)


class _FiniteDifference(_Directional):
    def __init__(self, engines: Sequence[Engine], lower: ParameterBlock, v: Shards):
        super().__init__(engines, lower, v)
        dtype = lower.engine.spec.compute_dtype or next(iter(v.values())).dtype
        self.size = RELATIVE_STEP[dtype] * float(lower.shards().norm() / v.norm().clamp_min(1e-300))

    def call(self, engine, overlay, step, method, args, kwargs):
        if engine is not self.lower.engine:
            with engine.skeleton.lent(partial(self.lend, engine, overlay, dict)):
                return engine.call_skeleton(method, args, kwargs)
        masks = RNGState.capture(engine.device)

        def evaluate(sign: float, constants: Constants) -> Any:
            def move(names: list[str]) -> dict[str, Tensor]:
                return engine.gather(
                    {n: torch.add(self.weights[engine][n], self.v[n], alpha=sign * self.size) for n in names}
                )

            masks.restore()
            with engine.skeleton.lent(partial(self.lend, engine, overlay, move)), constants:
                return engine.call_skeleton(method, args, kwargs)

        seen = Constants(), Constants()
        plus, minus = evaluate(+1.0, seen[0]), evaluate(-1.0, seen[1])
        if not _equal(seen[0].values, seen[1].values):  # the module has stop-gradients that depend on its weights
            base = Constants()
            evaluate(0.0, base)
            plus, minus = evaluate(+1.0, Constants(base.values)), evaluate(-1.0, Constants(base.values))
        return _linear(plus, minus, step, self.size)


def _linear(plus: Any, minus: Any, step: Tensor, size: float) -> Any:
    """The line through two outputs, as a function of the step: ``(plus + minus) / 2 + step * (plus - minus) / 2e``."""
    ahead, spec = tree_flatten(plus)
    behind, _ = tree_flatten(minus)

    def line(a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        a, b = a.to(step.dtype), b.to(step.dtype)
        return (a + b) / 2 + step * ((a - b) / (2 * size))

    return tree_unflatten([line(a, b) for a, b in zip(ahead, behind, strict=True)], spec)


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two recordings agree on this rank; data that does not depend on weights is equal on every rank."""
    same = len(a) == len(b) and all(bool((x.detach() == y.detach()).all()) for x, y in zip(a, b, strict=False))
    return not any_rank(not same)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        message = str(error)
        if "forward AD" in message or "forward-mode" in message:
            raise DerivativeError(
                f"an operation of the lower level has no forward derivative: {message} Use another implementation of "
                "it (attn_implementation='eager' for attention), or mixed='finite_difference' in the hypergradient."
            ) from error
        if "meta" in message:
            raise DerivativeError(
                f"a weight was used outside the forward of the module that holds it ({message}). Call the module, "
                "not its submodules or weights, in the loss; or name the block that uses it in FSDP(units=...)."
            ) from error
        raise


__all__ = ["METHODS", "RELATIVE_STEP", "DerivativeError", "Method", "mixed_partial"]
