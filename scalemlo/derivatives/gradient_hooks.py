"""Hooks that users put on weights: the training step follows what they make of the gradient.

``weight.register_hook(lambda g: g * mask)`` trains some rows of a matrix only. The update then follows M g, not g, and
its derivative is M times that of g; what pulls at it, the vector u of ``d<Mg, u>/dq``, acts as ``M'u`` on g.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..autodiff.errors import DerivativeError
from ..distributed.shards import Shards
from ..engines.base import ParameterBlock

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Linear:
    """What the hooks of one weight do to its gradient: the map, its transpose, and where it is not zero."""

    apply: Map
    transpose: Map
    support: Tensor


class GradientHooks:
    """The maps M of a block's weights, identity where there is no hook.

    Args:
        maps: By parameter name.
    """

    def __init__(self, maps: Mapping[str, _Linear]):
        self._maps = maps

    @classmethod
    def of(cls, block: ParameterBlock) -> "GradientHooks":
        """Find the hooks on the live weights.

        Args:
            block: The weights.

        Returns:
            Their maps; a hook that is not linear is a :class:`DerivativeError`.
        """
        if block.engine.group is not None:  # binding refuses hooks there: shards have another shape
            return cls({})
        parameters = {name: block.engine.parameters[name] for name in block.names}
        found = {name: _linear(p, block.engine.name, name) for name, p in parameters.items() if has_hooks(p)}
        return cls({name: x for name, x in found.items() if x is not None})

    def applied(self, gradient: Shards) -> Shards:
        """``M g``."""
        return self._mapped(gradient, lambda x: x.apply)

    def transposed(self, direction: Shards) -> Shards:
        """``M'u``."""
        return self._mapped(direction, lambda x: x.transpose)

    def projected(self, x: Shards) -> Shards:
        """Zero where M is: those weights are never moved, so they are no variables of the level."""
        return self._mapped(x, lambda found: lambda t: t * found.support)

    def _mapped(self, x: Shards, which: Callable[[_Linear], Map]) -> Shards:
        if not self._maps:
            return x
        return Shards({n: which(self._maps[n])(t) if n in self._maps else t for n, t in x.items()}, x.group)


def has_hooks(p: Tensor) -> bool:
    """Whether hooks wait for a weight's gradient."""
    return bool(p._backward_hooks) or bool(p._post_accumulate_grad_hooks)


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _linear(p: nn.Parameter, level: str, name: str) -> _Linear | None:
    hooks = [*(p._backward_hooks or {}).values()], [*(p._post_accumulate_grad_hooks or {}).values()]
    key = tuple(map(id, hooks[0] + hooks[1]))
    known = _known.get(p)
    if known is None or known[0] != key:
        _known[p] = known = key, _examined(p, *hooks, f"level '{level}': a hook on {name!r}")
    return known[1]


def _examined(p: nn.Parameter, on_gradient: list, on_parameter: list, who: str) -> _Linear | None:
    def apply(gradient: Tensor) -> Tensor:
        for hook in on_gradient:
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        if on_parameter:
            stand_in = nn.Parameter(p.detach().clone())
            stand_in.grad = gradient.clone()
            for hook in on_parameter:
                hook(stand_in)
            if stand_in.grad is None:
                raise DerivativeError(
                    f"{who} takes the gradient away (an optimizer step inside the backward pass?), so the level's own "
                    "step has none. Leave steps to the level."
                )
            gradient = stand_in.grad
        return gradient

    generator = torch.Generator(p.device).manual_seed(0)
    with torch.no_grad():
        a, b = (torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator) for _ in range(2))
        of_a, of_b, of_sum = apply(a.clone()), apply(b.clone()), apply(a + 2 * b)
        if torch.equal(of_a, a) and torch.equal(of_b, b):
            return None  # it only looks
        tolerance = 1e-2 if p.dtype in (torch.bfloat16, torch.float16) else 1e-4
        if not float((of_sum - of_a - 2 * of_b).abs().max()) <= tolerance * max(float(of_sum.abs().max()), 1e-30):
            raise DerivativeError(
                f"{who} is not linear in the gradient (clipping, signs, normalising), so the hypergradient of the "
                "update it makes is not known. Use the level's max_grad_norm, or change the gradient in the optimizer."
            )
        symmetric = abs(float((a * of_b).sum() - (of_a * b).sum())) <= 1e-3 * float(a.norm() * of_b.norm() + 1e-30)
        support = (apply(torch.ones_like(a)) != 0).to(p.dtype)

    def transpose(u: Tensor) -> Tensor:
        return apply(u) if symmetric else torch.func.vjp(apply, torch.zeros_like(u))[1](u)[0]

    return _Linear(apply, transpose, support)
