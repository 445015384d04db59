"""The inverse Hessian as a truncated Neumann series, plain or preconditioned by the lower optimizer."""

from dataclasses import dataclass
from typing import Literal

from ..distributed.shards import Shards
from .base import CurvatureHypergradient, LowerProblem, Result, Status
from .fields import require_count, require_number
from .registry import estimator
from .solver import Matvec
from .update_derivative import update_derivatives

Preconditioner = Literal["none", "optimizer"]
PRECONDITIONERS: tuple[Preconditioner, ...] = ("none", "optimizer")

DIVERGED_AT = 100.0
"""A residual this many times |v| ends the series; smaller growth may pass, as ``H D`` is not symmetric."""


def neumann_series(
    matvec: Matvec, v: Shards, *, scale: float | Shards, num_terms: int, tolerance: float | None = None
) -> Result:
    """``s = sum_{k=0}^{K-1} (I - D H)^k D v``, which tends to H^-1 v where all eigenvalues of D H lie in (0, 2).

    Computed as ``s <- s + D r, r <- r - H D r`` from s = 0, r = v, so that ``r = v - H s`` is the residual throughout,
    for any D. Holds four vectors beside v and D.

    Args:
        matvec: ``v -> H v``.
        v: Right-hand side.
        scale: D, a number or a diagonal.
        num_terms: K; as many products, the last of which gives the residual.
        tolerance: Stop once ``|r| <= tolerance |v|``.

    Returns:
        s, with the residual of s itself. ``DIVERGED`` where the sum is further from a solution than zero is.
    """
    norm = float(v.norm())
    if norm == 0.0:
        return Result(v, Status.EXACT, residual=0.0)
    s, r = v * 0.0, v.clone()
    status = Status.DONE if tolerance is None else Status.MAX_STEPS
    num_products, residual = 0, 1.0
    while num_products < num_terms:
        term = r * scale
        s.add_(term)
        r.add_(matvec(term), alpha=-1.0)
        num_products += 1
        residual = float(r.norm()) / norm
        if tolerance is not None and residual <= tolerance:
            status = Status.CONVERGED
            break
        if not residual <= DIVERGED_AT:  # NaN too
            break
    if not residual <= 1.0 and status is not Status.CONVERGED:
        status = Status.DIVERGED
    return Result(s, status, num_products, num_products, residual)


@estimator(
    "neumann", citation="Lorraine et al. 2020, Optimizing Millions of Hyperparameters by Implicit Differentiation"
)
@dataclass(frozen=True, kw_only=True)
class Neumann(CurvatureHypergradient):
    """``s(v) = a sum_{k=0}^{K-1} (I - a H)^k v``: differentiating through K steps of gradient descent at one point.

    With ``preconditioner="optimizer"`` the steps are those of the lower level's own optimizer: a becomes ``a D``, D the
    diagonal derivative of its update, as in :class:`SAMA`, which is the first term of this series at a = 1.

    Small eigenvalues converge slowly, as ``(1 - a h)^K``: a truncated series damps them. Costs ``num_terms``
    Hessian-vector products; holds four vectors beside v, with the preconditioner also D.

    Reference: Lorraine et al. 2020, "Optimizing Millions of Hyperparameters by Implicit Differentiation",
    alg. 3, whose i iterations are ``num_terms = i + 1`` here.

    Args:
        mixed: See :class:`ImplicitHypergradient`; ``"ghost"`` needs ``preconditioner="none"``.
        products: See :class:`CurvatureHypergradient`.
        num_terms: K.
        step_size: a. The series converges for ``a < 2 / h_max``, with h_max the largest eigenvalue of H, or of D H.
        preconditioner: ``"none"`` or ``"optimizer"``.
        tolerance: Stop once ``|v - H s| <= tolerance |v|``; None takes all terms.

    Raises:
        ValueError: If a field is out of range, or ``mixed="ghost"`` meets a preconditioner.
    """

    num_terms: int = 10
    step_size: float = 1.0
    preconditioner: Preconditioner = "none"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preconditioner not in PRECONDITIONERS:
            raise ValueError(
                f"Neumann: preconditioner={self.preconditioner!r} is unknown; choose one of {list(PRECONDITIONERS)}."
            )
        require_count(self, "num_terms")
        require_number(self, "step_size", positive=True)
        if self.tolerance is not None:
            require_number(self, "tolerance", positive=True)

    @property
    def needs_gradient(self) -> bool:  # ty: ignore[incompatible-property-override]
        """Whether the optimizer's update, and so the gradient it is taken at, comes in."""
        return self.preconditioner == "optimizer"

    @property
    def reads_optimizer(self) -> bool:  # ty: ignore[incompatible-property-override]
        """Whether the optimizer's moments come in: with its update."""
        return self.needs_gradient

    def solve(self, v: Shards, problem: LowerProblem) -> Result:
        """Return the truncated series.

        Args:
            v: Gradient of the upper loss by the lower weights.
            problem: The lower level.

        Returns:
            The sum, and its residual.
        """
        scale: float | Shards = self.step_size
        if self.needs_gradient:
            scale = update_derivatives(problem).mul_(self.step_size)
        with problem.hessian(self.products) as hessian:
            return neumann_series(hessian, v, scale=scale, num_terms=self.num_terms, tolerance=self.tolerance)
