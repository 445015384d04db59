"""What an estimator of the hypergradient sees, and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor
from torch.optim import Optimizer

from ..derivatives.hessian import PRODUCTS, HessianOperator, Products
from ..derivatives.products import LossAt
from ..derivatives.trajectory import Trajectory
from ..distributed.shards import Shards
from ..engines.base import ParameterBlock
from .fields import require_count

Method = Literal["auto", "forward", "finite_difference", "ghost"]
METHODS: tuple[Method, ...] = ("auto", "forward", "finite_difference", "ghost")
"""How a mixed partial is taken."""


class Status(Enum):
    """How a solve ended."""

    EXACT = "closed form, nothing was iterated"
    DONE = "took the number of steps it was given"
    CONVERGED = "reached its tolerance"
    MAX_STEPS = "stopped at its limit of steps before its tolerance; try more steps, a looser tolerance or damping"
    INDEFINITE = "met a direction of negative curvature, stopped there; try damping, or more lower steps in between"
    SINGULAR = "met a direction of no curvature, stopped there; try damping"
    DIVERGED = "the residual grew; try a smaller step_size or learning_rate, or damping"

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
        pull: What to add to the lower level's own gradient of this tick, from estimators that change its loss.
    """

    value: Shards
    status: Status
    num_iterations: int = 0
    num_hvps: int = 0
    residual: float | None = None
    pull: Shards | None = None


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

    @property
    def is_read(self) -> bool:
        """Whether the loss of the level that asks reads this level, not only through levels in between."""

    @property
    def is_verified(self) -> bool:
        """Whether what is computed is held against the live module; not where ``verify="off"``."""

    def require_read(self, estimator: str) -> None:
        """Raise a ``ValueError`` unless :attr:`is_read`."""

    @property
    def trajectory(self) -> Trajectory:
        """The steps of the level since the levels above moved, for estimators with :attr:`Hypergradient.unrolls`."""


@dataclass(frozen=True, kw_only=True)
class Hypergradient(ABC):
    """How upper levels differentiate through a lower level: an estimator of one hop."""

    citation: ClassVar[str] = ""
    """Authors, year and title of its source, for model cards."""

    needs_gradient: ClassVar[bool] = False
    """Whether it asks for the gradient of the lower level's next step."""

    differentiates_upper: ClassVar[bool] = True
    """Whether it needs the gradient of the upper loss by the lower weights; others only evaluate the upper loss."""

    scores: ClassVar[bool] = False
    """Whether it reaches the upper parameters by the probability of draws, not by the lower loss's derivative."""

    only_direct: ClassVar[bool] = False
    """Whether it adds nothing to the direct gradient, which must not be missing then, but pulls the lower level."""

    unrolls: ClassVar[bool] = False
    """Whether it differentiates through steps the level took: they are recorded, and the level steps first."""

    reads_optimizer: ClassVar[bool] = False
    """Whether it reads the state of the lower level's optimizer, which is on the device only where this says so."""

    evaluates_upper: ClassVar[bool] = False
    """Whether it evaluates the upper loss: the modules that loss reads are on the device only where this says so."""

    @abstractmethod
    def pull_back(self, v: Shards, problem: LowerProblem) -> tuple[dict[str, Shards], Result]:
        """One hop of the hypergradient, from the lower weights to the levels above.

        Args:
            v: Gradient of the upper loss by the lower weights.
            problem: The lower level.

        Returns:
            What to add to the gradient of each upper level, by name; and how it was had.
        """


