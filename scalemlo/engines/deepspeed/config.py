"""DeepSpeed's own configuration: which of its keys are used, must agree with the level, do nothing, or are refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from ..base import StepOptions
from ..dotted import flattened
from ..loss_scaler import LossScaler


class Zero(Protocol):
    """What a configuration is held against: the fields of :class:`scalemlo.DeepSpeed` but for its ``config``."""

    @property
    def dtype(self) -> str:
        """Of the computation."""
        ...

    @property
    def stage(self) -> int:
        """1, 2 or 3."""
        ...


Config = tuple[tuple[str, Any], ...]
"""Values by dotted key, sorted."""


def _under(section: str, names: str) -> frozenset[str]:
    return frozenset(f"{section}.{name}" for name in names.split())


TUNABLE = (
    _under("zero_optimization", "reduce_bucket_size allgather_bucket_size sub_group_size reduce_scatter")
    | _under("zero_optimization", "contiguous_gradients stage3_prefetch_bucket_size stage3_max_live_parameters")
    | _under("zero_optimization", "stage3_max_reuse_distance offload_optimizer.pin_memory offload_param.pin_memory")
    | _under("comms_logger", "enabled verbose prof_all prof_ops debug")
)
"""Keys that DeepSpeed is given: they change how it does its work, not what."""

SIZES = _under("zero_optimization", "reduce_bucket_size stage3_prefetch_bucket_size")
"""Those whose "auto" is filled from the size of the module."""

FIELDS = {"zero_optimization.stage": "stage", "bf16.enabled": "dtype", "fp16.enabled": "dtype"}
"""Keys that must agree with a field of the engine."""

OF_THE_LEVEL = frozenset({"gradient_clipping", "gradient_accumulation_steps", "optimizer.type"}) | _under(
    "optimizer.params", "lr betas eps weight_decay momentum"
)
"""Keys whose values must be the level's."""

LOSS_SCALE = _under("fp16", "initial_scale_power loss_scale_window hysteresis min_loss_scale")
"""Keys that set the loss scaler, with dtype="fp16"."""

WITHOUT_EFFECT = (
    frozenset({"steps_per_print", "wall_clock_breakdown", "scheduler.type"})
    | frozenset({"zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"})
    | _under("zero_optimization", "overlap_comm allgather_partitions round_robin_gradients")
    | _under("zero_optimization", "stage3_param_persistence_threshold stage3_gather_16bit_weights_on_model_save")
    | _under("zero_optimization.offload_optimizer", "nvme_path buffer_count pipeline_read pipeline_write fast_init")
    | _under("zero_optimization.offload_param", "nvme_path buffer_count buffer_size max_in_cpu")
)
"""Keys of steps that DeepSpeed never takes here, of NVMe, or of when and where rather than what it computes."""

OFFLOADS = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_parameters"}
"""Sections under ``zero_optimization`` whose device is a field of the engine."""

OFF = {
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.offload_optimizer.ratio": 1.0,
    "fp16.loss_scale": 0,
}
"""Values that switch off what is refused otherwise, where False does not."""

