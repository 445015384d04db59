"""What memory code sees of a level at work: whose states there are, and which of them its phases read."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from torch.optim import Optimizer

from ..derivatives.trajectory import Trajectory
from ..engines.base import Engine, ParameterBlock
from ..hypergradients import Hypergradient


class Owner(Protocol):
    """A level at work, :class:`scalemlo.loop.level_trainer.LevelTrainer`.

    Attributes:
        name: Of the level.
        engine: Holds its module; levels may share one.
        block: Its parameters.
        optimizer: Steps them.
        memory: Of the estimator, by the level that asks.
        estimator: Runs in its hypergradient phases.
        trajectory: Its recorded steps, where the estimator goes through them.
    """

    name: str
    engine: Engine
    block: ParameterBlock
    optimizer: Optimizer
    memory: dict[str, dict[str, Any]]
    estimator: Hypergradient
    trajectory: Trajectory | None

    @property
    def others(self) -> Mapping[str, "Owner"]:
        """The levels that its loss reads."""
        ...

    @property
    def depends_on(self) -> frozenset[str]:
        """Names of all levels that it depends on directly."""
        ...

    @property
    def unrolls(self) -> bool:
        """Whether its steps are recorded."""
        ...


OwnerT = TypeVar("OwnerT", bound=Owner)
