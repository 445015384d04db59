"""Ghost products: ``<grad l_i, v>`` for every example i, out of the lower step's own backward pass.

Where the lower loss is a weighted mean of per-example losses, ``L = sum_i c_i l_i``, its mixed partial needs the model
only through the numbers ``d_i = <grad_w l_i, v>``. The gradient of L by a layer's weights is ``sum_i delta_i x_i^T``,
so the part of example i in ``<grad_w L, v>`` is ``<delta_i, t_i>``, where ``t_i`` is the layer's output tangent for
its weights moving along v (``x_i V^T`` for a linear layer): one extra matmul beside the backward's two. Summed over
layers that part is ``c_i d_i``. No second forward, no graph of tangents, and the lower step gets its gradient from the
same pass.

It is exact under conditions that are checked: the loss returned is one :func:`scalemlo.weighted_mean`, whose weights do
not depend on the lower weights; every layer keeps examples apart along the first dimension; no weight is exactly zero.
The first use is compared with the forward derivative.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..distributed import any_rank
from ..engines.base import ParameterBlock
from ..ops import WeightedMeanTape, weighted_mean
from ..shards import Shards
from .errors import DerivativeError
from .skeleton import Layer

WAY_OUT = "Use mixed='forward', which has no such condition."


@dataclass
class GhostProducts:
    """Collects the products of one backward pass of the lower level; see the module's docstring.

    Args:
        block: The lower level's parameters.
        v: Direction, laid out like them. Gathered unit by unit during the backward pass; two gathers for the root's
            unit, whose layers stand at both ends of it.
    """

    block: ParameterBlock
    v: Shards
    tape: WeightedMeanTape = field(default_factory=WeightedMeanTape)

    def __post_init__(self) -> None:
        engine = self.block.engine
        self._layers = [layer for layer in engine.skeleton.layers if self._own(layer)]
        self._called: set[str] = set()
        self._gathered: tuple[str, dict[str, Tensor]] | None = None
        self._parts: Tensor | None = None  # [B], fp32

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While inside, forward passes of the live module are prepared to give products in their backward."""
        self._parts, self.tape, self._called = None, WeightedMeanTape(), set()
        module = self.block.engine.module
        with ExitStack() as stack:
            for layer in self._layers:
                hook = partial(self._tap, layer)
                stack.callback(module.get_submodule(layer.path).register_forward_hook(hook, with_kwargs=True).remove)
            stack.enter_context(self.tape.recording())
            yield

    def check(self, loss: Tensor) -> None:
        """Check, before the backward, that the loss has the form that products can be read from.

        Args:
            loss: What the level's loss returned.

        Raises:
            DerivativeError: If it has not.
        """
        tape = self.tape
        if tape.result is None or loss is not tape.result:
            raise DerivativeError(
                "ghost products need a loss that returns scalemlo.weighted_mean(losses, weights) as it is, nothing "
                f"added and no factor. {WAY_OUT}"
            )
        assert tape.losses is not None and tape.weights is not None
        if tape.weights.requires_grad:
            through = torch.autograd.grad(tape.weights.sum(), tape.losses, allow_unused=True, retain_graph=True)[0]
            if through is not None:
                raise DerivativeError(
                    f"ghost products need weights that do not depend on the lower weights; detach the losses. {WAY_OUT}"
                )
        self._size = tape.losses.shape[0]
        (self._coefficients,) = torch.autograd.grad(loss, tape.losses, retain_graph=True)  # c_i
        if any_rank(bool((self._coefficients == 0).any())):
            raise DerivativeError(
                f"ghost products need weights above zero; an example's weight is exactly 0. {WAY_OUT}"
            )
        idle = [name for layer in self._layers if layer.path not in self._called for name in layer.parameters.values()]
        if idle:
            raise DerivativeError(
                f"ghost products: the modules that hold {idle[:5]} were not called; something uses their weights "
                f"directly. {WAY_OUT}"
            )

    def upper_loss(self, scale: float) -> Tensor:
        """After the backward: the scalar whose gradient by the upper parameters is the mixed partial.

        Args:
            scale: What the loss was multiplied with before its backward.

        Returns:
            ``sum_i c_i(lambda) d_i``, differentiable in the weights.
        """
        self._gathered = None
        # The graph's taps refer to this object: it must not refer to the graph, or neither would ever be freed.
        tape, self.tape = self.tape, WeightedMeanTape()
        assert self._parts is not None and tape.weights is not None
        products = self._parts / (scale * self._coefficients.to(self._parts.dtype))  # d_i
        return weighted_mean(products.to(tape.weights.dtype), tape.weights, normalize=tape.normalize)

    # ---- in the backward pass --------------------------------------------------------------------------------------
    def _tap(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        self._called.add(layer.path)
        if not isinstance(output, Tensor) or len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise DerivativeError(
                f"ghost products know layers of one tensor in and one out, not {type(module).__name__} "
                f"({layer.path!r}). {WAY_OUT}"
            )
        return _Tap.apply(output, args[0].detach(), partial(self._collect, layer))

    def _collect(self, layer: Layer, x: Tensor, delta: Tensor) -> None:
        if delta.shape[0] != self._size:
            raise DerivativeError(
                f"ghost products: the output of {layer.path!r} has first dimension {delta.shape[0]}, not the "
                f"{self._size} examples of the batch. {WAY_OUT}"
            )
        tangent = self._tangent(layer, x, delta.dtype)
        part = (delta * tangent).flatten(1).sum(1, dtype=torch.promote_types(delta.dtype, torch.float32))
        self._parts = part if self._parts is None else self._parts + part

    def _tangent(self, layer: Layer, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer's output tangent at fixed input, for its own parameters moving along v."""
        vectors = self._vectors(layer.unit)
        own = {attribute: vectors[name].to(dtype) for attribute, name in self._own(layer).items()}
        module = self.block.engine.skeleton.module.get_submodule(layer.path)
        if type(module) is nn.Linear and "weight" in own:
            return F.linear(x.to(dtype), own["weight"], own.get("bias"))
        if type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
            tangent = F.embedding(x, own["weight"])
            if module.padding_idx is not None:  # that row gets no gradient
                tangent = tangent.masked_fill((x == module.padding_idx).unsqueeze(-1), 0.0)
            return tangent
        return self._tangent_by_jvp(layer, module, x, own)

    def _tangent_by_jvp(self, layer: Layer, module: nn.Module, x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """For norms and whatever else: small modules, whose forward derivative by their parameters is cheap."""
        if any(True for _ in module.children()):
            raise DerivativeError(f"ghost products: {layer.path!r} holds weights beside submodules. {WAY_OUT}")
        engine = self.block.engine
        full = engine.gather({name: engine.local(name) for name in layer.parameters.values()})
        weights = {attribute: full[name] for attribute, name in layer.parameters.items()}
        fixed = {a: t for a, t in weights.items() if a not in own}
        moving = {a: weights[a] for a in own}
        tangents = {a: t.to(moving[a].dtype) for a, t in own.items()}

        def call(parameters: Mapping[str, Tensor]) -> Tensor:
            buffers = {name: b.clone() for name, b in module.named_buffers()}  # running statistics stay as they are
            return functional_call(module, {**buffers, **fixed, **parameters}, (x,))

        return torch.func.jvp(call, (moving,), (tangents,))[1]

    def _vectors(self, unit: str) -> dict[str, Tensor]:
        """Vectors of one unit; at most one unit's is gathered."""
        if self._gathered is None or self._gathered[0] != unit:
            self._gathered = None
            names = {n for layer in self._layers if layer.unit == unit for n in self._own(layer).values()}
            self._gathered = unit, self.block.engine.gather({n: t for n, t in self.v.items() if n in names})
        return self._gathered[1]

    def _own(self, layer: Layer) -> dict[str, str]:
        return {attribute: name for attribute, name in layer.parameters.items() if name in self.v}


TOLERANCE = {"fp32": 1e-3, "bf16": 1e-1, "fp16": 1e-1}
"""How far the first use may be from the forward derivative, relative to it, by compute dtype."""


def check_products(found: Mapping[str, Shards], expected: Mapping[str, Shards], level: str, dtype: str) -> None:
    """Compare mixed partials by ghost products with those by the forward derivative.

    What no shape shows is found out here: losses that mix examples (batch normalisation, in-batch negatives).

    Args:
        found: By ghost products.
        expected: By the forward derivative.
        level: Name for messages.
        dtype: Compute dtype, see :data:`TOLERANCE`.

    Raises:
        DerivativeError: If they differ.
    """
    for upper in expected:
        error = float((found[upper] - expected[upper]).norm())
        size = float(expected[upper].norm())
        if not error <= TOLERANCE[dtype] * size:
            raise DerivativeError(
                f"level {level!r}: ghost products differ from the forward derivative by {error / max(size, 1e-300):.1e}"
                f" of its size (limit {TOLERANCE[dtype]:.0e}); the losses of different examples depend on each other, "
                f"or a layer does more than its weights say. {WAY_OUT}"
            )


class _Tap(torch.autograd.Function):
    """The identity; its backward shows the output's gradient to a collector."""

    @staticmethod
    def forward(ctx, output: Tensor, x: Tensor, collect) -> Tensor:
        ctx.save_for_backward(x)
        ctx.collect = collect
        return output.view_as(output)

    @staticmethod
    def backward(ctx, delta: Tensor):
        with torch.no_grad():
            ctx.collect(ctx.saved_tensors[0], delta)
        return delta, None, None
