"""Rematerialisation that every derivative passes through: pairs (x, dx) in, pairs (y, dy) out, nothing kept between.

``torch.utils.checkpoint`` fails inside ``torch.func``. :func:`remat` runs a function without a graph and runs it again
when its gradient is asked for. Under a dual level (:class:`torch.autograd.forward_ad.dual_level`) either run computes
values and tangents together, so a Hessian-vector product through it costs one forward with tangents and one backward
with tangents, and between the two only the function's inputs and their tangents are alive.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..rng import RNGState
from .stop_gradient import NoGradIsConstant

PLAIN = (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.Size, slice)
"""What a rematerialised function may be given besides tensors: nothing that could hide a tensor."""


def remat(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, run again in the backward pass instead of keeping its graph.

    Forward, reverse and forward-over-reverse derivatives are those of the function itself; random numbers are replayed.
    Arguments may be nested in lists, tuples and dicts. Everything that is to be differentiated must be an argument: a
    tensor in the function's closure is a constant.

    Args:
        function: Returns a tensor or nested tensors, and changes nothing outside it.
        *args: Its arguments.

    Returns:
        What the function returns.
    """
    flat, spec = tree_flatten(args)
    if not all(isinstance(x, (Tensor, *PLAIN)) for x in flat):
        return function(*args)  # an object that may hold tensors: correct without rematerialisation
    run = _Run(function, flat, spec)
    outputs = _Remat.apply(run, *run.differentiable)
    return run.rebuild(outputs)


class _Run:
    """One call of a function: what is constant in it, and how its inputs and outputs are nested."""

    def __init__(self, function: Callable[..., Any], flat: Sequence[Any], spec: Any):
        self._function, self._flat, self._spec = function, list(flat), spec
        self._moving = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.is_floating_point()]
        self.differentiable = [flat[i] for i in self._moving]
        for i in self._moving:
            self._flat[i] = None
        devices = [x.device for x in self.differentiable if x.device.type != "cpu"]  # shards may lie on the host
        device = devices[0] if devices else torch.device("cpu")
        self._rng = RNGState.capture(device)
        self._tangents: Sequence[Tensor | None] = ()

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Primal outputs; the tangents are kept for :meth:`tangents`, which is asked next."""
        with _derivatives_enabled():
            outputs = self._evaluate(*inputs)
            return self._split(outputs)

    def pullback(self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], wanted: Sequence[bool]):
        """Primal gradients by the wanted inputs; the tangents are kept as in :meth:`forward`."""
        outside = RNGState.capture(self._rng.where)
        self._rng.restore()
        with _derivatives_enabled():
            indices = [i for i, want in enumerate(wanted) if want]

            def of_wanted(*some: Tensor) -> tuple[Tensor, ...]:
                full = list(inputs)
                for i, x in zip(indices, some, strict=True):
                    full[i] = x
                return self._evaluate(*full)

            pull = torch.func.vjp(of_wanted, *(inputs[i] for i in indices))[1]
            gradients = pull(tuple(cotangents))
        outside.restore()
        with _derivatives_enabled():
            return self._split(gradients)

    def tangents(self) -> tuple[Tensor | None, ...]:
        """Tangents of what was computed last."""
        found, self._tangents = tuple(self._tangents), ()
        return found

    def rebuild(self, outputs: Sequence[Tensor]) -> Any:
        """Nest the outputs as the function did."""
        flat = list(self._constants)
        for i, x in zip(self._floating, outputs, strict=True):
            flat[i] = x
        return tree_unflatten(flat, self._out_spec)

    def _evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        flat = list(self._flat)
        for i, x in zip(self._moving, inputs, strict=True):
            flat[i] = x
        with NoGradIsConstant():
            out, self._out_spec = tree_flatten(self._function(*tree_unflatten(flat, self._spec)))
        self._floating = [i for i, x in enumerate(out) if isinstance(x, Tensor) and x.is_floating_point()]
        self._constants = [None if i in set(self._floating) else x for i, x in enumerate(out)]
        return tuple(out[i] for i in self._floating)

    def _split(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if fwAD._current_level < 0:
            self._tangents = [None] * len(outputs)
            return tuple(x.view_as(x) for x in outputs)
        pairs = [fwAD.unpack_dual(x) for x in outputs]
        # Zeros where nothing moves an output: torch wants a tangent of every output of a function with moving inputs.
        self._tangents = [torch.zeros_like(x) if tangent is None else tangent for x, tangent in pairs]
        return tuple(primal.view_as(primal) for primal, _ in pairs)


class _Remat(torch.autograd.Function):
    @staticmethod
    def forward(run: _Run, *inputs: Tensor) -> tuple[Tensor, ...]:
        return run.forward(inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.run = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, *cotangents: Tensor):
        wanted = ctx.needs_input_grad[1:]
        gradients = iter(_Pullback.apply(ctx.run, wanted, len(wanted), *ctx.saved_tensors, *cotangents))
        return None, *(next(gradients) if want else None for want in wanted)

    @staticmethod
    def jvp(ctx, _run, *_tangents):
        return ctx.run.tangents()


class _Pullback(torch.autograd.Function):
    @staticmethod
    def forward(run: _Run, wanted: Sequence[bool], num_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return run.pullback(tensors[:num_inputs], tensors[num_inputs:], wanted)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.run = inputs[0]

    @staticmethod
    def jvp(ctx, *_tangents):
        return ctx.run.tangents()


@contextmanager
def _derivatives_enabled():
    """Inside an autograd function gradients and tangents are off; switch both on."""
    with torch.enable_grad(), fwAD._set_fwd_grad_enabled(True):
        yield
