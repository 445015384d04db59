"""What a recipe is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...loop.program import Program
from ...runs.config import RunConfig


@dataclass(frozen=True)
class Recipe:
    """A program that runs from a YAML file; every module of a recipe has one, named ``RECIPE``.

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
