"""Recipes: programs that run from a YAML file."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import RunConfig
from ..program import Program
from . import autolora, bidora, bilora, reweight_instructions


@dataclass(frozen=True)
class Recipe:
    """A named program.

    Attributes:
        config: Its configuration dataclass.
        build: Makes its program, untrained.
        run: Runs it; returns whether it was interrupted.
        description: One line.
        paper: What it follows.
    """

    config: type[RunConfig]
    build: Callable[[Any], Program]
    run: Callable[[Any], bool]
    description: str
    paper: str


RECIPES: dict[str, Recipe] = {
    "reweight_instructions": Recipe(
        reweight_instructions.ReweightInstructionsConfig,
        reweight_instructions.build,
        reweight_instructions.run,
        "fine-tune a language model on instructions, learning the weight of every example from a small clean set",
        "Ren et al. 2018, Learning to Reweight Examples for Robust Deep Learning (arXiv:1803.09050)",
    ),
    "bidora": Recipe(
        bidora.BiDoRAConfig,
        bidora.build,
        bidora.run,
        "fine-tune with DoRA, learning the magnitudes on a validation split",
        "Qin et al. 2024, BiDoRA: Bi-level Optimization-Based Weight-Decomposed Low-Rank Adaptation (arXiv:2410.09758)",
    ),
    "bilora": Recipe(
        bilora.BiLoRAConfig,
        bilora.build,
        bilora.run,
        "fine-tune with low-rank updates, learning their pseudo singular values on a validation split",
        "Qiang et al. 2024, BiLoRA: A Bi-level Optimization Framework for Overfitting-Resilient Low-Rank Adaptation of "
        "Large Pre-trained Models (arXiv:2403.13037)",
    ),
    "autolora": Recipe(
        autolora.AutoLoRAConfig,
        autolora.build,
        autolora.run,
        "fine-tune with LoRA, learning the rank of every layer on a validation split",
        "Zhang et al. 2024, AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation Based on Meta Learning "
        "(arXiv:2403.09113)",
    ),
}
"""Recipe by name."""

CONFIGS = {name: recipe.config for name, recipe in RECIPES.items()}
"""Configuration dataclass by recipe name: what :func:`scalemlo.config.load` takes."""
