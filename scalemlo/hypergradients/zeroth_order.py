"""Two-point estimates: for upper losses without a derivative (an accuracy, a reward, what a judge says)."""

from dataclasses import dataclass
from typing import ClassVar

from ..distributed.shards import Shards
from .base import LowerProblem, Result, Status, UnrollingHypergradient
from .fields import require_count, require_number
from .random_directions import along, rademacher
from .registry import estimator


@estimator(
    "zeroth_order",
    citation="Spall 1992, Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient "
    "Approximation",
)
@dataclass(frozen=True, kw_only=True)
class ZerothOrder(UnrollingHypergradient):
    """Differences of the upper loss after lower steps with upper parameters moved to and fro.

    With ``w_K(lambda)`` the lower weights after the K steps and b of independent entries +-1::

        dF/dlambda  ~  mean over M of  [F(w_K(lambda + r b)) - F(w_K(lambda - r b))] / (2 r) * b

    F is only evaluated, never differentiated: it may be any number a loss returns. The lower loss needs its gradient.
    Takes the K steps again twice per direction. Only the response of the lower level is estimated; where F depends on
    lambda directly and has a derivative, the program adds it. Stop-gradients are no constants here: what moves, moves.
    Bias O(r^2) where F is smooth; the variance grows with
    the number of upper parameters.

    Reference: Spall 1992, "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient
    Approximation", eq. 2.1; as a gradient of a smoothed loss: Nesterov and Spokoiny 2017, eq. 30.

    Args:
        num_steps: See :class:`UnrollingHypergradient`.
        num_directions: M.
        radius: r, in units of the upper parameters.
        seed: Of the directions.

    Raises:
        ValueError: If a value is out of range, or the level that asks does not read the lower one in its own loss.
    """

    differentiates_upper: ClassVar[bool] = False
    evaluates_upper: ClassVar[bool] = True

    num_directions: int = 1
    radius: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self, "num_directions")
        require_number(self, "radius", positive=True)

    def pull_back(self, v: Shards, problem: LowerProblem) -> tuple[dict[str, Shards], Result]:
        """See :meth:`Hypergradient.pull_back`; v, which may be zero, is not used."""
        problem.require_read(type(self).__name__)
        lambdas = {name: block.shards() for name, block in problem.uppers.items()}
        total: dict[str, Shards] = {}
        for _ in range(self.num_directions):
            direction = rademacher(problem, self.seed)

            def outcome(radius: float, direction: dict[str, Shards] = direction) -> float:
                above = [(problem.uppers[n], lambdas[n] + x) for n, x in along(direction, radius).items()]
                state = problem.trajectory.forward(*above)
                return problem.upper_loss.at((problem.block, state.weights)).value()

            difference = outcome(self.radius) - outcome(-self.radius)
            part = along(direction, difference / (2 * self.radius * self.num_directions))
            total = {n: total[n].add_(x) if n in total else x for n, x in part.items()}
        return total, Result(v, Status.DONE, num_iterations=problem.trajectory.num_steps)
