"""Recipes: programs that run from a YAML file."""

from types import ModuleType

from . import autolora, bidora, bilora, long_tail, reweight_instructions
from .recipe import Recipe

_MODULES: list[ModuleType] = [
    reweight_instructions,
    long_tail,
    bidora,
    bilora,
    autolora,
]

RECIPES: dict[str, Recipe] = {module.__name__.rpartition(".")[2]: module.RECIPE for module in _MODULES}
"""Recipe by name, which is that of its module."""

CONFIGS = {name: recipe.config for name, recipe in RECIPES.items()}
"""Configuration dataclass by recipe name: what :func:`scalemlo.config.load` takes."""
