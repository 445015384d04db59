"""Engines: how a module is held and trained."""

from .base import Engine, EngineSpec, ModuleView
from .ddp import DDP
from .deepspeed import DeepSpeed
from .fsdp import FSDP
from .single import Single

ENGINES: dict[str, type[EngineSpec]] = {"single": Single, "ddp": DDP, "fsdp": FSDP, "deepspeed": DeepSpeed}
"""Engine by the name configurations use."""

__all__ = ["DDP", "DeepSpeed", "ENGINES", "FSDP", "Engine", "EngineSpec", "ModuleView", "Single"]
