"""Hugging Face: trainers, data, models, losses, saving.

Names are looked up when first used, so that losses and models do not import the trainers.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "MLOCallback": "callbacks",
    "MLOConfig": "config",
    "MLOTrainer": "trainer",
    "ReweightingConfig": "config",
    "ReweightingTrainer": "reweighting_trainer",
    "load_causal_lm": "models",
    "prepare_dataset": "prepare",
    "save_pretrained": "saving",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
