"""Values that a training step computes with and does not differentiate, though they move with the weights.

A row of an embedding that is padding gets no gradient through its lookup; the looked-up value depends on it all the
same. So the update's direction g is no gradient: it is the derivative of the loss by one occurrence of the weights, p,
at a point where another occurrence, q, equals p. What a hypergradient needs of g is ``d<g, u>/dw`` for a vector u: with
tangents of p alone, and derivatives by both. :func:`unfollowed` marks q: it carries no tangent, its gradient is zero,
and the derivative of the gradient passes through it::

    forward:   (x, dx) -> (x, 0)            reverse, of dual numbers:   (g, dg) -> (0, dg)

In reverse over reverse the same is had by what each of the two passes does: the first lets nothing through, the second
everything. ``detach()`` is no such value: by this project's convention it is a constant of every derivative.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Pass:
    """Which backward pass is running; of the process, since a backward has threads of its own."""

    is_second = False


@contextmanager
def second_pass() -> Iterator[None]:
    """A backward pass that differentiates a gradient, not the loss.

    Yields:
        Nothing.
    """
    _Pass.is_second = True
    try:
        yield
    finally:
        _Pass.is_second = False


def inert_in_second_pass(hook: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
    """A hook on a gradient that does nothing where a gradient is differentiated: there it would act twice."""
    return lambda gradient: None if _Pass.is_second else hook(gradient)


def unfollowed(x: Tensor) -> Tensor:
    """See the module's docstring.

    Args:
        x: Any floating-point tensor.

    Returns:
        A copy of it.
    """
    return _Unfollowed.apply(x)


class _Unfollowed(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        return None

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return torch.zeros_like(tangent)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient if _Pass.is_second else _Pull.apply(gradient)


class _Pull(torch.autograd.Function):
    """``(g, dg) -> (0, dg)``."""

    @staticmethod
    def forward(gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        return None

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return tangent.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)
