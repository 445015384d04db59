"""All-gather and reduce-scatter as differentiable functions of local shards.

They are each other's adjoint, so every derivative of either, in either mode and of any order, is made of the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class AllGather(torch.autograd.Function):
    """``[n] -> [world_size * n]``: concatenate the ranks' flat shards.

    Backward: reduce-scatter (sum) of the gradient. Tangent: all-gather of the tangent.
    """

    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Gather."""
        out = x.new_empty(dist.get_world_size(group) * x.numel())
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep the group."""
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Adjoint."""
        return ReduceScatter.apply(grad, ctx.group), None

    @staticmethod
    def jvp(ctx, tangent: Tensor, _):
        """Tangent."""
        return AllGather.apply(tangent, ctx.group)


class ReduceScatter(torch.autograd.Function):
    """``[world_size * n] -> [n]``: sum over ranks, each keeps its slice.

    Backward: all-gather of the gradient. Tangent: reduce-scatter of the tangent.
    """

    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Reduce and scatter."""
        out = x.new_empty(x.numel() // dist.get_world_size(group))
        dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep the group."""
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Adjoint."""
        return AllGather.apply(grad, ctx.group), None

    @staticmethod
    def jvp(ctx, tangent: Tensor, _):
        """Tangent."""
        return ReduceScatter.apply(tangent, ctx.group)


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
    shards: Mapping[str, Tensor], layout: Mapping[str, RowSharding], names: Sequence[str], group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """Gather several row-sharded parameters of one dtype in one collective.

    Args:
        shards: Local shards by name; may be traced by any torch.func transform.
        layout: How each parameter is split.
        names: The parameters to gather; their shards have one dtype.
        group: The group they are split over.

    Returns:
        Full tensors by name; differentiable, the adjoint is one reduce-scatter (sum).
    """
    flat = []
    for name in names:
        shard = shards[name].reshape(-1)
        flat.append(F.pad(shard, (0, layout[name].padded_numel - shard.numel())))
    gathered = AllGather.apply(torch.cat(flat), group).view(dist.get_world_size(group), -1)  # [W, n]
    full, offset = {}, 0
    for name in names:
        spec = layout[name]
        columns = gathered[:, offset : offset + spec.padded_numel]
        rows = columns.reshape(spec.world_size * spec.chunk_rows, spec.row_numel)
        full[name] = rows[: spec.shape[0]].reshape(spec.shape)
        offset += spec.padded_numel
    return full