REASONS = {
    "fp16.loss_scale": "the loss scale is dynamic, as every derivative must follow it; set it to 0",
    "fp16": "it is not known to the loss scaler, which has initial_scale_power, loss_scale_window, hysteresis and "
    "min_loss_scale",
    "bf16": "masters, gradients and optimizer states are fp32",
    "torch_autocast": "set the dtype of the engine: DeepSpeed(dtype='bf16')",
    "amp": "set the dtype of the engine: DeepSpeed(dtype='bf16')",
    "optimizer": "the level's own optimizer steps (DeepSpeed's Muon would also change gradients on stages 1 and 2); "
    "give Level(optimizer=...)",
    "scheduler": "the level's own scheduler steps; give Level(scheduler=...) and set the parameters to 'auto'",
    "train_batch_size": "batches are what the level's data gives; set it to 'auto'",
    "train_micro_batch_size_per_gpu": "batches are what the level's data gives; set it to 'auto'",
    "compile": "DeepCompile replaces the module that derivatives are taken of",
    "sparse_attention": "its kernels have no second derivatives",
    "moe": "experts are not reduced over the ranks that derivatives are",
    "zero_optimization.cpu_offload": "it is deprecated; write offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "it is deprecated; write offload_param: {device: cpu}",
    "zero_optimization.offload_optimizer.device": "the optimizer steps masters in memory; use 'cpu', or 'none' and no "
    "offload_optimizer=True",
    "zero_optimization.offload_param.device": "derivatives gather weights from memory; use 'cpu', or 'none' and no "
    "offload_parameters=True",
    "zero_optimization.offload_optimizer": "the level's optimizer steps all of the masters, in one place",
    "zero_optimization.zenflow": "ZenFlow gives other gradients than those of the loss",
    "zero_optimization.zero_quantized_weights": "quantised gathers give other weights than derivatives are taken at",
    "zero_optimization.zero_quantized_nontrainable_weights": "quantised gathers give other weights than derivatives "
    "are taken at",
    "zero_optimization.zero_quantized_gradients": "quantised reductions give other gradients than those of the loss",
    "zero_optimization.zero_hpz_partition_size": "a second partition of the weights is not kept up to date with the "
    "masters",
    "zero_optimization.mics_shard_size": "MiCS splits over a part of the ranks, derivatives gather over all",
    "zero_optimization.memory_efficient_linear": "it replaces torch's linear in the whole process by one without "
    "forward derivatives",
}
"""Why a key is refused, and the way out."""


