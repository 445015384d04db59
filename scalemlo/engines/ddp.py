"""Replicated parameters, gradients averaged over ranks by ``DistributedDataParallel``."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed.group import all_reduce_mean_, ensure_group
from ..versions import buffers_stay
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
        super().__init__(module, spec, name=name, device=device)
        self._ddp = DistributedDataParallel(
            _WithLoss(self.module, may_skip_parameters),
            **buffers_stay(),  # a broadcast between two forwards of one loss would break the backward
            find_unused_parameters=may_skip_parameters,
            bucket_cap_mb=spec.bucket_cap_mib,
        )
        self._synchronize = False

    def call_live(self, method: str, args: tuple, kwargs: dict) -> Any:
        """Call the bare module; DDP sees the loss, see :meth:`watch_loss`."""
        target = self.module if method == "forward" else getattr(self.module, method)
        with self.autocast():
            return target(*args, **kwargs)

    def watch_loss(self, loss: Tensor) -> Tensor:
        """Return the loss, as an output of DDP where the pass wants this module's gradients reduced (mean).

        DDP prepares its reduction at the end of its forward, from the outputs. Giving it the loss instead of each call
        of the module lets a loss call the module any number of times, by any method, or not at all.

        Args:
            loss: This rank's loss of one micro-batch.

        Returns:
            A loss of the same value.
        """
        return self._ddp(loss) if self._synchronize else loss

    @contextmanager
    def live_pass(self, *, wanted: bool, last: bool) -> Iterator[None]:
        """See :meth:`Engine.live_pass`; gradients of earlier micro-batches are kept local until the last one."""
        self._synchronize = wanted and last
        try:
            with super().live_pass(wanted=wanted, last=last):
                yield
        finally:
            self._synchronize = False

    def recover(self) -> None:
        """See :meth:`Engine.recover`; a reduction that has begun is forgotten."""
        self._ddp.reducer._reset_state()
        super().recover()

    def average_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All-reduce (mean) over the ranks."""
        return {name: all_reduce_mean_(grad.contiguous()) for name, grad in gradients.items()}


class _WithLoss(nn.Module):
    """Passes a loss through; holds the module only for DDP to find its parameters."""

    def __init__(self, module: nn.Module, may_skip_parameters: bool):
        super().__init__()
        self.module = module
        # DDP ends a reduction when a first hook has fired: the anchor's does, also where a loss reaches nothing else.
        self.anchor = nn.Parameter(torch.zeros((), device=next(module.parameters()).device))
        if may_skip_parameters:  # find_unused_parameters warns on stderr where it finds none, which depends on the loss
            self.idle = nn.Parameter(torch.zeros_like(self.anchor))

    def forward(self, loss: Tensor) -> Tensor:
        return loss + 0.0 * self.anchor.to(loss.dtype)
