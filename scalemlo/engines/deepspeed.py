"""ZeRO: DeepSpeed partitions, gathers and reduces; the level's own optimizer steps the fp32 master shards."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..distributed import ensure_group, is_main_process, rank, world_size
from ._deepspeed_internals import initialize
from .base import Engine, EngineSpec, _frozen
from .gather import RowSharding, gather_rows
from .sharded import ShardedEngine, cast
from .units import find_units

TUNABLE = frozenset(
    [f"zero_optimization.{key}" for key in ("reduce_bucket_size", "allgather_bucket_size", "sub_group_size")]
    + [f"zero_optimization.stage3_{key}" for key in ("prefetch_bucket_size", "max_live_parameters")]
    + ["zero_optimization.stage3_max_reuse_distance", "comms_logger.enabled", "comms_logger.verbose"]
)
"""Keys of DeepSpeed's configuration that change how it does its work, not what; given dotted."""

REASONS = {
    "fp16": "fp16 is not supported on DeepSpeed yet; use dtype='bf16', or engine=FSDP(dtype='fp16')",
    "bf16": "set the dtype of the engine: DeepSpeed(dtype='bf16')",
    "torch_autocast": "set the dtype of the engine: DeepSpeed(dtype='bf16')",
    "amp": "set the dtype of the engine: DeepSpeed(dtype='bf16')",
    "optimizer": "the level's own optimizer steps (DeepSpeed's Muon would also change gradients on stages 1 and 2); "
    "give Level(optimizer=...)",
    "scheduler": "the level's own scheduler steps; give Level(scheduler=...)",
    "gradient_clipping": "scalemlo clips, before hypergradients are taken; set Level(max_grad_norm=...)",
    "gradient_accumulation_steps": "scalemlo accumulates; set Level(gradient_accumulation_steps=...)",
    "train_batch_size": "batches are what the level's data gives",
    "train_micro_batch_size_per_gpu": "batches are what the level's data gives",
    "compile": "DeepCompile replaces the module that derivatives are taken of",
    "zero_optimization.stage": "set DeepSpeed(stage=...)",
    "zero_optimization.offload_optimizer": "offload is not supported yet",
    "zero_optimization.offload_param": "offload is not supported yet",
    "zero_optimization.cpu_offload": "offload is not supported yet",
    "zero_optimization.zenflow": "ZenFlow gives other gradients than those of the loss",
    "zero_optimization.zero_quantized_weights": "quantised gathers give other weights than derivatives are taken at",
    "zero_optimization.zero_quantized_nontrainable_weights": "quantised gathers give other weights than derivatives "
    "are taken at",
    "zero_optimization.zero_quantized_gradients": "quantised reductions give other gradients than those of the loss",
    "zero_optimization.memory_efficient_linear": "it replaces torch's linear in the whole process by one without "
    "forward derivatives",
}
"""Why a key is refused, and the way out."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeed(EngineSpec):
    """ZeRO by DeepSpeed: optimizer states (stage 1), gradients (2) and weights (3) split over ranks.

    DeepSpeed runs forward, backward, partitioning and reduction. The level's optimizer steps DeepSpeed's fp32 master
    shards, one flat shard per parameter, so it must be an elementwise one (AdamW, SGD). Needs ``deepspeed`` installed.

    Args:
        dtype: ``"bf16"`` casts the module and keeps fp32 masters; gradients are reduced in fp32. The module must be
            loaded in fp32.
        stage: 1, 2 or 3.
        config: DeepSpeed's configuration or the path of a JSON file with it. Bucket sizes and limits of prefetching
            are used (see :data:`TUNABLE`); keys that agree with what scalemlo sets, that switch something off, or whose
            value is ``"auto"`` are accepted; all others are errors.

    Raises:
        ValueError: For another stage or dtype, and for keys of the configuration that scalemlo decides, or whose effect
            on derivatives is not known.
    """

    stage: Literal[1, 2, 3] = 3
    config: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in (1, 2, 3):
            why = (
                "stage 0 does not reduce losses of several modules rightly; use engine=DDP()" if not self.stage else ""
            )
            raise ValueError(f"stage={self.stage!r} is not supported; choose 1, 2 or 3. {why}".rstrip())
        if self.dtype == "fp16":
            raise ValueError(f"dtype='fp16': {REASONS['fp16']}.")
        object.__setattr__(self, "config", self._tuned(_read(self.config)))  # hashable, as specs are compared

    def _tuned(self, given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        ours = _flat(self.full_config({}))
        tuned = {}
        for key, value in _flat(given).items():
            if key in TUNABLE and value != "auto":
                tuned[key] = value
            elif value != "auto" and value is not None and value is not False and ours.get(key, ()) != value:
                parents = [key[:i] for i in range(len(key), 0, -1) if i == len(key) or key[i] == "."]
                reason = next((REASONS[p] for p in parents if p in REASONS), None)
                reason = reason or f"not known to leave derivatives as they are; keys are {sorted(TUNABLE)}"
                raise ValueError(f"DeepSpeed(config=...): {key}={value!r} is refused: {reason}.")
        return tuple(sorted(tuned.items()))

    def full_config(self, tuned: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration DeepSpeed is given.

        Args:
            tuned: Values of :data:`TUNABLE` keys, which are dotted.
        """
        full: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self.dtype == "bf16"},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {
                "stage": self.stage,
                "overlap_comm": False,
                "stage3_param_persistence_threshold": 0,
                "memory_efficient_linear": False,
            },
        }
        for key, value in tuned.items():
            section, name = key.split(".")
            full.setdefault(section, {})[name] = value
        return full

    def wrap(self, module: nn.Module, *, name: str, device: torch.device, may_skip_parameters: bool) -> Engine:
        """See :meth:`EngineSpec.wrap`.

        Raises:
            ValueError: If DeepSpeed is not installed, or trainable parameters are not fp32.
        """
        wrong = [n for n, p in module.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        if wrong:
            raise ValueError(
                f"level {name!r}: DeepSpeed keeps fp32 masters, but {wrong[:5]} ({len(wrong)} in all) are not fp32. "
                "Load the module in fp32 and set dtype='bf16' to compute in bf16."
            )
        ensure_group(device)
        return DeepSpeedEngine(module, self, name=name, device=device)


class DeepSpeedEngine(ShardedEngine):
    """See :class:`DeepSpeed`."""

    def __init__(self, module: nn.Module, spec: DeepSpeed, *, name: str, device: torch.device):
        super().__init__(module, spec, name=name, device=device, units=find_units(module, None, name))
        self._partition = initialize(self.module, spec.full_config(dict(spec.config)), device, name)
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

        self.module.forward = forward  # type: ignore[method-assign]
        try:
            return self.module(*args, **kwargs)
        finally:
            self.module.__dict__.pop("forward", None)

    @contextmanager
    def live_pass(self, *, wanted: bool, last: bool) -> Iterator[None]:
        """See :meth:`Engine.live_pass`; weights are brought up to date first."""
        self._partition.publish()
        frozen = nullcontext() if wanted else _frozen(self.module)
        try:
            with frozen, self._partition.backward_pass(last=last) if wanted else nullcontext():
                yield
        finally:
            self._partition.repartition()

    def local(self, name: str) -> Tensor:
        """This rank's entries of the flattened parameter."""
        return self._partition.local(self._live[name])

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
        """One all-gather per dtype; see :meth:`Engine.gather`."""
        full = super().gather(shards, tangents_only=tangents_only)
        return {n: t[: self._shapes[n].numel()].view(self._shapes[n]) for n, t in full.items()}

    def take_gradients(self, names: Sequence[str]) -> dict[str, Tensor | None]:
        """See :meth:`Engine.take_gradients`."""
        found = self._partition.gradients()
        return {n: found[self._live[n]].float().clone() if self._live[n] in found else None for n in names}

    def clear_gradients(self) -> None:
        """See :meth:`Engine.clear_gradients`."""
        super().clear_gradients()
        self._partition.clear()

    def full_state_dict(self, *, trainable_only: bool = False) -> dict[str, Tensor]:
        """See :meth:`Engine.full_state_dict`; masters in fp32, gathered parameter by parameter."""
        names = {id(p): name for name, p in self._live.items()}
        state = {}
        for key, p in self.module.named_parameters(remove_duplicate=False):
            if trainable_only and not p.requires_grad:
                continue
            shard = self.local(names[id(p)])
            full = gather_rows({names[id(p)]: shard}, self._layout, self.group, shard.dtype)[names[id(p)]]
            shape = self._shapes[names[id(p)]]
            if is_main_process():
                state[key] = full[: shape.numel()].view(shape).cpu().clone()
        if is_main_process() and not trainable_only:
            kept = self.module.state_dict()
            state |= {n: b.detach().cpu().clone() for n, b in self.module.named_buffers() if n in kept}
        return state

    def from_local(self, name: str, t: Tensor) -> Tensor:
        """See :meth:`Engine.from_local`."""
        shape = self._layout[name].shape
        return DTensor.from_local(t, self._mesh, [Shard(0)], shape=shape, stride=(1,), run_check=False)


def _read(config: Any) -> Mapping[str, Any]:
    if isinstance(config, (str, Path)):
        try:
            config = json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"DeepSpeed(config={str(config)!r}): not a readable JSON file: {error}") from error
    config = dict(config or {})
    return config


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
