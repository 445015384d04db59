"""Ghost products: ``<grad l_i, v>`` for every example i, out of the lower step's own backward pass.

Where the lower loss is a weighted mean of per-example losses, ``L = sum_i c_i l_i``, its mixed partial needs the model
only through the numbers ``d_i = <grad_w l_i, v>``. The gradient of L by a layer's weights is ``sum_i delta_i x_i^T``,
so the part of example i in ``<grad_w L, v>`` is ``<delta_i, t_i>``, where ``t_i`` is the layer's output tangent for its
weights moving along v (:mod:`.autodiff.layer_products`): for a linear layer one extra matmul beside the backward's two.
Summed over layers that part is ``c_i d_i``. No second forward, no graph of tangents, and the lower step gets its
gradient from the same pass.

It is exact under conditions that are checked at every step: the loss returned is one :func:`scalemlo.weighted_mean`,
whose weights have nothing in common with the losses in autograd's graph (neither the lower weights nor a level above);
every layer keeps examples apart along the first dimension, and so does every operation between
(:mod:`.autodiff.graph_audit`); no weight is zero. What no such check sees (a weight used past its layer, say) shows at
the first use, and at the first of every graph with operations that were not there before: products are compared with a
random sum of single examples' gradients on the live module.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..autodiff.errors import DerivativeError
from ..autodiff.graph_audit import GraphAudit, audit, shares_nodes
from ..autodiff.layer_products import is_affine, obstacle, product
from ..autodiff.skeleton import Layer
from ..distributed.group import any_rank
from ..distributed.shards import Shards
from ..engines.base import ParameterBlock
from ..ops import WeightedMeanTape, weighted_mean

WAY_OUT = "Use mixed='forward', which has no such condition."

SMALLEST_WEIGHT = {"fp32": 1e-12, "bf16": 1e-12, "fp16": 1e-2}
"""Weights smaller than this part of the batch's largest push gradients below what the compute dtype can represent."""

