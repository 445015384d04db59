"""What the launcher says about the engine: accelerate's configuration, as a process that it started sees it.

scalemlo wraps modules itself, so accelerate's FSDP and DeepSpeed plugins never run. A configuration that asks for them
still says what its user wants; accelerate passes it on in environment variables, and here they become options of
scalemlo's engines. What scalemlo would not honour is an error, never dropped. accelerate exports its defaults along
with what was written, so a value that is its default ("no" mixed precision, resharding) asks for nothing.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..engines.deepspeed.config import read, stated

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Set for every process by torchrun, accelerate (several processes) and deepspeed."""

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Claim:
    """An engine option that the launcher asks for.

    Attributes:
        value: Of the option.
        source: Which variable or file says so.
    """

    value: Any
    source: str


@dataclass(frozen=True)
class Honoured:
    """The values of a variable that scalemlo does what they say for, and what to do about others."""

    values: tuple[str, ...]
    otherwise: str


ALWAYS = {
    "ACCELERATE_MIXED_PRECISION": Honoured(("no", "bf16", "fp16"), "choose no, bf16 or fp16"),
    "ACCELERATE_DYNAMO_BACKEND": Honoured(("no",), "modules are not compiled; take `dynamo_config` out"),
    "ACCELERATE_USE_MEGATRON_LM": Honoured(("false",), "use distributed_type FSDP, DEEPSPEED or MULTI_GPU"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": Honoured(("false",), "ranks split data only; take `parallelism_config` out"),
}
"""Under every configuration of accelerate."""

WITH_FSDP = {
    "FSDP_OFFLOAD_PARAMS": Honoured(
        ("false",), "FSDP does not offload here, DEEPSPEED does: launch/zero3_offload.yaml"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": Honoured(
        ("false",), "checkpointing is the model's own: call model.gradient_checkpointing_enable() where it is made"
    ),
    "FSDP_AUTO_WRAP_POLICY": Honoured(
        ("transformer_based_wrap", "no_wrap"), "blocks are chosen by class: use TRANSFORMER_BASED_WRAP"
    ),
    "FSDP_SHARDING_STRATEGY": Honoured(
        ("full_shard", "shard_grad_op", "1", "2"), "use FULL_SHARD, or distributed_type MULTI_GPU to replicate"
    ),
    "FSDP_IGNORED_MODULES": Honoured(("none", ""), "every module is sharded; take `fsdp_ignored_modules` out"),
}
"""Under ``distributed_type: FSDP``."""

OFFLOADS = {
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload_optimizer",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_parameters",
}
"""Option of the DeepSpeed engine by variable."""

OF_THE_LEVEL = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
}
"""Key of DeepSpeed's configuration by variable: the engine compares its value with the level's."""


