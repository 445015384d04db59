"""Parameters, gradients and optimizer states split over ranks by FSDP2 (``fully_shard``)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..distributed.group import ensure_group, rank, world_size
from ..versions import forget_pass
from .base import EngineSpec
from .gather import RowSharding
from .sharded import ShardedEngine, cast
from .units import find_units


@dataclass(frozen=True, kw_only=True)
class FSDP(EngineSpec):
    """Every rank holds 1/W of every parameter, and gathers one unit at a time.

    Args:
        dtype: ``"bf16"`` gathers and computes in bf16, reduces in fp32, and keeps shards in the module's dtype.
        units: Class names of the blocks to gather together, ``("LlamaDecoderLayer",)`` say. By default the module's
            ``_no_split_modules`` (Hugging Face models have it), else the members of its outermost ``ModuleList`` s.
        reshard_after_forward: Free a block's gathered weights after its forward and gather them again in backward.
    """

    units: Sequence[str] | None = None
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.units is not None:  # hashable, as specs are compared
            object.__setattr__(self, "units", (self.units,) if isinstance(self.units, str) else tuple(self.units))

    def wrap(self, module: nn.Module, *, name: str, device: torch.device, may_skip_parameters: bool) -> "FSDPEngine":
        """See :meth:`EngineSpec.wrap`.

        Raises:
            ValueError: If a parameter has no dimension to split, or no block has the class that ``units`` names.
        """
        ensure_group(device)
        scalars = [n for n, p in module.named_parameters() if p.dim() == 0]
        if scalars:
            raise ValueError(
                f"level {name!r}: FSDP splits parameters by rows, but {scalars} have none. Give them shape [1], or the "
                "level engine=DDP()."
            )
        return FSDPEngine(module, self, name=name, device=device)


class FSDPEngine(ShardedEngine):
    """See :class:`FSDP`."""

    def __init__(self, module: nn.Module, spec: FSDP, *, name: str, device: torch.device):
        units = find_units(module, spec.units, name)
        super().__init__(module, spec, name=name, device=device, units=units)
        _broadcast_from_first_rank(self.module)
        self._layout = {n: RowSharding(p.shape, world_size()) for n, p in self.module.named_parameters()}
        policy = MixedPrecisionPolicy()
        if spec.compute_dtype is not None:
            policy = MixedPrecisionPolicy(param_dtype=spec.compute_dtype, reduce_dtype=torch.float32)
            for unit in self.skeleton.units[1:]:
                _cast_inputs(self.skeleton.module.get_submodule(unit.name), spec.compute_dtype)
        for unit in units:
            fully_shard(
                self.module.get_submodule(unit),
                mesh=self._mesh,
                mp_policy=policy,
                reshard_after_forward=spec.reshard_after_forward,
            )
        fully_shard(self.module, mesh=self._mesh, mp_policy=policy)
        self._parameters = dict(self.module.named_parameters())  # listed while sharded: these objects stay
        self._methods: dict[str, Callable] = {}  # inside FSDP's hooks, by name

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """DTensor parameters."""
        return self._parameters

    def call_live(self, method: str, args: tuple, kwargs: dict) -> Any:
        """Call the module, inside FSDP's hooks also where the method is not ``forward``."""
        if method == "forward":
            return self.module(*args, **kwargs)
        if method not in self._methods:
            own = vars(self.module).get(method)
            register_fsdp_forward_method(self.module, method)
            self._methods[method] = vars(self.module).pop(method)  # attributes of the module stay the user's
            if own is not None:
                vars(self.module)[method] = own
        return self._methods[method](*args, **kwargs)

    @contextmanager
    def live_pass(self, *, wanted: bool, last: bool) -> Iterator[None]:
        """See :meth:`Engine.live_pass`; each micro-batch is reduced at once, so that gradients stay sharded.

        FSDP fixes at its first use which parameters get gradients, so unwanted ones are computed and dropped.
        """
        try:
            yield
        finally:
            self._reshard()

    def local(self, name: str) -> Tensor:
        """Rows of this rank."""
        return self.to_local(self._parameters[name].detach())

    def shard(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of this rank."""
        return {name: t[self._layout[name].local_rows(rank())].clone() for name, t in full.items()}

    def recover(self) -> None:
        """See :meth:`Engine.recover`."""
        forget_pass(self.module)
        super().recover()

    def _reshard(self) -> None:
        for m in self.module.modules():
            if isinstance(m, FSDPModule):  # a root that stayed gathered would hide the next change of its shards
                m.reshard()

    def from_local(self, name: str, t: Tensor) -> Tensor:
        """See :meth:`Engine.from_local`."""
        p = self._parameters[name]
        assert isinstance(p, DTensor), "listed while sharded"
        return DTensor.from_local(t, self._mesh, p.placements, shape=p.shape, stride=p.stride(), run_check=False)


def _cast_inputs(module: nn.Module, dtype: torch.dtype) -> None:
    forward = module.forward

    def forward_in_compute_dtype(*args, **kwargs):
        args, kwargs = cast((args, kwargs), dtype)
        return forward(*args, **kwargs)

    module.forward = forward_in_compute_dtype


def _broadcast_from_first_rank(module: nn.Module) -> None:
    if world_size() > 1:
        for t in [*module.parameters(), *module.buffers()]:
            dist.broadcast(t.detach(), 0)
