"""What an estimator of the inverse Hessian sees, and what it returns."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor
from torch.optim import Optimizer

from ..engines.base import ParameterBlock
from ..second_order.hessian import PRODUCTS, HessianOperator, Products
from ..second_order.products import LossAt
from ..shards import Shards

Method = Literal["forward", "finite_difference", "ghost"]
METHODS: tuple[Method, ...] = ("forward", "finite_difference", "ghost")
"""How a mixed partial is taken."""


class Status(Enum):
    """How a solve ended."""

    EXACT = "closed form, nothing was iterated"
    DONE = "took the number of steps it was given"
    CONVERGED = "reached its tolerance"
    MAX_STEPS = "stopped at its limit of steps before its tolerance; try more steps, a looser tolerance or damping"
    INDEFINITE = "met a direction of negative curvature, stopped there; try damping, or more lower steps in between"
    SINGULAR = "met a direction of no curvature, stopped there; try damping"
    DIVERGED = "the residual grew; try a smaller step_size, or damping"

    @property
    def is_good(self) -> bool:
        """Whether the result is what was asked for."""
        return self in (Status.EXACT, Status.DONE, Status.CONVERGED)


@dataclass(frozen=True)
class Result:
    """``s(v)``, the estimate of H^-1 v, and how it was reached.

    Args:
        value: The estimate.
        status: How the solve ended.
        num_iterations: Iterations of the solver.
        num_hvps: Hessian-vector products it took.
        residual: ``|v - H s| / |v|``, where the solver knows it.
    """

    value: Shards
    status: Status
    num_iterations: int = 0
    num_hvps: int = 0
    residual: float | None = None


class LowerProblem(Protocol):
    """The lower level at the current point, as an estimator sees it, asked by one level above."""

    name: str
    optimizer: Optimizer
    memory: dict[str, Any]
    """What the estimator keeps from one solve to the next (vectors, numbers), for this pair of levels."""

    def weights(self) -> Shards:
        """Its parameters."""

    def gradient(self) -> tuple[Shards, float]:
        """The gradient its next step will use, after clipping, and the factor clipping multiplied it with."""

    def optimizer_state(self, name: str) -> Mapping[str, Tensor]:
        """The optimizer's state of one parameter, tensors as local shards; empty before the first step."""

    def parameter_group(self, name: str) -> Mapping[str, Any]:
        """The optimizer's options of one parameter."""

    def hessian(self, products: Products = "auto") -> AbstractContextManager[HessianOperator]:
        """``v -> H v`` of its loss on the batches of its next step, while inside the context."""

    def mixed(self, v: Shards) -> dict[str, Shards]:
        """``d/dlambda <dL/dw, v>`` for each level above that the hypergradient goes to, by name."""

    @property
    def block(self) -> ParameterBlock:
        """Its parameters, in their engine."""

    @property
    def uppers(self) -> dict[str, ParameterBlock]:
        """The parameters of the levels above that the hypergradient goes to, by level name."""

    @property
    def loss(self) -> LossAt:
        """Its loss on the batches of its next step, to be differentiated at any weights."""

    @property
    def upper_loss(self) -> LossAt:
        """The loss of the level that asks, on the batches of its next step."""


@dataclass(frozen=True, kw_only=True)
class Hypergradient:
    """How upper levels differentiate through a lower level.

    With F the upper loss, L the lower loss and v = dF/dw, an upper level's gradient is
    ``dF/dlambda - d2L/dlambda dw . s(v)``; the estimator supplies s(v), an approximation of H^-1 v.

    Args:
        mixed: How the mixed partial is taken: ``"forward"`` (exact) or ``"finite_difference"``, see
            :mod:`scalemlo.second_order.products`; or ``"ghost"``, exact and nearly free where the lower loss is a
            weighted mean, see :mod:`scalemlo.second_order.ghost`.

    Raises:
        ValueError: If ``mixed`` is unknown, or ``"ghost"`` with an estimator that needs the lower gradient first.
    """

    needs_gradient: ClassVar[bool] = False
    """Whether :meth:`solve` asks for the gradient of the next step."""

    mixed: Method = "forward"

    def __post_init__(self) -> None:
        if self.mixed not in METHODS:
            raise ValueError(f"mixed={self.mixed!r} is unknown; choose one of {list(METHODS)}.")
        if self.mixed == "ghost" and self.needs_gradient:
            raise ValueError(
                f"mixed='ghost' gives the mixed partial together with the lower gradient, but {type(self).__name__} "
                "needs that gradient first. Use mixed='forward', or Identity(mixed='ghost')."
            )

    def solve(self, v: Shards, problem: LowerProblem) -> Result:
        """Return s(v).

        Args:
            v: Gradient of the upper loss by the lower weights.
            problem: The lower level.

        Raises:
            NotImplementedError: If the estimator is not of that form; it overrides :meth:`pull_back` then.
        """
        raise NotImplementedError(f"{type(self).__name__} does not estimate H^-1 v")

    def pull_back(self, v: Shards, problem: LowerProblem) -> tuple[dict[str, Shards], Result]:
        """One hop of the hypergradient, from the lower weights to the levels above.

        Args:
            v: Gradient of the upper loss by the lower weights.
            problem: The lower level.

        Returns:
            What to add to the gradient of each upper level, by name: ``-d2L/dlambda dw . s(v)``; and how it was had.
        """
        result = self.solve(v, problem)
        return {name: -product for name, product in problem.mixed(result.value).items()}, result


@dataclass(frozen=True, kw_only=True)
class CurvatureHypergradient(Hypergradient):
    """An estimator that takes Hessian-vector products.

    Args:
        mixed: See :class:`Hypergradient`.
        products: How they are had: ``"remat"``, ``"retain"``, or ``"auto"``; see
            :data:`scalemlo.second_order.hessian.PRODUCTS`.

    Raises:
        ValueError: If ``products`` is unknown.
    """

    products: Products = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.products not in PRODUCTS:
            raise ValueError(f"products={self.products!r} is unknown; choose one of {list(PRODUCTS)}.")
