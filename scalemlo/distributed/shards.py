"""A vector over a level's parameters, held as one local shard per parameter."""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .group import communication_device


class Shards(Mapping[str, Tensor]):
    """Vector algebra on ``{parameter name: local shard}``.

    The shapes are those of the local shards: whole parameters where the engine replicates them, slices where it
    shards them. Elementwise operations are local; :meth:`dot` and :meth:`norm` know how to reduce.

    Args:
        tensors: Local shards by parameter name.
        group: The process group the vector is split over, or None where every rank holds the whole of it. Sums over
            entries are all-reduced (sum) over this group and not at all without one: a replicated vector must not be
            counted once per rank.
    """

    def __init__(self, tensors: Mapping[str, Tensor], group: "dist.ProcessGroup | None" = None):
        self._tensors = dict(tensors)
        self.group = group

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        kind = "replicated" if self.group is None else f"sharded over {dist.get_world_size(self.group)}"
        return f"Shards({len(self)} tensors, {self.nbytes} bytes here, {kind})"

    @property
    def nbytes(self) -> int:
        """Bytes held by this rank."""
        return sum(t.numel() * t.element_size() for t in self.values())

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Shards":
        """Apply a function to every local shard."""
        return Shards({name: fn(t) for name, t in self.items()}, self.group)

    def clone(self) -> "Shards":
        """Copy the local shards."""
        return self.map(torch.clone)

    def __add__(self, other: "Shards") -> "Shards":
        return self._zip(other, torch.add)

    def __sub__(self, other: "Shards") -> "Shards":
        return self._zip(other, torch.sub)

    def __mul__(self, other: "Shards | float | Tensor") -> "Shards":
        """Multiply by a scalar, or entry by entry by another vector."""
        return self._zip(other, torch.mul) if isinstance(other, Shards) else self.map(lambda t: t * other)

    __rmul__ = __mul__

    def __neg__(self) -> "Shards":
        return self.map(torch.neg)

    def add_(self, other: "Shards", alpha: float = 1.0) -> "Shards":
        """In place ``self += alpha * other``."""
        self._check_names(other)
        for name, t in self.items():
            t.add_(other[name], alpha=alpha)
        return self

    def mul_(self, factor: float) -> "Shards":
        """In place ``self *= factor``."""
        for t in self.values():
            t.mul_(factor)
        return self

    def dot(self, other: "Shards") -> Tensor:
        """Inner product, partial sums added up in fp64.

        Returns:
            0-dimensional fp64 tensor, all-reduced (sum) over ``group``; equal on every rank.
        """
        self._check_names(other)
        return self._sum(_dot(t, other[name]) for name, t in self.items())

    def norm(self) -> Tensor:
        """Euclidean norm, partial sums added up in fp64.

        Returns:
            0-dimensional fp64 tensor; the sum of squares is all-reduced (sum) over ``group``.
        """
        return self._sum(_dot(t, t) for t in self.values()).sqrt()

    def _sum(self, parts) -> Tensor:
        parts = list(parts)
        device = parts[0].device if parts else torch.device("cpu")
        total = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=device)
        if self.group is None:
            return total
        reduced = total.to(communication_device())  # shards may lie on the host
        dist.all_reduce(reduced, group=self.group)
        return reduced.to(device)

    def _zip(self, other: "Shards", fn: Callable[[Tensor, Tensor], Tensor]) -> "Shards":
        self._check_names(other)
        return Shards({name: fn(t, other[name]) for name, t in self.items()}, self.group)

    def _check_names(self, other: "Shards") -> None:
        assert self.keys() == other.keys(), f"vectors over different parameters: {set(self) ^ set(other)}"


PIECE = 65536


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two local tensors as an fp64 scalar.

    On the CPU in pieces: one fp32 dot product over 28M entries is off by 1e-3, a conversion to fp64 takes 30 times as
    long as the product, and pieces of :data:`PIECE` entries are off by 1e-7.
    """
    if a.device.type != "cpu":
        return dot_on_accelerator(a, b)
    a, b = a.reshape(-1), b.reshape(-1)
    if a.dtype == torch.float64:
        return torch.dot(a, b)
    a, b = a.float(), b.float()
    if a.numel() <= PIECE:
        return torch.dot(a, b).double()
    pieces = zip(a.split(PIECE), b.split(PIECE), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in pieces]).double().sum()


def dot_on_accelerator(a: Tensor, b: Tensor) -> Tensor:
    """The same where both are converted at once."""
    return (a.reshape(-1).double() * b.reshape(-1).double()).sum()
