"""ZeRO: DeepSpeed partitions, gathers and reduces; the level's own optimizer steps the fp32 master shards."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from ...distributed.group import ensure_group, rank, world_size
from ..base import Engine, EngineSpec, StepOptions, _frozen
from ..gather import RowSharding
from ..loss_scaler import LossScaler
from ..sharded import ShardedEngine, cast
from ..units import find_units
from . import config as configuration
from .partition import initialize, step_local_shards


@dataclass(frozen=True, kw_only=True)
class DeepSpeed(EngineSpec):
    """ZeRO by DeepSpeed: optimizer states (stage 1), gradients (2) and weights (3) split over ranks.

    DeepSpeed runs forward, backward, partitioning and reduction. The level's optimizer steps DeepSpeed's fp32 master
    shards, one flat shard per parameter, so it must be an elementwise one (AdamW, SGD). Needs ``deepspeed`` installed.

    Args:
        dtype: ``"bf16"`` and ``"fp16"`` cast the module and keep fp32 masters; gradients are reduced in fp32. The
            module must be loaded in fp32. ``"fp16"`` scales the loss and needs a GPU.
        stage: 1, 2 or 3.
        offload_optimizer: Keep masters, optimizer states and the vectors of estimators in host memory; the optimizer
            steps there (``DeepSpeedCPUAdam`` does it fastest).
        offload_parameters: Keep the weights' shards in host memory too; stage 3.
        config: DeepSpeed's configuration, as a dict or the path of a JSON file: one made for the Hugging Face Trainer
            does. What is used of it, what must agree with the level and what is refused stands in
            :mod:`.deepspeed.config`.

    Raises:
        ValueError: For another stage or dtype, and for keys of the configuration that contradict the engine, or whose
            effect on derivatives is not known.
    """

    stage: Literal[1, 2, 3] = 3
    offload_optimizer: bool = False
    offload_parameters: bool = False
    config: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in (1, 2, 3):
            why = (
                "stage 0 does not reduce losses of several modules rightly; use engine=DDP()" if not self.stage else ""
            )
            raise ValueError(f"stage={self.stage!r} is not supported; choose 1, 2 or 3. {why}".rstrip())
        given = configuration.read(self.config)
        for field in configuration.offloads(given):
            object.__setattr__(self, field, True)
        if self.offload_parameters and self.stage != 3:
            raise ValueError(
                f"offload_parameters=True with stage={self.stage}: only stage 3 splits the weights. Set stage=3, or "
                "offload_optimizer alone."
            )
        object.__setattr__(self, "config", configuration.checked(given, self))  # hashable, as specs are compared

    def loss_scaler(self) -> LossScaler:
        """See :meth:`EngineSpec.loss_scaler`; as the configuration sets it."""
        return configuration.loss_scaler(self.config) if self.dtype == "fp16" else super().loss_scaler()

    def check_options(self, options: StepOptions, optimizer: Optimizer) -> None:
        """See :meth:`EngineSpec.check_options`."""
        configuration.check_options(self.config, options, optimizer)

    def wrap(self, module: nn.Module, *, name: str, device: torch.device, may_skip_parameters: bool) -> Engine:
        """See :meth:`EngineSpec.wrap`.

        Raises:
            ValueError: If DeepSpeed is not installed, or trainable parameters are not fp32.
        """
        wrong = [n for n, p in module.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        if wrong:
            raise ValueError(
                f"level {name!r}: DeepSpeed keeps fp32 masters, but {wrong[:5]} ({len(wrong)} in all) are not fp32. "
                "Load the module in fp32 and set dtype='bf16' or 'fp16' to compute in it."
            )
        ensure_group(device)
        return DeepSpeedEngine(module, self, name=name, device=device)


class DeepSpeedEngine(ShardedEngine):
    """See :class:`DeepSpeed`."""

    def __init__(self, module: nn.Module, spec: DeepSpeed, *, name: str, device: torch.device):
        super().__init__(module, spec, name=name, device=device, units=find_units(module, None, name))
        self._partition = initialize(
            self.module, configuration.settings(spec, configuration.used(spec.config, module)), device, name
        )
        self._host_mesh = init_device_mesh("cpu", (world_size(),)) if self._partition.is_offloaded else self._mesh
        self._live = dict(self.module.named_parameters())
        self._shapes = {n: self._partition.shape(p) for n, p in self._live.items()}
        self._layout = {
            n: RowSharding(torch.Size([self._partition.flat_numel(p)]), world_size()) for n, p in self._live.items()
        }
        self._parameters = {
            n: nn.Parameter(self.from_local(n, self._partition.local(p)), requires_grad=p.requires_grad)
            for n, p in self._live.items()
        }

    @property
    def shards_device(self) -> torch.device:
        """See :attr:`Engine.shards_device`."""
        return torch.device("cpu") if self._partition.is_offloaded else self.device

    def adopt(self, optimizer: Optimizer) -> None:
        """See :meth:`Engine.adopt`."""
        step_local_shards(optimizer)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Flat DTensors over DeepSpeed's fp32 master shards."""
        return self._parameters

    def call_live(self, method: str, args: tuple, kwargs: dict) -> Any:
        """Call the module as DeepSpeed's hooks want it, also where the method is not ``forward``."""
        args, kwargs = cast((args, kwargs), self.spec.compute_dtype)
        if method == "forward":
            return self.module(*args, **kwargs)
        bound = getattr(self.module, method)

        def forward(*args, **kwargs):
            del self.module.forward  # the method may call the module
            return bound(*args, **kwargs)

        self.module.forward = forward
        try:
            return self.module(*args, **kwargs)
        finally:
            self.module.__dict__.pop("forward", None)

    @contextmanager
    def live_pass(self, *, wanted: bool, last: bool) -> Iterator[None]:
        """See :meth:`Engine.live_pass`; weights are brought up to date first.

        Raises:
            ValueError: If the loss uses weights that stage 3 has freed.
            RuntimeError: Any other of the pass, as it is.
        """
        self._partition.publish()
        frozen = nullcontext() if wanted else _frozen(self.module)
        try:
            with frozen, self._partition.backward_pass(last=last) if wanted else nullcontext():
                yield
        except RuntimeError as error:
            if "got [0] but expected" in str(error):
                raise ValueError(
                    f"level {self.name!r}: a method of its module uses weights of submodules directly, which are there "
                    "in those submodules' own forward passes only: DeepSpeed's stage 3 has freed them, and their part "
                    "of the loss is nothing. Compute with them in their own modules, or use stage=2 or engine=FSDP()."
                ) from error
            raise
        finally:
            self._partition.repartition()

    def local(self, name: str) -> Tensor:
        """This rank's entries of the flattened parameter."""
        return self._partition.local(self._live[name])

    def held_tensors(self) -> Iterator[Tensor]:
        """See :meth:`Engine.held_tensors`; masters, and the weights DeepSpeed computes with."""
        yield from super().held_tensors()
        yield from (self._partition.published(p) for p in self._live.values())

    def shard(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's entries of the flattened tensors; what lies beyond a parameter's end is zero."""
        shards = {}
        for name, t in full.items():
            layout = self._layout[name]
            flat = t.new_zeros(layout.shape)
            entries = self._shapes[name].numel()
            flat[:entries] = t.reshape(-1)[:entries]
            shards[name] = flat[layout.local_rows(rank())].clone()
        return shards

    def gather(self, shards: Mapping[str, Tensor], *, tangents_only: bool = False) -> dict[str, Tensor]:
        """One all-gather per dtype, on the device wherever the shards lie; see :meth:`Engine.gather`."""
        here = {n: t.to(self.device) for n, t in shards.items()}
        full = super().gather(here, tangents_only=tangents_only)
        return {n: t[: self._shapes[n].numel()].view(self._shapes[n]) for n, t in full.items()}

    def take_gradients(self, names: Sequence[str]) -> dict[str, Tensor | None]:
        """See :meth:`Engine.take_gradients`."""
        found = self._partition.gradients()
        wanted = {n: found.get(self._live[n]) for n in names}
        return {n: None if t is None else t.to(self.shards_device, torch.float32, copy=True) for n, t in wanted.items()}

    def clear_gradients(self) -> None:
        """See :meth:`Engine.clear_gradients`."""
        super().clear_gradients()
        self._partition.clear()

    def shape(self, name: str) -> torch.Size:
        """See :meth:`Engine.shape`."""
        return self._shapes[name]

    def from_local(self, name: str, t: Tensor) -> Tensor:
        """See :meth:`Engine.from_local`."""
        shape, mesh = self._layout[name].shape, self._mesh if t.device.type == self.device.type else self._host_mesh
        return DTensor.from_local(t, mesh, [Shard(0)], shape=shape, stride=(1,), run_check=False)
