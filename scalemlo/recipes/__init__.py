"""Recipes: programs that run from a YAML file."""

from types import ModuleType

from . import (
    autolora,
    bidora,
    bilora,
    darts,
    datarater,
    domain_weights,
    group_fairness,
    label_correction,
    learning_by_ignoring,
    long_tail,
    reward_domains,
    reweight_instructions,
    safe_selection,
)
from .recipe import Recipe

_MODULES: list[ModuleType] = [
    reweight_instructions,
    long_tail,
    bidora,
    bilora,
    autolora,
    domain_weights,
    datarater,
    group_fairness,
    label_correction,
    learning_by_ignoring,
    darts,
    reward_domains,
    safe_selection,
]

RECIPES: dict[str, Recipe] = {module.__name__.rpartition(".")[2]: module.RECIPE for module in _MODULES}
"""Recipe by name, which is that of its module."""

CONFIGS = {name: recipe.config for name, recipe in RECIPES.items()}
"""Configuration dataclass by recipe name: what :func:`scalemlo.config.load` takes."""
