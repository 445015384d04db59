"""Engines: how a module is held and trained."""

import difflib
from typing import Any

from .base import Engine, EngineSpec
from .ddp import DDP
from .deepspeed.engine import DeepSpeed
from .fsdp import FSDP
from .single import Single
from .view import ModuleView

ENGINES: dict[str, type[EngineSpec]] = {"single": Single, "ddp": DDP, "fsdp": FSDP, "deepspeed": DeepSpeed}
"""Engine by the name configurations use."""

ENGINE_SHORTHANDS: dict[str, dict[str, Any]] = {
    "zero1": {"type": "deepspeed", "stage": 1},
    "zero2": {"type": "deepspeed", "stage": 2},
    "zero3": {"type": "deepspeed", "stage": 3},
    "zero3_offload": {"type": "deepspeed", "stage": 3, "offload_optimizer": True, "offload_parameters": True},
}
"""Engine and options by a shorter name that configurations use too."""


def engine_of(given: str | EngineSpec) -> EngineSpec:
    """Make an engine from its name.

    Args:
        given: A name of :data:`ENGINES` or :data:`ENGINE_SHORTHANDS`; an engine is returned as it is.

    Returns:
        The engine, with its defaults.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(given, EngineSpec):
        return given
    section = dict(ENGINE_SHORTHANDS.get(given, {"type": given}))
    kind = section.pop("type")
    if kind not in ENGINES:
        known = [*ENGINES, *ENGINE_SHORTHANDS]
        close = difflib.get_close_matches(str(given), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"engine={given!r} is unknown; choose one of {known}, or give mlo.FSDP(...), say.{hint}")
    return ENGINES[kind](**section)


__all__ = [
    "DDP",
    "DeepSpeed",
    "ENGINES",
    "ENGINE_SHORTHANDS",
    "FSDP",
    "Engine",
    "EngineSpec",
    "ModuleView",
    "Single",
    "engine_of",
]
