"""Recipes: programs that run from a YAML file."""

from types import ModuleType

from . import (
    autolora,
    bidora,
    bilora,
    bissl,
    darts,
    datarater,
    deep_equilibrium,
    domain_weights,
    federated,
    few_shot,
    group_fairness,
    hyperparameters,
    label_correction,
    label_noise,
    learning_by_ignoring,
    long_tail,
    masked_autoencoder,
    objective_weights,
    prompted_segmentation,
    reward_domains,
    reweight_instructions,
    safe_selection,
)
from .study.recipe import Recipe

_MODULES: list[ModuleType] = [
    reweight_instructions,
    long_tail,
    bidora,
    bilora,
    autolora,
    deep_equilibrium,
    domain_weights,
    datarater,
    group_fairness,
    few_shot,
    hyperparameters,
    label_correction,
    label_noise,
    learning_by_ignoring,
    federated,
    darts,
    reward_domains,
    safe_selection,
    masked_autoencoder,
    bissl,
    objective_weights,
    prompted_segmentation,
]

RECIPES: dict[str, Recipe] = {module.__name__.rpartition(".")[2]: module.RECIPE for module in _MODULES}
"""Recipe by name, which is that of its module."""

CONFIGS = {name: recipe.config for name, recipe in RECIPES.items()}
"""Configuration dataclass by recipe name: what :func:`scalemlo.runs.config.load` takes."""
