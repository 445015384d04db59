"""All-gather and reduce-scatter as differentiable functions of local shards.

They are each other's adjoint, so every derivative of either, in either mode and of any order, is made of the two.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.autograd.forward_ad as fwAD
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class AllGather(torch.autograd.Function):
    """``[n] -> [world_size * n]``: concatenate the ranks' flat shards, in a dtype of choice.

    Backward: reduce-scatter (sum) of the gradient, in the dtype of the shards. Tangent: all-gather of the tangent; of
    a dual number both parts travel in one collective.
    """

    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, tangent: list[Tensor]) -> Tensor:
        """Gather."""
        return _both_parts(x.to(dtype), partial(_all_gather, group=group), tangent)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep what the adjoint needs."""
        x, ctx.group, ctx.dtype, ctx.tangent = inputs
        ctx.shard_dtype = x.dtype

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Adjoint."""
        return ReduceScatter.apply(grad, ctx.group, ctx.shard_dtype, []), None, None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_):
        """Tangent."""
        return ctx.tangent.pop() if ctx.tangent else AllGather.apply(tangent, ctx.group, ctx.dtype, [])


class ReduceScatter(torch.autograd.Function):
    """``[world_size * n] -> [n]``: sum over ranks in a dtype of choice, each keeps its slice.

    Backward: all-gather of the gradient. Tangent: reduce-scatter of the tangent, in the same collective.
    """

    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, tangent: list[Tensor]) -> Tensor:
        """Reduce and scatter."""
        return _both_parts(x.to(dtype), partial(_reduce_scatter, group=group), tangent)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep what the adjoint needs."""
        x, ctx.group, ctx.dtype, ctx.tangent = inputs
        ctx.full_dtype = x.dtype

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Adjoint."""
        return AllGather.apply(grad, ctx.group, ctx.full_dtype, []), None, None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_):
        """Tangent."""
        return ctx.tangent.pop() if ctx.tangent else ReduceScatter.apply(tangent, ctx.group, ctx.dtype, [])


def _all_gather(parts: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """``[n]`` each -> ``[world_size * n]`` each, in one collective."""
    sent = torch.stack(list(parts))  # [k, n]
    gathered = sent.new_empty(dist.get_world_size(group), *sent.shape)  # [W, k, n]
    dist.all_gather_into_tensor(gathered.view(-1), sent.view(-1), group=group)
    return [_packed(gathered[:, i]) for i in range(len(parts))]


def _reduce_scatter(parts: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """``[world_size * n]`` each -> ``[n]`` each, in one collective."""
    sent = torch.stack([x.view(dist.get_world_size(group), -1) for x in parts], dim=1)  # [W, k, n]
    received = sent.new_empty(sent.shape[1:])
    dist.reduce_scatter_tensor(received.view(-1), sent.view(-1), group=group)
    return [_packed(received[i]) for i in range(len(parts))]


def _packed(x: Tensor) -> Tensor:
    """A flat tensor of its own: autograd lets no view carry a tangent that lies elsewhere than beside it."""
    out = x.new_empty(x.numel())
    out.view(x.shape).copy_(x)
    return out


def _both_parts(x: Tensor, collective: Callable[[Sequence[Tensor]], list[Tensor]], tangent: list[Tensor]) -> Tensor:
    """The collective of a tensor; of a dual number in one go, its tangent left in ``tangent`` for the ``jvp`` after it.

    Only plain dual numbers show their tangent here; those of torch.func's transforms come by the ``jvp`` alone.
    """
    primal, direction = x, None
    if fwAD._current_level >= 0:
        with fwAD._set_fwd_grad_enabled(True):
            primal, direction = fwAD.unpack_dual(x)
    if direction is None:
        return collective([primal.reshape(-1)])[0]
    out, moved = collective([primal.reshape(-1), direction.reshape(-1)])
    tangent.append(moved)
    return out


@dataclass(frozen=True)
class RowSharding:
    """One parameter split by rows over ``world_size`` ranks, as ``Shard(0)`` of FSDP2 does it.

    Rank r holds rows ``[r * chunk, (r + 1) * chunk)`` clipped to the shape; the last ranks may hold fewer or none.
    """

    shape: torch.Size
    world_size: int

    @property
    def chunk_rows(self) -> int:
        """Rows per rank, rounded up."""
        return -(-self.shape[0] // self.world_size)

    @property
    def row_numel(self) -> int:
        """Entries per row."""
        return self.shape[1:].numel()

    @property
    def padded_numel(self) -> int:
        """Entries per rank after padding."""
        return self.chunk_rows * self.row_numel

    def local_rows(self, rank: int) -> slice:
        """The rows that a rank holds."""
        start = min(rank * self.chunk_rows, self.shape[0])
        return slice(start, min(start + self.chunk_rows, self.shape[0]))


def gather_rows(
    shards: Mapping[str, Tensor],
    layout: Mapping[str, RowSharding],
    names: Sequence[str],
    group: dist.ProcessGroup,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Gather several row-sharded parameters of one dtype in one collective.

    Args:
        shards: Local shards by name; may be traced by any torch.func transform.
        layout: How each parameter is split.
        names: The parameters to gather; their shards have one dtype.
        group: The group they are split over.
        dtype: To gather in.

    Returns:
        Full tensors by name; differentiable, the adjoint is one reduce-scatter (sum) in the shards' dtype.
    """
    flat = []
    for name in names:
        shard = shards[name].reshape(-1)
        flat.append(F.pad(shard, (0, layout[name].padded_numel - shard.numel())))
    gathered = AllGather.apply(torch.cat(flat), group, dtype, []).view(dist.get_world_size(group), -1)  # [W, n]
    full, offset = {}, 0
    for name in names:
        spec = layout[name]
        columns = gathered[:, offset : offset + spec.padded_numel]
        rows = columns.reshape(spec.world_size * spec.chunk_rows, spec.row_numel)
        full[name] = rows[: spec.shape[0]].reshape(spec.shape)
        offset += spec.padded_numel
    return full