@dataclass(frozen=True, kw_only=True)
class ImplicitHypergradient(Hypergradient):
    """An estimator of the implicit function theorem's form.

    With F the upper loss, L the lower loss and v = dF/dw, an upper level's gradient is
    ``dF/dlambda - d2L/dlambda dw . s(v)``; the estimator supplies s(v), an approximation of H^-1 v.

    Args:
        mixed: How the mixed partial is taken: ``"forward"`` (exact) or ``"finite_difference"``, see
            :mod:`scalemlo.derivatives.products`; ``"ghost"``, exact and nearly free where the lower loss is a
            weighted mean, see :mod:`scalemlo.derivatives.ghost`; or ``"auto"``, by ghost products where they apply
            and else by the forward derivative (``ghost/<level>`` in the history says which).

    Raises:
        ValueError: If ``mixed`` is unknown, or ``"ghost"`` with an estimator that needs the lower gradient first.
    """

    mixed: Method = "auto"

    def __post_init__(self) -> None:
        if self.mixed not in METHODS:
            raise ValueError(f"mixed={self.mixed!r} is unknown; choose one of {list(METHODS)}.")
        if self.mixed == "ghost" and not self.may_take_products:
            raise ValueError(
                f"mixed='ghost' gives the mixed partial together with the lower gradient, but {type(self).__name__} "
                "needs that gradient first. Use mixed='forward', or Identity(mixed='ghost')."
            )

    @property
    def may_take_products(self) -> bool:
        """Whether its mixed partial may come out of the pass that gives the lower gradient: one, for s(v)."""
        return not self.needs_gradient and type(self).pull_back is ImplicitHypergradient.pull_back

    @property
    def chooses_method(self) -> bool:
        """Whether ``mixed`` leaves a choice."""
        return self.mixed == "auto" and self.may_take_products

    @abstractmethod
    def solve(self, v: Shards, problem: LowerProblem) -> Result:
        """Return s(v).

        Args:
            v: Gradient of the upper loss by the lower weights.
            problem: The lower level.
        """

    def pull_back(self, v: Shards, problem: LowerProblem) -> tuple[dict[str, Shards], Result]:
        """``-d2L/dlambda dw . s(v)``; see :meth:`Hypergradient.pull_back`."""
        result = self.solve(v, problem)
        return {name: -product for name, product in problem.mixed(result.value).items()}, result


@dataclass(frozen=True, kw_only=True)
class CurvatureHypergradient(ImplicitHypergradient):
    """An estimator that takes Hessian-vector products.

    Args:
        mixed: See :class:`ImplicitHypergradient`.
        products: How they are had: ``"remat"``, ``"retain"``, or ``"auto"``; see
            :data:`scalemlo.derivatives.hessian.PRODUCTS`.

    Raises:
        ValueError: If ``products`` is unknown.
    """

    products: Products = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.products not in PRODUCTS:
            raise ValueError(f"products={self.products!r} is unknown; choose one of {list(PRODUCTS)}.")


@dataclass(frozen=True, kw_only=True)
class UnrollingHypergradient(Hypergradient):
    """An estimator that goes through the last K steps of the lower level's optimizer, as they were taken.

    The steps are recorded (batches, masks, options, about sqrt(K) states on the host), and the upper level moves after
    the K-th, whose effect is part of the derivative. No level may stand below it.

    Args:
        num_steps: K, at most the level's ``unroll_steps``; by default all of them. Fewer are a truncation.

    Raises:
        ValueError: If ``num_steps`` is below 1.
    """

    unrolls: ClassVar[bool] = True

    num_steps: int | None = None

    def __post_init__(self) -> None:
        if self.num_steps is not None:
            require_count(self, "num_steps")

    def steps_of(self, unroll_steps: int, level: str) -> int:
        """K for a level that makes ``unroll_steps`` steps between two of the levels above.

        Args:
            unroll_steps: Of the level.
            level: Name for messages.

        Returns:
            K.

        Raises:
            ValueError: If more steps are asked for than there are: the levels above moved in between.
        """
        if self.num_steps is not None and self.num_steps > unroll_steps:
            raise ValueError(
                f"level {level!r}: num_steps={self.num_steps} of {type(self).__name__} is more than the level's "
                f"unroll_steps={unroll_steps}; before those, the levels above moved. Raise unroll_steps."
            )
        return self.num_steps or unroll_steps
