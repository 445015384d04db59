"""All-gather and reduce-scatter of row-sharded parameters as differentiable functions of the local shards.

They are each other's adjoint, so every derivative of either, in either mode and of any order, is made of the two. Of
dual numbers both parts travel in one collective.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as fwAD
import torch.distributed as dist
from torch import Tensor


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
        return math.prod(self.shape[1:])

    @property
    def padded_numel(self) -> int:
        """Entries per rank after padding."""
        return self.chunk_rows * self.row_numel

    def local_rows(self, rank: int) -> slice:
        """The rows that a rank holds."""
        start = min(rank * self.chunk_rows, self.shape[0])
        return slice(start, min(start + self.chunk_rows, self.shape[0]))


@dataclass(frozen=True)
class Packing:
    """How the shards of several parameters lie in one flat buffer per rank.

    Args:
        layouts: Of the parameters, in order.
        group: The group they are split over.
        gathered_dtype: Of full tensors.
        sharded_dtype: Of shards.
        tangents_only: Whether the adjoint of dual numbers reduces tangents alone; gradients are then zero.
    """

    layouts: tuple[RowSharding, ...]
    group: dist.ProcessGroup
    gathered_dtype: torch.dtype
    sharded_dtype: torch.dtype
    tangents_only: bool = False

    @property
    def world_size(self) -> int:
        """Ranks of the group."""
        return dist.get_world_size(self.group)

    @property
    def numel(self) -> int:
        """Entries per rank."""
        return sum(layout.padded_numel for layout in self.layouts)

    def slots(self, buffer: Tensor) -> list[Tensor]:
        """Views ``[..., chunk_rows, row_numel]`` of a buffer ``[..., numel]``, one per parameter."""
        sizes = [layout.padded_numel for layout in self.layouts]
        parts = buffer.split(sizes, dim=-1)
        return [part.unflatten(-1, (x.chunk_rows, x.row_numel)) for part, x in zip(parts, self.layouts, strict=True)]

    def gather(self, parts: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Shards to full tensors, for k vectors at once: one collective.

        Args:
            parts: k lists of shards.

        Returns:
            k lists of full tensors, each a tensor of its own: autograd lets no view carry a tangent that lies
            elsewhere than beside it.
        """
        if self.world_size == 1:
            return [[t.detach().to(self.gathered_dtype) for t in shards] for shards in parts]
        sent = parts[0][0].new_empty(len(parts), self.numel, dtype=self.gathered_dtype)
        for buffer, shards in zip(sent, parts, strict=True):
            for slot, shard in zip(self.slots(buffer), shards, strict=True):
                rows = shard.shape[0]  # may be none on the last ranks
                slot[:rows].copy_(shard.reshape(rows, slot.shape[1]))
                slot[rows:].zero_()
        gathered = sent.new_empty(self.world_size, *sent.shape)  # [W, k, n]
        dist.all_gather_into_tensor(gathered.view(-1), sent.view(-1), group=self.group)
        del sent
        return [[_unsplit(slot, x) for slot, x in zip(self.slots(gathered[:, i]), self.layouts, strict=True)]
                for i in range(len(parts))]  # fmt: skip

    def reduce_scatter(self, parts: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Full tensors to the sum over ranks of their shards, for k vectors at once: one collective.

        Args:
            parts: k lists of full tensors.

        Returns:
            k lists of shards.
        """
        if self.world_size == 1:
            return [[t.detach().to(self.sharded_dtype) for t in full] for full in parts]
        sent = parts[0][0].new_zeros(self.world_size, len(parts), self.numel, dtype=self.sharded_dtype)  # [W, k, n]
        for i, full in enumerate(parts):
            for slot, t, x in zip(self.slots(sent[:, i]), full, self.layouts, strict=True):
                _split(t, x, slot)
        received = sent.new_empty(sent.shape[1:])
        dist.reduce_scatter_tensor(received.view(-1), sent.view(-1), group=self.group)
        del sent
        mine = [x.local_rows(dist.get_rank(self.group)) for x in self.layouts]
        return [
            [
                slot[: rows.stop - rows.start].reshape(rows.stop - rows.start, *x.shape[1:]).clone()
                for slot, rows, x in zip(self.slots(buffer), mine, self.layouts, strict=True)
            ]
            for buffer in received
        ]


def _unsplit(slot: Tensor, layout: RowSharding) -> Tensor:
    """``[W, chunk_rows, row_numel]`` to the parameter's shape, without the padding of the last ranks."""
    full = slot.new_empty(layout.shape)
    for rows, part in _blocks(full.view(layout.shape[0], layout.row_numel), layout, slot):
        rows.copy_(part)
    return full


def _split(full: Tensor, layout: RowSharding, slot: Tensor) -> None:
    """The inverse, into a slot whose padding stays."""
    for rows, part in _blocks(full.reshape(layout.shape[0], layout.row_numel), layout, slot):
        part.copy_(rows)


def _blocks(rows: Tensor, layout: RowSharding, slot: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a parameter and the part of a slot that holds them: those of all full ranks at once, then the rest."""
    chunk = layout.chunk_rows
    num_full = layout.shape[0] // chunk if chunk else 0
    rest = layout.shape[0] - num_full * chunk
    if num_full:
        yield rows[: num_full * chunk].unflatten(0, (num_full, chunk)), slot[:num_full]
    if rest:
        yield rows[num_full * chunk :], slot[num_full, :rest]


class GatherRows(torch.autograd.Function):
    """Shards of several parameters to full tensors.

    Backward: :class:`ReduceScatterRows` of the gradients. Tangent: gathered with the values.
    """

    @staticmethod
    def forward(packing: Packing, tangents: list[Tensor], *shards: Tensor) -> tuple[Tensor, ...]:
        """Gather."""
        values, directions = _split_duals(shards)
        found = packing.gather([values] if directions is None else [values, directions])
        tangents.extend(found[1] if directions is not None else ())
        return tuple(found[0])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep what the derivatives need."""
        ctx.packing, ctx.tangents = inputs[:2]

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        """Adjoint."""
        return None, None, *ReduceScatterRows.apply(ctx.packing, [], *gradients)

    @staticmethod
    def jvp(ctx, _packing, _tangents, *directions: Tensor):
        """Tangent: there already, of plain dual numbers; those of torch.func's transforms come here alone."""
        return _taken(ctx.tangents) or GatherRows.apply(ctx.packing, [], *directions)


class ReduceScatterRows(torch.autograd.Function):
    """Full tensors of several parameters to the sum over ranks of this rank's rows.

    Backward: :class:`GatherRows` of the gradients. Tangent: reduced with the values.
    """

    @staticmethod
    def forward(packing: Packing, tangents: list[Tensor], *full: Tensor) -> tuple[Tensor, ...]:
        """Reduce and scatter."""
        values, directions = _split_duals(full)
        if directions is None:
            return tuple(packing.reduce_scatter([values])[0])
        if packing.tangents_only:
            (found,) = packing.reduce_scatter([directions])
            tangents.extend(found)
            return tuple(torch.zeros_like(t) for t in found)
        found, moved = packing.reduce_scatter([values, directions])
        tangents.extend(moved)
        return tuple(found)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep what the derivatives need."""
        ctx.packing, ctx.tangents = inputs[:2]

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        """Adjoint."""
        return None, None, *GatherRows.apply(ctx.packing, [], *gradients)

    @staticmethod
    def jvp(ctx, _packing, _tangents, *directions: Tensor):
        """Tangent, see :meth:`GatherRows.jvp`."""
        return _taken(ctx.tangents) or ReduceScatterRows.apply(ctx.packing, [], *directions)


def _split_duals(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Values, and directions where at least one tensor is a plain dual number."""
    if fwAD._current_level < 0:
        return list(tensors), None
    with fwAD._set_fwd_grad_enabled(True):
        pairs = [fwAD.unpack_dual(t) for t in tensors]
    values = [primal for primal, _ in pairs]
    if all(tangent is None for _, tangent in pairs):
        return values, None
    return values, [torch.zeros_like(x) if tangent is None else tangent for x, tangent in pairs]


def _taken(tangents: list[Tensor]) -> tuple[Tensor, ...]:
    found = tuple(tangents)
    tangents.clear()
    return found


def gather_rows(
    shards: Mapping[str, Tensor],
    layout: Mapping[str, RowSharding],
    group: dist.ProcessGroup,
    dtype: torch.dtype,
    *,
    tangents_only: bool = False,
) -> dict[str, Tensor]:
    """Gather several row-sharded parameters of one dtype in one collective.

    Args:
        shards: Local shards by name, of one dtype; may be dual numbers or traced by any torch.func transform.
        layout: How each parameter is split.
        group: The group they are split over.
        dtype: To gather in.
        tangents_only: See :class:`Packing`.

    Returns:
        Full tensors by name; differentiable, the adjoint is one reduce-scatter (sum) in the shards' dtype.
    """
    sharded = next(iter(shards.values())).dtype
    packing = Packing(tuple(layout[name] for name in shards), group, dtype, sharded, tangents_only)
    return dict(zip(shards, GatherRows.apply(packing, [], *shards.values()), strict=True))
