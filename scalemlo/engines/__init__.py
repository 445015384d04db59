"""Engines: how a module is held and trained."""

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

__all__ = ["DDP", "DeepSpeed", "ENGINES", "ENGINE_SHORTHANDS", "FSDP", "Engine", "EngineSpec", "ModuleView", "Single"]
