"""What checkpoints hold, as they see it: a program between two outer iterations, and its levels."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..engines.base import Engine, ParameterBlock
from ..engines.loss_scaler import LossScaler
from ..history import History
from ..hypergradients import Hypergradient


class Stateful(Protocol):
    """What gives its state in plain containers, and goes on from one."""

    def state_dict(self) -> dict[str, Any]:
        """Its state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from it."""
        ...


class SavedLevel(Protocol):
    """A level at work, :class:`scalemlo.loop.level_trainer.LevelTrainer`.

    Attributes:
        name: Of the level.
        engine: Holds its module.
        block: Its parameters.
        optimizer: Steps them.
        scheduler: Of its learning rate.
        scaler: Of its loss.
        estimator: Of the hypergradient through it.
        memory: Of the estimator, by the level that asks.
        num_steps: Steps made.
        trajectory: Of recorded steps; forgotten when a checkpoint is loaded.
    """

    name: str
    engine: Engine
    block: ParameterBlock
    optimizer: Optimizer
    scheduler: LRScheduler | None
    scaler: LossScaler
    estimator: Hypergradient
    memory: dict[str, dict[str, Any]]
    num_steps: int
    trajectory: Any

    @property
    def stream(self) -> Stateful | None:
        """Its batches, whose position is saved."""
        ...


class Saved(Protocol):
    """A program, :class:`scalemlo.loop.iteration.Iteration`.

    Attributes:
        device: Of this rank.
        history: What was measured.
        extra_state: Values of callbacks and recipes.
        generator: Seeds are drawn from it.
        num_steps: Outer iterations made.
    """

    device: torch.device
    history: History
    extra_state: dict[str, Any]
    generator: torch.Generator
    num_steps: int

    @property
    def trainers(self) -> Mapping[str, SavedLevel]:
        """The levels at work, by name."""
        ...

    @property
    def gradients(self) -> Stateful:
        """What is known of the levels since their first gradients."""
        ...