def claims(environ: Environment = os.environ) -> dict[str, Claim]:
    """Engine options that accelerate's configuration asks for.

    Args:
        environ: Environment variables. Without ``WORLD_SIZE`` they are left over from elsewhere and ask for nothing.

    Returns:
        Claim by option of the engine configuration; nothing where the launcher leaves it to the run.

    Raises:
        ValueError: If it asks for something that scalemlo does not do, or a file that it names cannot be read.
    """
    if "WORLD_SIZE" not in environ:
        return {}
    _require(ALWAYS, environ)
    fsdp, deepspeed = (_is_on(environ, f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
    if fsdp and deepspeed:
        raise ValueError(
            "ACCELERATE_USE_FSDP and ACCELERATE_USE_DEEPSPEED are both set; unset the one that is left from elsewhere."
        )
    found = _fsdp(environ) if fsdp else _deepspeed(environ) if deepspeed else {}
    if environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        found["dtype"] = Claim(environ["ACCELERATE_MIXED_PRECISION"], _source(environ, "ACCELERATE_MIXED_PRECISION"))
    return found


def agree(given: dict[str, Any], asked: Mapping[str, Claim], where: Callable[[str], str]) -> dict[str, Any]:
    """Complete an engine section by what the launcher asks for.

    Args:
        given: The section; a ``type`` of ``auto`` leaves the engine to the launcher.
        asked: See :func:`claims`.
        where: Says where an option of the section was given.

    Returns:
        The section with all claims in it.

    Raises:
        ValueError: If they contradict each other, with every contradiction.
    """
    said = {k: v for k, v in given.items() if v is not None and (k, v) != ("type", "auto")}
    clashes = {k: c for k, c in asked.items() if k in said and _contradict(k, said[k], c.value)}
    if "type" in clashes:
        clashes = {"type": clashes["type"]}  # the options of another engine say nothing
    if clashes:
        lines = [f"engine.{k} is {given[k]!r} in {where(k)}, {c.value!r} by {c.source}" for k, c in clashes.items()]
        raise ValueError(
            "the run's configuration and the launcher's disagree: " + "; ".join(lines) + ". Take one of them out: "
            "`engine=auto` takes the launcher's engine and keeps engine.dtype; launch/ddp.yaml (distributed_type "
            "MULTI_GPU, mixed_precision no) leaves both to the run."
        )
    return given | {k: c.value for k, c in asked.items()}


def check_all_started(environ: Environment = os.environ) -> None:
    """``accelerate launch --num_processes 2`` starts one process on a machine without GPUs, and says nothing.

    It shows in the environment: accelerate names a rendezvous address only where several processes were asked for.

    Args:
        environ: Environment variables.

    Raises:
        ValueError: If that has happened.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_ADDR" in environ
    several = any(name in environ for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    if launched and not several:
        raise ValueError(
            "accelerate was asked for several processes but started one, as it does on machines without GPUs. Use "
            "`accelerate launch --config_file launch/ddp.yaml --num_processes N -m scalemlo ...` or "
            "`torchrun --nproc-per-node N -m scalemlo ...`."
        )


def _fsdp(environ: Environment) -> dict[str, Claim]:
    first = environ.get("FSDP_VERSION", "1") == "1"
    # accelerate exports version 1's strategy always, and reads it in version 1 only.
    _require({k: v for k, v in WITH_FSDP.items() if first or k != "FSDP_SHARDING_STRATEGY"}, environ)
    found = {"type": Claim("fsdp", _source(environ, "ACCELERATE_USE_FSDP"))}
    key = "FSDP_SHARDING_STRATEGY" if first else "FSDP_RESHARD_AFTER_FORWARD"
    if environ.get(key, "").lower() in ("shard_grad_op", "2", "false"):
        found["reshard_after_forward"] = Claim(False, _source(environ, key))
    if "FSDP_TRANSFORMER_CLS_TO_WRAP" in environ:
        names = environ["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")
        found["units"] = Claim([n.strip() for n in names], _source(environ, "FSDP_TRANSFORMER_CLS_TO_WRAP"))
    return found


def _deepspeed(environ: Environment) -> dict[str, Claim]:
    _require({variable: Honoured(("none", "cpu"), "choose none or cpu") for variable in OFFLOADS}, environ)
    found = {"type": Claim("deepspeed", _source(environ, "ACCELERATE_USE_DEEPSPEED"))}
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environ:
        found |= _deepspeed_file(environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    stage = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
    if stage in environ:
        found["stage"] = Claim(int(environ[stage]), _source(environ, stage))
    found.setdefault("stage", Claim(2, f"accelerate's default, as {stage} is not set"))
    for variable, option in OFFLOADS.items():
        if environ.get(variable, "none").lower() == "cpu":
            found[option] = Claim(True, _source(environ, variable))
    level = {v: key for v, key in OF_THE_LEVEL.items() if environ.get(v, "auto") not in ("auto", "none")}
    if level and "config" not in found:  # accelerate does not let both be given
        values = {key: json.loads(environ[variable]) for variable, key in level.items()}
        found["config"] = Claim(values, ", ".join(_source(environ, variable) for variable in level))
    return found


def _deepspeed_file(path: str) -> dict[str, Claim]:
    """The file, which the engine checks, and the stage and precision in it, which are options of their own."""
    found = {"config": Claim(path, f"ACCELERATE_DEEPSPEED_CONFIG_FILE={path}")}
    return found | {field: Claim(value, f"{path} ({key})") for field, (value, key) in stated(read(path)).items()}


def _contradict(option: str, given: Any, asked: Any) -> bool:
    if option != "config":
        return given != asked
    theirs = read(asked)  # a run saves what it used of a file, which is less than the file
    return any(theirs.get(key) != value for key, value in read(given).items())


def _require(table: Mapping[str, Honoured], environ: Environment) -> None:
    wrong = [
        f"{_source(environ, variable)}: {honoured.otherwise}"
        for variable, honoured in table.items()
        if variable in environ and environ[variable].lower() not in honoured.values
    ]
    if wrong:
        raise ValueError("accelerate's configuration asks for what scalemlo does not do. " + "; ".join(wrong) + ".")


def _source(environ: Environment, variable: str) -> str:
    return f"{variable}={environ[variable]}"


def _is_on(environ: Environment, variable: str) -> bool:
    return environ.get(variable, "").lower() in ("true", "1", "yes")
