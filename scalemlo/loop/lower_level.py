"""A level as an estimator sees it, asked by one level above."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..derivatives.hessian import HessianOperator, Products, hessian
from ..derivatives.products import LossAt
from ..derivatives.trajectory import Trajectory
from ..distributed.shards import Shards
from ..engines.base import ParameterBlock
from .level_trainer import LevelTrainer


class LowerLevel:
    """A level at work as :class:`scalemlo.hypergradients.LowerProblem`: what a level above wants solved.

    Args:
        lower: The level.
        level: The one whose gradient is being computed.
        uppers: Those that the level's loss depends on and that lie on the way to it.
        gradient_of: Gives the clipped gradient of a level's next step and the clipping factor.
        fixed: Levels that are held while it is solved, see :class:`scalemlo.graph.Hop`.
    """

    def __init__(
        self,
        lower: LevelTrainer,
        level: LevelTrainer,
        uppers: Sequence[LevelTrainer],
        gradient_of: Callable[[LevelTrainer], tuple[Shards, float]],
        fixed: Sequence[str] = (),
    ):
        self.memory = lower.memory.setdefault(".".join((level.name, *fixed)), {})
        self.name, self.optimizer, self.block = lower.name, lower.optimizer, lower.block
        self._lower, self._level, self._uppers, self._gradient_of = lower, level, uppers, gradient_of

    def weights(self) -> Shards:
        """Local weights of the level."""
        return self._lower.weights()

    def gradient(self) -> tuple[Shards, float]:
        """The clipped gradient of the level's next step and the clipping factor."""
        return self._gradient_of(self._lower)

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        """State of one parameter as local shards."""
        return self._lower.optimizer_state(name)

    def parameter_group(self, name: str) -> Mapping[str, Any]:
        """The parameter group that holds a parameter."""
        return self._lower.parameter_group(name)

    @property
    def uppers(self) -> dict[str, ParameterBlock]:
        """Parameters of the levels above that the hypergradient goes to, by level name."""
        return {upper.name: upper.block for upper in self._uppers}

    @property
    def loss(self) -> LossAt:
        """The level's loss on the batches of its next step."""
        return self._lower.loss_at()

    @property
    def upper_loss(self) -> LossAt:
        """The loss of the level that asks, on the batches of its next step."""
        return replace(self._level.loss_at(), required=self._lower.engine if self.is_read else None)

    @property
    def trajectory(self) -> Trajectory:
        """The steps of the level since the levels above moved."""
        assert self._lower.trajectory is not None, "the program records where the estimator says so"
        return self._lower.trajectory

    @property
    def is_read(self) -> bool:
        """Whether the loss of the level that asks reads this level, not only through levels in between."""
        return self._lower.name in self._level.depends_on

    @property
    def is_verified(self) -> bool:
        """Whether what is computed is held against the live module."""
        return self._lower.is_verified

    def require_read(self, estimator: str) -> None:
        """Refuse estimators that evaluate the upper loss where it is not a function of this level's weights.

        Args:
            estimator: Name for messages.

        Raises:
            ValueError: If the level that asks does not read this one.
        """
        if not self.is_read:
            raise ValueError(
                f"level {self.name!r}: {estimator} evaluates the loss of {self._level.name!r} at other weights of this "
                "level, which that loss does not read: it depends on them through levels in between only. Use an "
                "estimator that pulls gradients back, Unrolled() say."
            )

    def hessian(self, products: Products = "auto") -> AbstractContextManager[HessianOperator]:
        """``v -> H v`` of the level's loss on the batches of its next step, while inside the context."""
        return hessian(self.loss, self.block, products)

    def mixed(self, v: Shards) -> dict[str, Shards]:
        """Mixed partials with v, the way the estimator wants them taken."""
        return self._lower.compute_mixed(v, self._uppers)
