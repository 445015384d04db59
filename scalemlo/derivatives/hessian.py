"""The Hessian of a level's loss as an operator: ``H v`` for one v after the other, nothing of H is ever formed."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from ..autodiff.errors import explained
from ..autodiff.operations import evaluation
from ..autodiff.unfollowed import second_pass
from ..distributed.shards import Shards
from ..engines.base import Engine, ParameterBlock
from .gradient_hooks import GradientHooks
from .products import Blocks, LossAt, accumulate

Tensors = dict[str, Tensor]

Products = Literal["auto", "remat", "retain"]
PRODUCTS: tuple[Products, ...] = ("auto", "remat", "retain")
"""How Hessian-vector products are had.

``remat`` takes each from the loss anew, dual numbers through rematerialised units: two units' weights are gathered at
most, activations of one unit are alive. ``retain`` runs forward and backward once, keeps the graph of both, with all
weights gathered and all activations, and takes each further product out of it at about half the time. The numbers are
equal. ``auto`` is ``retain`` where every rank holds whole weights anyway, ``remat`` where they are sharded.
"""


class HessianOperator(ABC):
    """``v -> H v``, mean over ranks and micro-batches, laid out like v. Collective."""

    def __init__(self) -> None:
        self.num_products = 0

    def __call__(self, v: Shards) -> Shards:
        """One product.

        Args:
            v: Direction.

        Returns:
            H v, a new vector.
        """
        self.num_products += 1
        return self._product(v)

    @abstractmethod
    def _product(self, v: Shards) -> Shards: ...


@contextmanager
def hessian(loss: LossAt, lower: ParameterBlock, products: Products = "auto") -> Iterator[HessianOperator]:
    """The Hessian of a loss by some parameters, while inside.

    Args:
        loss: The loss.
        lower: The parameters.
        products: See :data:`PRODUCTS`.

    Yields:
        The operator; ``retain`` frees its graph at the end.
    """
    if products == "auto":
        products = "retain" if lower.engine.group is None else "remat"
    if products == "remat":
        yield RematHessian(loss, lower)
        return
    retained = RetainedHessian(loss, lower)
    try:
        yield retained
    finally:
        retained.free()


class RematHessian(HessianOperator):
    """Forward over reverse, see :mod:`.products`."""

    def __init__(self, loss: LossAt, lower: ParameterBlock):
        super().__init__()
        self._loss, self._lower = loss, lower

    def _product(self, v: Shards) -> Shards:
        return self._loss.tangents([(self._lower, v)], {"lower": self._lower})["lower"]


class RetainedHessian(HessianOperator):
    """Reverse over reverse through a graph that is kept: ``H v = grad_w <grad_w L, v>``.

    On shards, ``grad_w L`` of this rank's loss comes out of a reduce-scatter (sum over ranks), so its inner product
    with v, differentiated, sums the ranks' products; replicated weights are averaged afterwards.
    """

    def __init__(self, loss: LossAt, lower: ParameterBlock, uppers: Blocks | None = None):
        super().__init__()
        self._loss, self._lower, self._uppers = loss, lower, dict(uppers or {})
        self._hooks = GradientHooks.of(lower)
        with explained(loss.suspects()), loss.running("graph"), torch.enable_grad():
            self._graphs = [self._linearise(batch) for batch in loss.batches]

    def _linearise(self, batch: Any) -> tuple[Tensors, dict[str, Tensors], Tensors]:
        """Leaves, upper leaves and gradient of the loss on one micro-batch."""
        weights = self._loss.weights()
        leaves = _leaves(weights, self._lower)
        uppers = {key: _leaves(weights, block) for key, block in self._uppers.items()}
        blocks = [self._lower, *self._uppers.values()]
        loss = self._loss.scale * self._loss.local_loss(batch, weights, blocks, watched=evaluation("graph"))
        gradient = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
        return leaves, uppers, {n: g for n, g in zip(leaves, gradient, strict=True) if g is not None}

    def _product(self, v: Shards) -> Shards:
        total: Tensors = {}
        pulling = self._hooks.transposed(v)
        with explained(self._loss.suspects()):
            for leaves, _, gradient in self._graphs:
                accumulate(total, _pull(gradient, pulling, leaves), len(self._graphs) * self._loss.scale)
        return self._hooks.projected(self._lower.vector(self._lower.engine.average_gradients(total)))

    def gradient(self) -> Shards:
        """The gradient whose graph is kept: mean over ranks and micro-batches, as the level's step has it."""
        total: Tensors = {}
        for leaves, _, gradient in self._graphs:
            found = {n: gradient[n].detach() if n in gradient else torch.zeros_like(t) for n, t in leaves.items()}
            accumulate(total, found, len(self._graphs) * self._loss.scale)
        return self._hooks.applied(self._lower.vector(self._lower.engine.average_gradients(total)))

    def mixed(self, v: Shards) -> dict[str, Shards]:
        """``grad_lambda <grad_w L, v>`` out of the same graph, for the upper blocks it was made with.

        Args:
            v: Direction.

        Returns:
            One vector per upper block, mean over ranks and micro-batches.
        """
        found = {}
        pulling = self._hooks.transposed(v)
        for key, block in self._uppers.items():
            total: Tensors = {}
            with explained(self._loss.suspects()):
                for _, uppers, gradient in self._graphs:
                    accumulate(total, _pull(gradient, pulling, uppers[key]), len(self._graphs) * self._loss.scale)
            found[key] = block.vector(block.engine.average_gradients(total))
        return found

    def free(self) -> None:
        """Drop the graph."""
        self._graphs.clear()


def _leaves(weights: dict[Engine, Tensors], block: ParameterBlock) -> Tensors:
    """Make the block's weights leaves of the graph, in place."""
    held = weights[block.engine]
    held |= {n: held[n].detach().requires_grad_() for n in block.names}
    return {n: held[n] for n in block.names}


def _pull(gradient: Mapping[str, Tensor], v: Shards, leaves: Mapping[str, Tensor]) -> Tensors:
    """``grad_leaves <gradient, v>``; zeros where there is no path."""
    outputs = {n: g for n, g in gradient.items() if g.requires_grad}
    if not outputs:
        return {n: torch.zeros_like(t) for n, t in leaves.items()}
    with second_pass():
        found = torch.autograd.grad(
            list(outputs.values()),
            list(leaves.values()),
            [v[n] for n in outputs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    return dict(zip(leaves, found, strict=True))
