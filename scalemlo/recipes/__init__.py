"""Recipes: programs that run from a YAML file."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import RunConfig
from ..program import Program
from . import reweight_instructions


@dataclass(frozen=True)
class Recipe:
    """A named program.

    Attributes:
        config: Its configuration dataclass.
        build: Makes its program, untrained.
        run: Runs it; returns whether it was interrupted.
        description: One line.
    """

    config: type[RunConfig]
    build: Callable[[Any], Program]
    run: Callable[[Any], bool]
    description: str


RECIPES: dict[str, Recipe] = {
    "reweight_instructions": Recipe(
        reweight_instructions.ReweightInstructionsConfig,
        reweight_instructions.build,
        reweight_instructions.run,
        "fine-tune a language model on instructions, learning the weight of every example from a small clean set",
    ),
}
"""Recipe by name."""
