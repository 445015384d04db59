"""The penalty method without a value function: the lower level itself follows the penalised loss."""

from dataclasses import dataclass
from typing import ClassVar

from ..distributed.shards import Shards
from .base import Hypergradient, LowerProblem, Result, Status
from .fields import require_number
from .registry import estimator


@estimator(
    "pbgd_free",
    citation="Jiang et al. 2025, Beyond Value Functions: Single-Loop Bilevel Optimization under Flatness Conditions",
)
@dataclass(frozen=True, kw_only=True)
class PBGDFree(Hypergradient):
    """The lower level follows ``L + F / penalty``; the hypergradient is the direct gradient ``dF/dlambda`` alone.

    Adds ``v / penalty`` to the lower gradient of the same tick, so costs nothing beyond v. Right only where F is flat
    in the lower weights about their best response. A level above whose loss does not depend on its own parameters
    directly (weights of examples) would never move: that is an error.

    Reference: Jiang et al. 2025, "Beyond Value Functions: Single-Loop Bilevel Optimization under Flatness Conditions".

    Args:
        penalty: How much L counts against F.

    Raises:
        ValueError: If ``penalty`` is not a positive number.
    """

    only_direct: ClassVar[bool] = True

    penalty: float = 10.0

    def __post_init__(self) -> None:
        require_number(self, "penalty", positive=True)

    def pull_back(self, v: Shards, problem: LowerProblem) -> tuple[dict[str, Shards], Result]:
        """Nothing for the levels above, a pull for the lower one; see :meth:`Hypergradient.pull_back`."""
        return {}, Result(v, Status.DONE, pull=v * (1 / self.penalty))
