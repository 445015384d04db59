"""From ``engine=``, ``fsdp``, ``deepspeed`` and the launcher's configuration to an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...distributed.group import world_size
from ...engines import DDP, ENGINE_SHORTHANDS, ENGINES, EngineSpec, Single
from ...engines.deepspeed.config import read, stated
from ...runs import launched

_FSDP_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "version": (2, "2"),
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "NO_WRAP"),
    "cpu_offload": (False,),
    "activation_checkpointing": (False,),
    "min_num_params": (0,),
    "xla": (False,),
    "xla_fsdp_v2": (False,),
    "xla_fsdp_grad_ckpt": (False,),
    "state_dict_type": ("FULL_STATE_DICT", "SHARDED_STATE_DICT"),
    "cpu_ram_efficient_loading": (False, "false"),
    "limit_all_gathers": (True, False),
    "use_orig_params": (True,),
    "sync_module_states": (True,),
}
"""Keys of ``fsdp_config`` and the values that ask for nothing else than what is done."""


def choose_engine(args: Any) -> EngineSpec:
    """The engine of the fine-tuned model.

    What is asked for may come from ``engine``, from ``fsdp`` or ``deepspeed`` as in transformers, and from the launcher
    (accelerate's configuration); they must agree.

    Args:
        args: A :class:`~scalemlo.hf.MLOConfig`.

    Returns:
        The engine, in the precision that ``bf16`` or ``fp16`` ask for.

    Raises:
        ValueError: Where they contradict each other, or ask for what no engine does.
    """
    dtype = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    if isinstance(args.engine, EngineSpec):
        clash = [f for f in ("fsdp", "deepspeed") if getattr(args, f)]
        if dtype is not None and dtype != args.engine.dtype:
            clash.append(dtype)
        if clash:
            field = clash[0]
            raise ValueError(
                f"{field}={getattr(args, field)!r} and engine={args.engine!r} are both given; say it in the engine."
            )
        return args.engine
    section: dict[str, Any] = {"type": "auto"}
    if args.engine != "auto":
        section = dict(ENGINE_SHORTHANDS.get(args.engine, {"type": args.engine}))
        if section["type"] not in ENGINES:
            known = ["auto", *ENGINES, *ENGINE_SHORTHANDS]
            raise ValueError(f"engine={args.engine!r} is unknown; choose one of {known}, or give mlo.FSDP(...), say.")
    if args.fsdp and args.deepspeed:
        raise ValueError("fsdp and deepspeed are both set; take one of them out.")
    for asked in (_fsdp(args) if args.fsdp else {}, _deepspeed(args) if args.deepspeed else {}):
        section = _merged(section, asked)
    if dtype is not None:
        section = _merged(section, {"dtype": dtype})
    section = launched.agree(section, launched.claims(), lambda key: f"{type(args).__name__}")
    kind = section.pop("type")
    if kind == "auto":
        kind = "single" if world_size() == 1 else "ddp"
    if kind == "ddp" and args.ddp_bucket_cap_mb is not None:
        section["bucket_cap_mib"] = float(args.ddp_bucket_cap_mb)
    return ENGINES[kind](**section)


def small_engine() -> EngineSpec:
    """The engine of weight tables and nets: whole on every rank, in their own precision."""
    return Single() if world_size() == 1 else DDP()


def _merged(section: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    given = {k: v for k, v in section.items() if v != "auto"}
    for key in given.keys() & asked.keys():
        if given[key] != asked[key]:
            raise ValueError(f"engine asks for {key}={given[key]!r}, the other arguments for {asked[key]!r}.")
    return section | asked


def _fsdp(args: Any) -> dict[str, Any]:
    """Options of FSDP from ``fsdp=True`` or ``"full_shard auto_wrap"``, and ``fsdp_config``."""
    config = args.fsdp_config or {}
    if isinstance(config, (str, Path)):
        config = json.loads(Path(config).read_text())
    config = {key.removeprefix("fsdp_"): value for key, value in config.items()}
    found: dict[str, Any] = {"type": "fsdp"}
    words = args.fsdp.split() if isinstance(args.fsdp, str) else []
    wrong = [w for w in words if w not in ("full_shard", "shard_grad_op", "auto_wrap", "true", "True")]
    if wrong:
        raise ValueError(f"fsdp={args.fsdp!r}: {wrong[0]!r} is not supported; use full_shard or shard_grad_op.")
    reshard = config.pop("reshard_after_forward", "shard_grad_op" not in words)
    if str(reshard).lower() not in ("true", "false"):
        raise ValueError(f"fsdp_config: reshard_after_forward={reshard!r} must be true or false, as in FSDP2.")
    found["reshard_after_forward"] = str(reshard).lower() == "true"
    units = config.pop("transformer_layer_cls_to_wrap", None)
    if units:
        found["units"] = [units] if isinstance(units, str) else list(units)
    for key, value in config.items():
        if value is not None and value not in _FSDP_HARMLESS.get(key, ()):
            allowed = _FSDP_HARMLESS.get(key)
            way_out = f"only {allowed}" if allowed else f"keys are {sorted(_FSDP_HARMLESS)} and those of FSDP(...)"
            raise ValueError(f"fsdp_config: {key}={value!r} is not supported ({way_out}).")
    return found


def _deepspeed(args: Any) -> dict[str, Any]:
    """Options of DeepSpeed from its own configuration; what stands in it is checked by the engine."""
    options = {field: value for field, (value, _) in stated(read(args.deepspeed)).items()}
    return {"type": "deepspeed", "config": args.deepspeed} | options