TOLERANCE = {"fp64": 1e-7, "fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}
"""How far products may be from those of the examples' own gradients, relative to their size, by compute dtype."""


@dataclass
class GhostProducts:
    """Collects the products of the backward passes of one lower step; see the module's docstring.

    Args:
        block: The lower level's parameters.
        v: Direction, laid out like them. Gathered unit by unit during the backward pass, once per unit; twice for the
            root's, whose layers stand at both ends of it.
    """

    block: ParameterBlock
    v: Shards
    tape: WeightedMeanTape = field(default_factory=WeightedMeanTape)
    refusal: str | None = None
    """Why these batches have no products, though their gradient is right; on every rank or on none."""
    is_mixed: bool = False
    """Whether that is because an operation mixes examples."""
    kinds: frozenset[str] = frozenset()
    """Names of the operations in the graphs of all micro-batches' losses."""
    first: Tensor | None = None
    """The products of the first micro-batch, ``[B]`` on this rank."""

    def __post_init__(self) -> None:
        self._layers = [layer for layer in self.block.engine.skeleton.layers if self._own(layer)]
        self._gathered: tuple[str, dict[str, Tensor]] | None = None
        self._start()

    def _start(self) -> None:
        self.tape = WeightedMeanTape()
        self._sizes: dict[str, int] = {}  # first dimension of the outputs, by path; of layers that were called
        self._size: int | None = None  # first dimension above 1 of the first of them: what 1 is broadcast to
        self._parts: Tensor | None = None  # [B], fp32 at least
        self._trouble: str | None = None  # the first that was seen on this rank
        self._audit: GraphAudit | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While inside, forward passes of the live module are prepared to give products in their backward.

        A module that cannot give them is a :class:`DerivativeError` on every rank, before anything has run.
        """
        self._start()
        self._check_module()
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
            DerivativeError: On every rank, if it has not on any; the pass is void then.
        """
        trouble = self._trouble or self._trouble_with(loss)
        if any_rank(trouble is not None):
            self._start()
            raise DerivativeError(f"ghost products {trouble or 'do not apply on another rank'}. {WAY_OUT}")
        losses = self.tape.losses
        assert losses is not None, "else there is trouble"
        found, self._audit = self._audit, None  # it holds the graph, whose taps hold this object
        assert found is not None, "made when there was no trouble"
        self.kinds |= found.kinds
        if any_rank(found.mixing is not None):
            self.is_mixed, what = True, found.mixing or "on another rank"
            self.refusal = f"ghost products: an operation of these losses mixes examples ({what}). {WAY_OUT}"
        (self._coefficients,) = torch.autograd.grad(loss, losses, retain_graph=True)  # c_i
        sizes = self._coefficients.abs()
        floor = SMALLEST_WEIGHT[self.block.engine.spec.dtype] * sizes.max()
        if any_rank(bool((sizes <= floor).any())):
            self.refusal = (
                f"ghost products need weights above zero; an example's weight is exactly 0 or next to. {WAY_OUT}"
            )

    def upper_loss(self, scale: float) -> Tensor:
        """After the backward: the scalar whose gradient by the upper parameters is the mixed partial.

        Args:
            scale: What the loss was multiplied with before its backward.

        Returns:
            ``sum_i c_i(lambda) d_i``, differentiable in the weights; a constant where there is a ``refusal``.
        """
        # The graph's taps refer to this object: it must not refer to the graph, or neither would ever be freed.
        tape, parts, trouble = self.tape, self._parts, self._trouble
        self._gathered = None
        self._start()
        assert tape.weights is not None
        if self.refusal is None:
            assert parts is not None or trouble is not None
            products = tape.weights if parts is None else parts / (scale * self._coefficients.to(parts.dtype))  # d_i
            self.first = products.detach() if self.first is None else self.first
            if trouble is None and not bool(products.isfinite().all()):
                trouble = "overflowed"
            if not any_rank(trouble is not None):
                return weighted_mean(products.to(tape.weights.dtype), tape.weights, normalize=tape.normalize)
            self.refusal = f"ghost products {trouble or 'failed on another rank'}. {WAY_OUT}"
        return tape.weights.new_zeros(())

    # ---- conditions ------------------------------------------------------------------------------------------------
    def _check_module(self) -> None:
        engine = self.block.engine
        for layer in self._layers:
            reason = obstacle(engine.skeleton.module.get_submodule(layer.path))
            if reason is not None:
                raise DerivativeError(f"ghost products: {layer.path!r} {reason}. {WAY_OUT}")
        for name, m in engine.module.named_modules():
            if isinstance(m, _NormBase) and m.training and m.track_running_stats:
                raise DerivativeError(
                    f"ghost products: {name!r} makes losses of one example depend on others. {WAY_OUT}"
                )
            if getattr(m, "gradient_checkpointing", False) and m.training:
                raise DerivativeError(f"ghost products keep the inputs that gradient checkpointing frees. {WAY_OUT}")

    def _trouble_with(self, loss: Tensor) -> str | None:
        tape = self.tape
        if tape.result is None or loss is not tape.result:
            return (
                "need a loss that returns scalemlo.weighted_mean(losses, weights) as it is, nothing added and no factor"
            )
        assert tape.losses is not None and tape.weights is not None
        if not tape.losses.requires_grad:
            return "need losses that depend on the lower weights"
        self._audit = audit(tape.losses, tape.losses.shape[0])
        if tape.weights.requires_grad and shares_nodes(tape.weights, self._audit.nodes):
            return (
                "need weights that depend on levels above alone, and losses that depend on none of them; detach what "
                "the weights are computed from"
            )
        idle = [n for layer in self._layers if layer.path not in self._sizes for n in layer.parameters.values()]
        if idle:
            return f"miss something: the modules that hold {idle[:5]} were not called, their weights are used directly"
        num_examples = tape.losses.shape[0]
        for path, size in self._sizes.items():
            if size != num_examples:
                return f"see {size} in the first dimension of the output of {path!r}, not the {num_examples} examples"
        return None

    # ---- in the forward and backward passes ------------------------------------------------------------------------
    def _tap(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        if not isinstance(output, Tensor) or len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            kind = type(module).__name__
            self._note(f"know layers of one tensor in and one out, not {kind} ({layer.path!r})")
            return None
        if not output.requires_grad or output.dim() == 0:
            return None
        size = output.shape[0]
        if size == 1 and self._size is not None and isinstance(module, nn.Embedding):
            size = self._size  # positions, broadcast over the batch later on: let each example have its own
            output = output.expand(size, *output.shape[1:])
        elif size > 1 and self._size is None:
            self._size = size
        self._sizes[layer.path] = size if self._sizes.get(layer.path, size) == size else -1
        output.register_hook(_Call(args[0], partial(self._collect, layer)))
        return output

    def _collect(self, layer: Layer, x: Tensor | None, delta: Tensor) -> None:
        if self.refusal is not None:
            return
        engine = self.block.engine
        module, live = engine.skeleton.module.get_submodule(layer.path), engine.module.get_submodule(layer.path)
        weights: Mapping[str, Tensor] = {}
        if not is_affine(module):
            full = engine.gather({name: engine.local(name) for name in layer.parameters.values()})
            weights = {attribute: full[name] for attribute, name in layer.parameters.items()}
            for m, source in zip(module.modules(), live.modules(), strict=True):
                m.training = source.training
        vectors = self._vectors(layer.unit)
        own = {attribute: vectors[name] for attribute, name in self._own(layer).items()}
        # From here on no collective: what goes wrong may do so on one rank only.
        if x is None:
            self._note(f"went through {layer.path!r} twice, or its input was changed in place")
        if x is None or self._trouble is not None:
            return
        try:
            part = product(module, own, x, delta, weights=weights, buffers=dict(live.named_buffers()))
        except Exception as error:  # of a foreign module; an error out of a backward would leave the ranks apart
            self._note(f"have no rule for {type(module).__name__} ({layer.path!r}): {error}")
            return
        self._parts = part if self._parts is None else self._parts + part

    def _note(self, trouble: str) -> None:
        self._trouble = self._trouble or trouble

    def _vectors(self, unit: str) -> dict[str, Tensor]:
        """Vectors of one unit; at most one unit's is gathered."""
        if self._gathered is None or self._gathered[0] != unit:
            self._gathered = None
            names = {n for layer in self._layers if layer.unit == unit for n in self._own(layer).values()}
            self._gathered = unit, self.block.engine.gather({n: t for n, t in self.v.items() if n in names})
        return self._gathered[1]

    def _own(self, layer: Layer) -> dict[str, str]:
        return {attribute: name for attribute, name in layer.parameters.items() if name in self.v}


class _Call:
    """A hook on a layer's output: hands its gradient to a collector, with the input, which is dropped then."""

    def __init__(self, x: Tensor, collect):
        self._x: Tensor | None = x.detach()
        self._version, self._collect = x._version, collect

    def __call__(self, delta: Tensor) -> None:
        x, self._x = self._x, None
        if x is not None and x._version != self._version:
            x = None
        with torch.no_grad():
            self._collect(x, delta)


def disagreement(error: float, limit: float) -> str:
    """What a difference above the limit means."""
    return (
        f"ghost products differ from those of single examples' gradients by {error:.1e} of their size (limit "
        f"{limit:.0e}): the losses of different examples depend on each other, or a weight is used past its layer"
    )
