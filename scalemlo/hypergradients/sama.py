"""SAMA: the identity, adapted to the optimizer that trains the lower level."""

from dataclasses import dataclass
from typing import ClassVar

from ..distributed.shards import Shards
from .base import ImplicitHypergradient, LowerProblem, Result, Status
from .registry import estimator
from .update_derivative import update_derivatives


@estimator("sama", citation="Choe et al. 2023, Making Scalable Meta Learning Practical")
@dataclass(frozen=True, kw_only=True)
class SAMA(ImplicitHypergradient):
    """``s(v) = D v`` with ``D = du/dg``, the derivative of the lower optimizer's next update by its gradient.

    The lower level moves by ``w <- w - u(g)``, not by a multiple of g; a fixed point of the optimizer's own update
    brings D into the hypergradient. D is diagonal for the optimizers it knows, and is computed at the gradient the
    next step will use, with bias correction, coupled weight decay, AMSGrad, momentum, learning rate and clipping
    factor (held constant) as in the update itself; see :mod:`scalemlo.hypergradients.update_derivative`. Costs no
    Hessian-vector product; holds D and one gradient of the lower level beside v.

    Reference: Choe et al. 2023, "Making Scalable Meta Learning Practical", eq. 4-5. The nudge of the lower weights
    along v that the paper adds is left out: weights are not changed by a hypergradient.
    """

    needs_gradient: ClassVar[bool] = True
    reads_optimizer: ClassVar[bool] = True

    def solve(self, v: Shards, problem: LowerProblem) -> Result:
        """Return D v.

        Args:
            v: Gradient of the upper loss by the lower weights.
            problem: The lower level.

        Returns:
            The preconditioned vector.
        """
        return Result(update_derivatives(problem) * v, Status.EXACT)
