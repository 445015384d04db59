"""Hugging Face: trainers, data, models, losses, saving.

Names are looked up when first used, so that losses and models do not import the trainers.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "MLOCallback": "trainer.callbacks",
    "MLOConfig": "trainer.config",
    "MLOTrainer": "trainer.trainer",
    "ReweightingConfig": "trainer.config",
    "ReweightingTrainer": "trainer.reweighting_trainer",
    "load_causal_lm": "models.models",
    "prepare_dataset": "data.prepare",
    "save_pretrained": "models.saving",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
