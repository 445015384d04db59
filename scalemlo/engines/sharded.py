"""What FSDP and DeepSpeed share: every rank holds a part of every parameter, and computes in one reduced precision."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from ..distributed.group import rank, world_size
from .base import Engine, EngineSpec
from .gather import RowSharding, gather_rows


class ShardedEngine(Engine):
    """A base; subclasses fill ``_layout``, how each parameter is split, by name."""

    _layout: dict[str, RowSharding]

    def __init__(self, module: nn.Module, spec: EngineSpec, *, name: str, device: torch.device, units: Sequence[str]):
        super().__init__(module, spec, name=name, device=device, units=units)
        self._mesh = init_device_mesh(device.type, (world_size(),))

    @property
    def group(self) -> dist.ProcessGroup:
        """The group all parameters are split over."""
        return self._mesh.get_group()

    @property
    def mesh(self) -> DeviceMesh:
        """The one-dimensional mesh of that group."""
        return self._mesh

    def call_skeleton(self, method: str, args: tuple, kwargs: dict) -> Any:
        """Run the skeleton; float inputs are cast as for the live module."""
        return self.skeleton.call(method, *cast((args, kwargs), self.spec.compute_dtype))

    def gather(self, shards: Mapping[str, Tensor], *, tangents_only: bool = False) -> dict[str, Tensor]:
        """One all-gather per dtype; see :meth:`Engine.gather`."""
        by_dtype: dict[torch.dtype, dict[str, Tensor]] = defaultdict(dict)
        for name, shard in shards.items():
            by_dtype[shard.dtype][name] = shard
        full = {}
        for dtype, group in by_dtype.items():
            compute_dtype = self.spec.compute_dtype or dtype
            full |= gather_rows(group, self._layout, self.group, compute_dtype, tangents_only=tangents_only)
        return full

    def full_tensor(self, name: str) -> Tensor:
        """See :meth:`Engine.full_tensor`; one all-gather."""
        shard, shape = self.local(name).to(self.device), self.shape(name)
        full = gather_rows({name: shard}, self._layout, self.group, shard.dtype)[name]
        return full.reshape(-1)[: shape.numel()].view(shape)

    def start(self, name: str) -> int:
        """See :meth:`Engine.start`."""
        layout = self._layout[name]
        return layout.local_rows(rank()).start * layout.row_numel

    def average_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adjoint of the gather has summed over ranks already; divide, in place."""
        return {name: grad.div_(world_size()) for name, grad in gradients.items()}

    def to_local(self, t: Tensor) -> Tensor:
        """See :meth:`Engine.to_local`."""
        return t.to_local() if isinstance(t, DTensor) else t


def cast(tree: Any, dtype: torch.dtype | None) -> Any:
    """Floating tensors of a nested structure in a dtype; None leaves all as they are."""
    if dtype is None:
        return tree
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)
