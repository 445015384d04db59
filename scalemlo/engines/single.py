"""One process, whole parameters: the reference every other engine is compared with."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.group import world_size
from .base import Engine, EngineSpec
from .units import find_units


@dataclass(frozen=True, kw_only=True)
class Single(EngineSpec):
    """One process holds the whole module.

    Args:
        dtype: ``"fp32"`` computes in the module's own dtype, ``"bf16"`` and ``"fp16"`` under autocast.

    Raises:
        ValueError: With more than one process.
    """

    def wrap(self, module: nn.Module, *, name: str, device: torch.device, may_skip_parameters: bool) -> "SingleEngine":
        """See :meth:`EngineSpec.wrap`."""
        if world_size() > 1:
            raise ValueError(
                f"level {name!r}: engine Single runs in one process, but {world_size()} are running. "
                "Use engine=DDP() or FSDP()."
            )
        return SingleEngine(module, self, name=name, device=device)


class ReplicatedEngine(Engine):
    """What Single and DDP share: every rank holds whole parameters."""

    def __init__(self, module: nn.Module, spec: EngineSpec, *, name: str, device: torch.device):
        super().__init__(module, spec, name=name, device=device, units=find_units(module, None, name))

    @property
    def group(self) -> None:
        """Replicated vectors are not reduced."""

    @cached_property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The module's parameters."""
        return dict(self.module.named_parameters())

    def local(self, name: str) -> Tensor:
        """The whole parameter."""
        return self.parameters[name].detach()

    def constant(self, name: str) -> Tensor:
        """See :meth:`Engine.constant`; a frozen weight itself, with what its class knows of it (quantisation, say)."""
        p = self.parameters[name]
        return p.detach() if p.requires_grad else p

    def shard(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing to split."""
        return dict(full)

    def gather(self, shards: Mapping[str, Tensor], *, tangents_only: bool = False) -> dict[str, Tensor]:
        """Nothing to gather; autocast casts inside the operations."""
        return dict(shards)

    def full_tensor(self, name: str) -> Tensor:
        """The live parameter."""
        return self.local(name)


class SingleEngine(ReplicatedEngine):
    """See :class:`Single`."""

    def call_live(self, method: str, args: tuple, kwargs: dict) -> Any:
        """Call the module."""
        with self.autocast():
            return (
                self.module(*args, **kwargs) if method == "forward" else getattr(self.module, method)(*args, **kwargs)
            )

    def average_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One rank: nothing to average."""
        return dict(gradients)
