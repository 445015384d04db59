"""Replicated parameters, gradients averaged over ranks by ``DistributedDataParallel``."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import all_reduce_mean_, ensure_group
from .base import EngineSpec
from .single import ReplicatedEngine


@dataclass(frozen=True, kw_only=True)
class DDP(EngineSpec):
    """Every rank holds the whole module and its part of the batch; gradients are averaged over ranks.

    Args:
        dtype: ``"fp32"`` computes in the module's own dtype, ``"bf16"`` and ``"fp16"`` under autocast.
        bucket_cap_mib: Size of the buckets gradients are reduced in.
    """

    bucket_cap_mib: float = 25.0

    def wrap(self, module: nn.Module, *, name: str, device: torch.device, may_skip_parameters: bool) -> "DDPEngine":
        """See :meth:`EngineSpec.wrap`."""
        ensure_group(device)
        return DDPEngine(module, self, name=name, device=device, may_skip_parameters=may_skip_parameters)


class DDPEngine(ReplicatedEngine):
    """See :class:`DDP`."""

    def __init__(self, module: nn.Module, spec: DDP, *, name: str, device: torch.device, may_skip_parameters: bool):
        super().__init__(module, spec, name=name, device=device, units=())
        self._ddp = DistributedDataParallel(
            _Redirect(self.module),
            broadcast_buffers=False,  # a broadcast between two forwards of one loss would break the backward
            find_unused_parameters=may_skip_parameters,
            bucket_cap_mb=spec.bucket_cap_mib,
        )
        self._synchronize = False

    def call_live(self, method: str, args: tuple, kwargs: dict) -> Any:
        """Call through DDP where the pass wants this module's gradients, and the bare module elsewhere."""
        target = self._ddp if self._synchronize and torch.is_grad_enabled() else self._ddp.module
        with self.autocast():
            return target(method, *args, **kwargs)

    @contextmanager
    def live_pass(self, *, wanted: bool, last: bool) -> Iterator[None]:
        """See :meth:`Engine.live_pass`; gradients of earlier micro-batches are kept local until the last one."""
        self._synchronize = wanted and last
        try:
            with super().live_pass(wanted=wanted, last=last):
                yield
        finally:
            self._synchronize = False

    def average_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All-reduce (mean) over the ranks."""
        return {name: all_reduce_mean_(grad.contiguous()) for name, grad in gradients.items()}


class _Redirect(nn.Module):
    """Lets DDP, which hooks only ``forward``, run any method of the module."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, method: str, *args, **kwargs):
        return self.module(*args, **kwargs) if method == "forward" else getattr(self.module, method)(*args, **kwargs)
