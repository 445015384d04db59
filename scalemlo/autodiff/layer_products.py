"""One layer's part of ``<grad l_i, v>`` for every example i, from its input and the gradient of its output.

With input x_i, output gradient delta_i and the layer's own parameters moving along v, that part is ``<delta_i, t_i>``,
where ``t_i = d/de layer(x_i; w + e v)`` is the output's tangent at fixed input. Three kinds of layers:

- linear in its parameters (a matmul, a convolution, a lookup, a norm): t_i is the layer run with v for parameters;
- affine in them (the RMSNorms of transformers, also those that add one to the weight): the forward derivative at any
  weights, so at zero;
- any other: the forward derivative at the weights, which must be gathered.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

LINEAR_IN_PARAMETERS = frozenset(
    (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    + (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
)


def obstacle(module: nn.Module) -> str | None:
    """Why a module that holds parameters has no such part, known before it runs.

    Args:
        module: The layer, or its skeleton.

    Returns:
        A clause about the module, or None.
    """
    if any(True for child in module.children() for _ in child.parameters()):
        return "holds weights beside submodules that hold some"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and (module.max_norm or module.scale_grad_by_freq):
        return "changes its weights or scales their gradients (max_norm, scale_grad_by_freq)"
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether the output is linear in all the parameters together; subclasses may do anything, so exact types."""
    return type(module) in LINEAR_IN_PARAMETERS or _is_conv1d_of_transformers(module)


def is_affine(module: nn.Module) -> bool:
    """Whether the output's tangent is the same at all weights."""
    return is_linear(module) or type(module).__name__.endswith("RMSNorm")


def product(
    module: nn.Module,
    direction: Mapping[str, Tensor],
    x: Tensor,
    delta: Tensor,
    *,
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> Tensor:
    """``<delta_i, t_i>`` for every example.

    Args:
        module: The layer's structure; its parameters are not read.
        direction: v by attribute, for the parameters that move.
        x: Input, examples along the first dimension.
        delta: Gradient of the output, likewise.
        weights: By attribute; needed only where the layer is not affine.
        buffers: By attribute.

    Returns:
        ``[B]``, at least fp32.
    """
    dtype = delta.dtype
    moving = {a: t.to(dtype) for a, t in direction.items()}
    if not is_linear(module):
        return _dot(delta, _tangent(module, moving, x, weights, buffers))
    if x.is_floating_point():
        x = x.to(dtype)
    if isinstance(module, nn.Embedding):
        tangent = F.embedding(x, moving["weight"])
        if module.padding_idx is not None:  # that row gets no gradient
            tangent = tangent.masked_fill((x == module.padding_idx).unsqueeze(-1), 0.0)
        return _dot(delta, tangent)
    if type(module) is nn.Linear or _is_conv1d_of_transformers(module):
        return _of_matmul(moving, x, delta, transposed=type(module) is not nn.Linear)
    return _dot(delta, functional_call(module, _filled(module, moving, dtype, delta.device), (x,)))


def _of_matmul(direction: Mapping[str, Tensor], x: Tensor, delta: Tensor, *, transposed: bool) -> Tensor:
    """``<delta_i, x_i V^T + b>``; the product with V is taken on the side that leaves the smaller tensor."""
    v, bias = direction.get("weight"), direction.get("bias")
    if v is not None and transposed:
        v = v.t()
    total = None
    if v is not None and v.shape[0] <= v.shape[1]:
        return _dot(delta, F.linear(x, v, bias))
    if v is not None:
        total = _dot(x, delta @ v)
    if bias is not None:
        part = _dot(delta @ bias, None)
        total = part if total is None else total + part
    assert total is not None
    return total


def _tangent(module: nn.Module, direction: Mapping[str, Tensor], x: Tensor, weights, buffers) -> Tensor:
    """Forward derivative by the layer's parameters."""
    if is_affine(module):
        weights = _filled(module, {}, next(iter(direction.values())).dtype, x.device)
    point = {a: weights[a] for a in direction}
    constant = {a: t for a, t in weights.items() if a not in direction}
    tangents = {a: t.to(point[a].dtype) for a, t in direction.items()}

    def call(parameters: Mapping[str, Tensor]) -> Tensor:
        copies = {name: b.clone() for name, b in buffers.items()}  # running statistics stay as they are
        return functional_call(module, {**copies, **constant, **parameters}, (x,))

    return torch.func.jvp(call, (point,), (tangents,))[1]


def _filled(module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, device) -> dict[str, Tensor]:
    """Some parameters of a module, the others zero."""
    return {
        a: tensors[a] if a in tensors else torch.zeros(p.shape, dtype=dtype, device=device)
        for a, p in module.named_parameters(recurse=False)
    }


def _dot(a: Tensor, b: Tensor | None) -> Tensor:
    """``[B, ...] -> [B]``: inner product of each example, or the sum of its entries, added up in fp32 at least."""
    entries = a if b is None else a * b
    return entries.reshape(len(a), -1).sum(1, dtype=torch.promote_types(a.dtype, torch.float32))


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    """A linear layer with its weight transposed, ``[in, out]``; transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
