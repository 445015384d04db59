"""The same derivatives by plain torch: double backward through functional calls, nothing of scalemlo."""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.families.inputs import Inputs, output_tensor

Tensors = dict[str, Tensor]
RATE, EPSILON = 0.1, 1e-2
STEP = 1e-5  # of differences, relative to the weights


def losses_of(model: Any, batch: Inputs) -> Tensor:
    """Cross entropy per example with targets that come from positions, ``[B]``."""
    logits = output_tensor(model(**batch))
    count = len(logits)
    logits = logits.reshape(count, -1, logits.shape[-1]).double()  # [B, T, C]; some models give fp32 whatever they are
    targets = (torch.arange(count)[:, None] * 5 + torch.arange(logits.shape[1]) * 3) % logits.shape[-1]
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``. Torch's own, fused, has a wrong second derivative by v (checked with finite differences)."""
    axes = [d for d in range(v.ndim) if d != dim % v.ndim] if dim != -1 else list(range(v.ndim))
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())


class Oracle:
    """Reference derivatives at one model.

    Args:
        model: Copied.
        net: Gives weights of examples; copied.
        batches: Two of the lower level and one of the upper.
    """

    def __init__(self, model: nn.Module, net: nn.Module, batches: list[Inputs]):
        self._model, self._net, self._batches = copy.deepcopy(model), copy.deepcopy(net), batches
        self.weights: Tensors = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        self._uppers: Tensors = dict(self._net.named_parameters())

    def _losses(self, weights: Tensors, batch: Inputs) -> Tensor:
        return losses_of(lambda **inputs: functional_call(self._model, weights, (), inputs), batch)

    def _lower(self, weights: Tensors, batch: Inputs) -> Tensor:
        losses = self._losses(weights, batch)
        given = self._net(losses.detach().unsqueeze(-1)).squeeze(-1)
        return (given * losses).sum() / len(losses)

    def _gradient(self, loss: Tensor, weights: Tensors, create_graph: bool = False) -> Tensors:
        found = torch.autograd.grad(
            loss, list(weights.values()), create_graph=create_graph, materialize_grads=True, allow_unused=True
        )
        return dict(zip(weights, found, strict=True))

    def products(self, v: Tensors) -> dict[str, Tensors]:
        """``hessian`` times v; the hypergradients ``identity``, ``sama`` and ``unrolled``."""
        first, second, upper = self._batches
        with sdpa_kernel(SDPBackend.MATH), mock.patch.object(torch, "_weight_norm", weight_norm):
            g = self._gradient(self._lower(self.weights, first), self.weights, create_graph=True)
            found = {"hessian": self._pull(g, v, self.weights)}
            direct = self._gradient(self._losses(self.weights, upper).mean(), self.weights)
            found["identity"] = self._pull(g, {n: -t for n, t in direct.items()}, self._uppers)
            # Adam's first step moves by -rate g / (|g| + epsilon).
            slope = {n: RATE * EPSILON / (t.detach().abs() + EPSILON) ** 2 for n, t in g.items()}
            found["sama"] = self._pull(g, {n: -slope[n] * t for n, t in direct.items()}, self._uppers)
            del g
            weights = self.weights
            for batch in (first, second):
                g = self._gradient(self._lower(weights, batch), weights, create_graph=True)
                weights = {n: w - RATE * g[n] for n, w in weights.items()}
            loss = self._losses(weights, upper).mean()
            found["unrolled"] = self._gradient(loss, self._uppers)
        return found

    def differenced(self, v: Tensors) -> dict[str, Tensors]:
        """The same as :meth:`products` by differences of first derivatives, for where torch has no second ones."""
        first, second, upper = self._batches
        with sdpa_kernel(SDPBackend.MATH):
            w, g = self.weights, self._gradient(self._lower(self.weights, first), self.weights)
            found = {"hessian": self._differenced_hessian(w, first, v)}
            direct = self._gradient(self._losses(w, upper).mean(), w)
            found["identity"] = self._differenced_mixed(w, first, {n: -t for n, t in direct.items()})
            slope = {n: RATE * EPSILON / (t.abs() + EPSILON) ** 2 for n, t in g.items()}
            found["sama"] = self._differenced_mixed(w, first, {n: -slope[n] * t for n, t in direct.items()})
            middle = self._moved(w, g, -RATE)
            g = self._gradient(self._lower(middle, second), middle)
            last = self._moved(middle, g, -RATE)
            adjoint = self._gradient(self._losses(last, upper).mean(), last)
            late = self._differenced_mixed(middle, second, {n: -RATE * t for n, t in adjoint.items()})
            adjoint = self._moved(adjoint, self._differenced_hessian(middle, second, adjoint), -RATE)
            early = self._differenced_mixed(w, first, {n: -RATE * t for n, t in adjoint.items()})
            found["unrolled"] = {n: t + early[n] for n, t in late.items()}
        return found

    @staticmethod
    def _moved(w: Tensors, u: Tensors, step: float) -> Tensors:
        return {n: (t + step * u[n]).detach().requires_grad_() for n, t in w.items()}

    def _differences(self, f: Callable[[Tensors], Tensors], w: Tensors, u: Tensors) -> Tensors:
        """``d/de f(w + e u)`` of fourth order."""
        size, length = (sum(float(t.detach().square().sum()) for t in x.values()) ** 0.5 for x in (w, u))
        h = STEP * size / length
        a, b, c, d = (f(self._moved(w, u, k * h)) for k in (1, -1, 2, -2))
        return {n: (8 * (a[n] - b[n]) - (c[n] - d[n])) / (12 * h) for n in a}

    def _differenced_hessian(self, w: Tensors, batch: Inputs, u: Tensors) -> Tensors:
        given = self._net(self._losses(w, batch).detach().unsqueeze(-1)).squeeze(-1).detach()
        return self._differences(lambda x: self._gradient((given * self._losses(x, batch)).sum() / len(given), x), w, u)

    def _differenced_mixed(self, w: Tensors, batch: Inputs, u: Tensors) -> Tensors:
        given = self._net(self._losses(w, batch).detach().unsqueeze(-1)).squeeze(-1)
        slopes = []  # of each example along u, by the gradients that training would follow
        for i in range(len(given)):
            g = self._gradient(self._losses(w, batch)[i], w)
            slopes.append(sum((g[n] * u[n]).sum() for n in u))
        return self._gradient((given * torch.stack(slopes)).sum() / len(given), self._uppers)

    @staticmethod
    def _pull(gradient: Tensors, v: Tensors, wanted: Tensors) -> Tensors:
        product = sum((g * v[n]).sum() for n, g in gradient.items() if g.requires_grad)
        found = torch.autograd.grad(
            product, list(wanted.values()), retain_graph=True, materialize_grads=True, allow_unused=True
        )
        return dict(zip(wanted, found, strict=True))
