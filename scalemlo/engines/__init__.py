"""Engines: how a module is held and trained."""

from .base import Engine, EngineSpec, ModuleView
from .ddp import DDP
from .fsdp import FSDP
from .single import Single

ENGINES: dict[str, type[EngineSpec]] = {"single": Single, "ddp": DDP, "fsdp": FSDP}
"""Engine by the name configurations use."""

__all__ = ["DDP", "ENGINES", "FSDP", "Engine", "EngineSpec", "ModuleView", "Single"]
