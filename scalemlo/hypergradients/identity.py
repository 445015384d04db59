"""T1-T2: the inverse Hessian replaced by the identity."""

from dataclasses import dataclass

from ..distributed.shards import Shards
from .base import ImplicitHypergradient, LowerProblem, Result, Status
from .registry import estimator


@estimator(
    "identity",
    citation="Luketina et al. 2016, Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters",
)
@dataclass(frozen=True, kw_only=True)
class Identity(ImplicitHypergradient):
    """``s(v) = v``: the direction of differentiating through one plain gradient step of the lower level.

    Exact up to the factor of the step size where one SGD step separates the levels; otherwise biased wherever the
    Hessian is far from a multiple of the identity. Costs no Hessian-vector product and no memory beyond v.

    Reference: Luketina et al. 2016, "Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters",
    eq. 4 (T1-T2).
    """

    def solve(self, v: Shards, problem: LowerProblem) -> Result:
        """Return v."""
        return Result(v, Status.EXACT)