def settings(spec: Zero, used: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration DeepSpeed is given.

    Args:
        spec: The engine.
        used: Values of :data:`TUNABLE` keys, which are dotted.
    """
    full: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": spec.dtype == "bf16"},
        "fp16": {"enabled": spec.dtype == "fp16", "loss_scale": 1.0},  # scalemlo scales every pass itself
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": spec.stage,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,
            **{section: {"device": "cpu"} for section, field in OFFLOADS.items() if getattr(spec, field)},
        },
    }
    for key, value in used.items():
        *sections, name = key.split(".")
        place = full
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return full


def read(config: Any) -> dict[str, Any]:
    """A configuration by dotted key.

    Args:
        config: A nested mapping, the path of a JSON file with one, or what this module made of one.

    Returns:
        Values by dotted key; lists are tuples.

    Raises:
        ValueError: If the file cannot be read.
    """
    if isinstance(config, (str, Path)):
        try:
            config = json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"DeepSpeed(config={str(config)!r}): not a readable JSON file: {error}") from error
    return _flat(dict(config or {}))


def stated(given: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Stage and dtype of the engine as a configuration states them: by field, the value and the key that says so."""
    found = {}
    stage = given.get("zero_optimization.stage", "auto")
    if stage != "auto":
        found["stage"] = stage, "zero_optimization.stage"
    for dtype in ("bf16", "fp16"):
        if given.get(f"{dtype}.enabled") is True:
            found["dtype"] = dtype, f"{dtype}.enabled"
    return found


def offloads(given: Mapping[str, Any]) -> set[str]:
    """Fields of the engine that a configuration switches on."""
    return {field for section, field in OFFLOADS.items() if given.get(f"zero_optimization.{section}.device") == "cpu"}


def checked(given: Mapping[str, Any], spec: Zero) -> Config:
    """What is left of a configuration beside the engine's fields.

    Args:
        given: Values by dotted key.
        spec: The engine, but for its ``config``.

    Returns:
        Keys that are used or compared with the level; "auto" where the module's size decides.

    Raises:
        ValueError: For a value that contradicts the engine, and for keys that are refused.
    """
    ours = _flat(settings(spec, {}))
    harmless = {f"zero_optimization.{section}.device": "none" for section in OFFLOADS} | ours | OFF
    kept = {}
    for key, value in given.items():
        if key in FIELDS:
            _check_field(key, value, ours[key], spec)
        elif key in TUNABLE | OF_THE_LEVEL | LOSS_SCALE:
            if value is not None and (value != "auto" or key in SIZES) and _is_on(key, ours):
                kept[key] = value
        elif key not in WITHOUT_EFFECT and not (value is False or value in ("auto", None, harmless.get(key))):
            raise ValueError(f"DeepSpeed(config=...): {key}={value!r} is refused: {_reason(key)}.")
    return tuple(sorted(kept.items()))


def _is_on(key: str, ours: Mapping[str, Any]) -> bool:
    """Whether what a key tunes is switched on."""
    section = key.rpartition(".")[0]
    if section == "fp16":
        return ours["fp16.enabled"]
    return f"{section}.device" in ours or not key.endswith("pin_memory")


def _check_field(key: str, value: Any, ours: Any, spec: Zero) -> None:
    if value not in ("auto", None, ours):
        field = FIELDS[key]
        raise ValueError(
            f"DeepSpeed(config=...): {key}={value!r}, but the engine has {field}={getattr(spec, field)!r}. Set "
            f"DeepSpeed({field}=...) to what is wanted, or the key to 'auto'."
        )


def _reason(key: str) -> str:
    parents = [key[:i] for i in range(len(key), 0, -1) if i == len(key) or key[i] == "."]
    known = sorted(TUNABLE | OF_THE_LEVEL | LOSS_SCALE)
    unknown = f"not known to leave derivatives as they are; keys that are used are {known}"
    return next((REASONS[p] for p in parents if p in REASONS), unknown)


def used(config: Config, module: nn.Module) -> dict[str, Any]:
    """What DeepSpeed is given of a configuration, "auto" filled as transformers does it.

    Args:
        config: From :func:`checked`.
        module: Its ``config.hidden_size`` gives the sizes; without one they are DeepSpeed's defaults.

    Returns:
        Values of :data:`TUNABLE` keys.
    """
    found = {key: value for key, value in config if key in TUNABLE}
    hidden_size = _hidden_size(getattr(module, "config", None))
    for key in SIZES & found.keys():
        if found[key] == "auto":
            del found[key]
            if hidden_size is not None:
                found[key] = hidden_size**2 if key.endswith("reduce_bucket_size") else int(0.9 * hidden_size**2)
    return found


def _hidden_size(config: Any) -> int | None:
    for place in (config, getattr(config, "text_config", None)):
        if hasattr(place, "hidden_size"):
            return place.hidden_size
        if hasattr(place, "hidden_sizes"):
            return max(place.hidden_sizes)
    return None


def loss_scaler(config: Config) -> LossScaler:
    """The scaler of fp16 as a configuration sets it: DeepSpeed's rule, if it sets anything."""
    given = {key.removeprefix("fp16."): value for key, value in config if key in LOSS_SCALE}
    if not given:
        return LossScaler.for_dtype("fp16")
    return LossScaler(
        scale=2.0 ** given.get("initial_scale_power", 16),
        growth_interval=given.get("loss_scale_window", 1000),
        smallest_scale=float(given.get("min_loss_scale", 1)),
        num_tolerated=given.get("hysteresis", 2) - 1,
        num_uncounted=1,
        num_good=-1,
    )


def check_options(config: Config, options: StepOptions, optimizer: Optimizer) -> None:
    """Compare what a configuration says of the level with the level.

    Args:
        config: From :func:`checked`.
        options: Of the level's steps.
        optimizer: Its optimizer.

    Raises:
        ValueError: Showing both, where they differ.
    """
    kind = type(optimizer).__name__
    here = {
        "gradient_clipping": ("max_grad_norm", options.max_grad_norm or 0.0),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", options.gradient_accumulation_steps),
        "optimizer.type": ("optimizer", kind.removeprefix("DeepSpeedCPU")),
    }
    here |= {f"optimizer.params.{name}": (name, value) for name, value in optimizer.defaults.items()}
    for key, value in config:
        if key in OF_THE_LEVEL:
            field, ours = here.get(key, ("optimizer", kind))
            if not _agree(value, ours):
                raise ValueError(
                    f"level {options.name!r}: DeepSpeed(config=...) has {key}={value!r}, the level has "
                    f"{field}={ours!r}. Make them the same, or set the key to 'auto': the level's is used."
                )


def _agree(value: Any, ours: Any) -> bool:
    if isinstance(value, str) or isinstance(ours, str):
        return str(value).lower() == str(ours).lower()
    a, b = ([float(x) for x in v] if isinstance(v, (tuple, list)) else [float(v)] for v in (value, ours))
    return a == b


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted key; lists as tuples, since engines are hashable."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in flattened(tree).items()}
