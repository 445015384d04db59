"""The fallback for operations without a forward derivative: central differences of a module's outputs.

Only the outputs of the lower module are differenced; they enter the rest of the loss as a linear function of the step,
so that stop-gradients and everything else outside the module are differentiated exactly. Nothing is written to the
weights: the skeleton is lent w + e v and w - e v.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch._C import _autograd
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..autodiff.evaluation import Marking, current_evaluation
from ..autodiff.operations import depends
from ..autodiff.python_state import PythonState
from ..autodiff.rng import RNGState
from ..autodiff.skeleton import Lender
from ..autodiff.stop_gradient import Constants
from ..distributed.group import any_rank
from ..distributed.shards import Shards
from ..engines.base import ParameterBlock

RELATIVE_STEP = {torch.float64: 5e-6, torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 3e-3}
"""Size of a step, ``|e v| / |w|``, by the dtype the module computes in."""


class CentralDifference:
    """Runs the lower module with outputs ``(y(w+ev) + y(w-ev)) / 2`` and tangents ``(y(w+ev) - y(w-ev)) / 2e``.

    Args:
        lower: The parameters w.
        v: Direction; the step is ``e = r |w| / |v|`` with r from :data:`RELATIVE_STEP`.
    """

    def __init__(self, lower: ParameterBlock, v: Shards):
        self.lower, self.v = lower, v
        dtype = lower.engine.spec.compute_dtype or next(iter(v.values())).dtype
        self.size = RELATIVE_STEP[dtype] * float(lower.shards().norm() / v.norm().clamp_min(1e-300))

    def start(self) -> None:
        """Begin one evaluation of the loss, inside its dual level: the step moves."""
        like = next(iter(self.v.values()))
        zero = torch.zeros((), dtype=like.dtype, device=like.device)
        self._step = fwAD.make_dual(zero, torch.ones_like(zero))

    def call(self, lender: Lender, method: str, args: tuple, kwargs: dict) -> Any:
        """Run one method of the lower module."""
        engine = self.lower.engine
        masks = RNGState.capture(engine.device)
        state = PythonState.of([engine.skeleton.module])
        follows = any(isinstance(x, Tensor) and depends(x) for x in tree_leaves((args, kwargs)))

        def evaluate(sign: float, constants: Constants) -> Any:
            masks.restore()
            state.restore()
            with ExitStack() as stack:
                if not follows:  # values alone, which any operation has
                    stack.enter_context(temporarily_clear_interpreter_stack())
                    stack.enter_context(_hooks_on_saved_tensors())
                running = current_evaluation()
                if running is not None:
                    stack.enter_context(running.within(Marking()))
                moved = replace(lender, shards=self._moved(lender.shards, sign), form="plain")
                stack.enter_context(engine.skeleton.lent(moved))
                stack.enter_context(constants)
                return engine.call_skeleton(method, args, kwargs)

        seen = Constants(), Constants()
        plus, minus = evaluate(+1.0, seen[0]), evaluate(-1.0, seen[1])
        if not _equal(seen[0].values, seen[1].values):  # the module has stop-gradients that depend on its weights
            base = Constants()
            evaluate(0.0, base)
            plus, minus = evaluate(+1.0, Constants(base.values)), evaluate(-1.0, Constants(base.values))
        return _linear(plus, minus, self._step, self.size)

    def _moved(self, shards: Mapping[str, Tensor], sign: float) -> dict[str, Tensor]:
        moved = {n: torch.add(shards[n], t, alpha=sign * self.size) for n, t in self.v.items()}
        return {**shards, **moved}


@contextmanager
def _hooks_on_saved_tensors() -> Iterator[None]:
    """Allowed, as outside of torch.func: torch.utils.checkpoint in a module has them."""
    message = _autograd._saved_tensors_hooks_get_disabled_error_message()
    _autograd._saved_tensors_hooks_enable()
    try:
        yield
    finally:
        if message is not None:
            _autograd._saved_tensors_hooks_disable(message)


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
