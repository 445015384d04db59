"""Conjugate gradients on the Hessian, with a verified residual and every way to fail told apart."""

import math
from dataclasses import dataclass

from ..distributed.shards import Shards
from .base import CurvatureHypergradient, LowerProblem, Result, Status
from .fields import require_count, require_number
from .registry import estimator
from .solver import Matvec, rounding


def conjugate_gradient(
    matvec: Matvec, v: Shards, *, max_steps: int, tolerance: float | None = None, damping: float = 0.0
) -> Result:
    """Solve ``(H + damping I) s = v`` for symmetric positive definite ``H + damping I``.

    The residual that the recurrence carries drifts away from the true one, so the true one is computed at the end, by
    one more product. If the recurrence claims a tolerance that the true residual has not reached, the method goes on
    from the true one. Holds four vectors beside v.

    Args:
        matvec: ``v -> H v``.
        v: Right-hand side.
        max_steps: Limit of steps.
        tolerance: Stop once ``|v - (H + damping I) s| <= tolerance |v|``; not below the rounding error of v's dtype.
            None takes ``max_steps`` steps, fewer where rounding error is reached.
        damping: Added to the diagonal.

    Returns:
        The last iterate and its true residual. A direction p with ``p^T H p`` negative (``INDEFINITE``) or zero to
        rounding, measured against the largest ``|H p| / |p|`` so far (``SINGULAR``), ends the method at the iterate
        before it; if already the first direction is one, that is v itself, the estimate of the identity. Where a
        product is not finite, s is NaN (``DIVERGED``).
    """
    norm = float(v.norm())
    if norm == 0.0:
        return Result(v, Status.EXACT, residual=0.0)
    limit = max(tolerance or 0.0, rounding(v))
    s, r, p = v * 0.0, v.clone(), v.clone()
    status = Status.DONE if tolerance is None else Status.MAX_STEPS
    num_steps = num_products = 0
    square, largest = norm**2, 0.0  # |r|^2, the largest |H p| / |p|
    residual: float | None = None  # the true one, of the present s

    while num_steps < max_steps:
        product = matvec(p).add_(p, alpha=damping)
        num_products += 1
        length, curvature = float(p.norm()), float(p.dot(product))
        if not math.isfinite(curvature):  # let it show: whether to raise or to skip is the program's business
            return Result(s.mul_(math.nan), Status.DIVERGED, num_steps, num_products, math.nan)
        largest = max(largest, float(product.norm()) / length)
        noise = 10 * rounding(v) * largest * length**2
        if not curvature > noise:
            status = Status.SINGULAR if curvature >= -noise else Status.INDEFINITE
            if num_steps == 0:
                return Result(v, status, 0, num_products, float((v - product).norm()) / norm)
            break
        s.add_(p, alpha=square / curvature)
        r.add_(product, alpha=-square / curvature)
        num_steps += 1
        residual = None
        previous, square = square, float(r.dot(r))
        if math.sqrt(square) > limit * norm:
            p.mul_(square / previous).add_(r)
            continue
        r = _residual(matvec, v, s, damping)
        num_products += 1
        square = float(r.dot(r))
        residual = math.sqrt(square) / norm
        if tolerance is None or residual <= limit:
            break
        p = r.clone()

    if residual is None:
        residual = float(_residual(matvec, v, s, damping).norm()) / norm
        num_products += 1
    if tolerance is not None and residual <= limit:
        status = Status.CONVERGED
    return Result(s, status, num_steps, num_products, residual)


def _residual(matvec: Matvec, v: Shards, s: Shards, damping: float) -> Shards:
    return matvec(s).mul_(-1.0).add_(s, alpha=-damping).add_(v)


@estimator("conjugate_gradient", citation="Pedregosa 2016, Hyperparameter Optimization with Approximate Gradient")
@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(CurvatureHypergradient):
    """``s(v) = (H + damping I)^-1 v`` by conjugate gradients, started at zero.

    Exact after as many steps as H has distinct eigenvalues; before, the error in the norm of H falls at least as
    ``2 ((sqrt(c) - 1) / (sqrt(c) + 1))^k`` with c the condition number. Needs the lower level near a minimum: where H
    is not positive definite it stops at the iterate so far (v itself at the first step) and says so; damping helps.
    Costs one Hessian-vector product per step and one for the residual; holds four vectors beside v.

    Reference: Hestenes and Stiefel 1952; for hypergradients Pedregosa 2016, "Hyperparameter optimization with
    approximate gradient", alg. 1, and Rajeswaran et al. 2019, "Meta-Learning with Implicit Gradients", alg. 2, whose
    regularisation lambda makes the same system with ``damping = lambda`` up to a factor.

    Args:
        mixed: See :class:`ImplicitHypergradient`.
        products: See :class:`CurvatureHypergradient`.
        max_steps: Limit of steps.
        tolerance: Stop once the residual, of the damped system, is at most this fraction of |v|; None takes
            ``max_steps`` steps.
        damping: Added to the diagonal of H.

    Raises:
        ValueError: If a field is out of range.
    """

    max_steps: int = 10
    tolerance: float | None = 1e-5
    damping: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self, "max_steps")
        if self.tolerance is not None:
            require_number(self, "tolerance", positive=True)
        require_number(self, "damping", positive=False)

    def solve(self, v: Shards, problem: LowerProblem) -> Result:
        """Return the solution, or the iterate where it had to stop.

        Args:
            v: Gradient of the upper loss by the lower weights.
            problem: The lower level.

        Returns:
            The estimate, and its residual.
        """
        with problem.hessian(self.products) as hessian:
            return conjugate_gradient(
                hessian, v, max_steps=self.max_steps, tolerance=self.tolerance, damping=self.damping
            )
