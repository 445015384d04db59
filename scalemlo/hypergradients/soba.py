"""SOBA: one linear system followed over the whole run, a step at a time."""

import math
from dataclasses import dataclass

from ..distributed.shards import Shards
from .base import CurvatureHypergradient, LowerProblem, Result, Status
from .fields import require_count, require_number
from .registry import estimator
from .solver import Matvec

DIVERGED_AT = 100.0
"""A residual this many times |v|, with zero's being 1, is not worth starting from."""


def gradient_steps(matvec: Matvec, v: Shards, start: Shards, *, step_size: float, num_steps: int) -> Result:
    """``s <- s - step_size (H s - v)``, some times: gradient descent on ``s^T H s / 2 - s^T v``.

    Args:
        matvec: ``v -> H v``.
        v: Right-hand side.
        start: s before the first step; left as it is.
        step_size: Converges for less than 2 over the largest eigenvalue of H.
        num_steps: Number of steps, one product each.

    Returns:
        s after the last step, with the residual of the s before it, which costs nothing; None where v = 0.
    """
    norm = float(v.norm())
    s, residual = start, None
    for _ in range(num_steps):
        gradient = matvec(s).add_(v, alpha=-1.0)
        residual = float(gradient.norm())
        s = gradient.mul_(-step_size).add_(s)
    assert residual is not None, "num_steps is at least 1"
    relative = residual / norm if norm > 0.0 else None
    diverged = not math.isfinite(residual) or (relative is not None and relative > DIVERGED_AT)
    return Result(s, Status.DIVERGED if diverged else Status.DONE, num_steps, num_steps, relative)


@estimator(
    "soba",
    citation="Dagréou et al. 2022, A Framework for Bilevel Optimization that Enables Stochastic and Global Variance "
    "Reduction Algorithms",
)
@dataclass(frozen=True, kw_only=True)
class SOBA(CurvatureHypergradient):
    """``s <- s - step_size (H s - v)``, starting from the s of the solve before.

    As the levels move slowly, s follows ``H^-1 v``, at one Hessian-vector product per hypergradient; for fixed levels
    the error falls as ``(1 - step_size h_min)^t`` over all solves t. On stochastic batches s averages over the past.
    The first solve starts from zero, and so gives ``step_size v``. The s that this solve arrives at is used at once;
    the paper's simultaneous update uses the one before.

    Keeps one vector between solves, for each level that asks; holds one more while solving. An s whose residual is not
    finite or a hundred times that of zero is reported as ``DIVERGED`` and forgotten: the next solve starts from zero.

    Reference: Dagreou et al. 2022, "A framework for bilevel optimization that enables stochastic and global variance
    reduction algorithms", alg. 1.

    Args:
        mixed: See :class:`ImplicitHypergradient`.
        products: See :class:`CurvatureHypergradient`.
        step_size: Less than 2 over the largest eigenvalue of H. No default: it depends on the curvature.
        num_steps: Steps per solve, one product each.

    Raises:
        ValueError: If a field is out of range.
    """

    step_size: float
    num_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "step_size", positive=True)
        require_count(self, "num_steps")

    def solve(self, v: Shards, problem: LowerProblem) -> Result:
        """Return s after this solve's steps.

        Args:
            v: Gradient of the upper loss by the lower weights.
            problem: The lower level; its memory holds ``"s"``.

        Returns:
            The estimate, and the residual before the last step.
        """
        start = problem.memory.pop("s", None)
        if start is None:
            start = v.map(lambda t: t.new_zeros(t.shape))
        with problem.hessian(self.products) as hessian:
            result = gradient_steps(hessian, v, start, step_size=self.step_size, num_steps=self.num_steps)
        if result.status.is_good:
            problem.memory["s"] = result.value
        return result
