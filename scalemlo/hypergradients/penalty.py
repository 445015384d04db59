"""The penalty method: hypergradients out of first derivatives alone, at the weights and at a second copy of them."""

import math
from dataclasses import dataclass
from typing import ClassVar

from ..derivatives.held import held_at_weights
from ..derivatives.products import LossAt
from ..distributed.shards import Shards
from ..engines.base import ParameterBlock
from .base import Hypergradient, LowerProblem, Result, Status
from .fields import require_count, require_number
from .registry import estimator


@estimator("penalty", citation="Kwon et al. 2023, A Fully First-Order Method for Stochastic Bilevel Optimization")
@dataclass(frozen=True, kw_only=True)
class Penalty(Hypergradient):
    """The fully first-order method: the value function's gradient, by a second copy of the lower weights.

    With F the upper loss, L the lower loss, z the weights of the lower level (which follow L alone) and a copy y that
    follows ``L(lambda, y) + F(lambda, y) / penalty``, the hypergradient is::

        dF/dlambda(lambda, y) + penalty * [dL/dlambda(lambda, y) - dL/dlambda(lambda, z)]

    At the minimum of both it is the exact implicit one but for O(1 / penalty). Nothing is differentiated twice, so
    operations without a forward or second derivative do no harm.

    y starts at z at the first solve and is its own iterate from then on, as in F2SA: it takes ``num_steps`` gradient
    steps per solve and is never set back to z, so that few steps suffice where the problem moves slowly. Should it
    leave the finite numbers, the solve ends as :attr:`Status.DIVERGED` and the next one starts at z again.

    v need not be ``dF/dw``: where F reaches w through further levels below, v has their part too. y then follows
    ``F(lambda, y) + <v - dF/dw(lambda, z), y>``, whose slope at z is v; a level that does not read w at all has F
    linear in y. Stop-gradients in the lower loss that depend on w (example weights of ``losses.detach()``) are
    held at their values at z, since a difference of gradients would differentiate them: by an error of order one, not
    O(1 / penalty). Those inside a module (DoRA's norm) are not held.

    Per solve: ``num_steps`` gradients of L and of F by w, one of F at z, derivatives by lambda of L at y and z and of F
    at y, one forward pass of L. Holds one copy of the weights from one solve to the next, laid out as they are
    (sharded under FSDP), and while solving two gradients more. dL/dlambda is differenced, so its relative rounding
    error is multiplied by about ``penalty``: bf16 leaves little of it. An error of y or z that is still far from its
    minimum is multiplied too: the upper learning rate must shrink about as 1 / penalty, or both take more steps
    (``num_steps``, the level's ``unroll_steps``) per upper one.

    References: Kwon et al. 2023, "A Fully First-Order Method for Stochastic Bilevel Optimization", Algorithm 1 (F2SA);
    Pan et al. 2024, "ScaleBiO".

    Args:
        penalty: How much L counts against F, in the papers lambda or alpha.
        penalty_growth: Added to it after every solve, in F2SA delta.
        num_steps: Gradient steps of y per solve.
        learning_rate: Their size; plain gradient descent, on the batches of the next step.

    Raises:
        ValueError: If a number is out of its range.
    """

    evaluates_upper: ClassVar[bool] = True

    penalty: float = 10.0
    penalty_growth: float = 0.0
    num_steps: int = 1
    learning_rate: float

    def __post_init__(self) -> None:
        require_number(self, "penalty", positive=True)
        require_number(self, "learning_rate", positive=True)
        require_number(self, "penalty_growth", positive=False)
        require_count(self, "num_steps")  # without a step y is z, and the hypergradient zero

    def pull_back(self, v: Shards, problem: LowerProblem) -> tuple[dict[str, Shards], Result]:
        """Move y, and take the difference of first derivatives.

        Args:
            v: Slope by the lower weights, at z, of the upper loss.
            problem: The lower level.

        Returns:
            What to add to the direct gradients at z: ``penalty * [dL/dlambda(y) - dL/dlambda(z)] + dF/dlambda(y) -
            dF/dlambda(z)``, mean over ranks and micro-batches; and, as ``value``, ``penalty * (z - y)``, which tends to
            H^-1 v.
        """
        penalty = problem.memory.get("penalty", self.penalty)
        block, uppers = problem.block, problem.uppers
        z = problem.weights()
        y = problem.memory.get("weights")
        y = z.clone() if y is None else y
        lower, upper = held_at_weights(problem.loss), _Upper.through(v, problem)

        for _ in range(self.num_steps):
            slope = lower.at((block, y)).gradient({problem.name: block})[problem.name]
            y.add_(slope.add_(upper.slope(y), alpha=1 / penalty), alpha=-self.learning_rate)
        problem.memory["weights"], problem.memory["penalty"] = y, penalty + self.penalty_growth

        found = lower.at((block, y)).gradient(uppers)
        for name, at_weights in lower.gradient(uppers).items():
            found[name].add_(at_weights, alpha=-1.0).mul_(penalty)
        for name, change in upper.change_of_direct_gradient(y).items():
            found[name].add_(change)
        status = Status.DONE
        if not math.isfinite(float(y.norm())):  # equal on every rank
            status, problem.memory["weights"] = Status.DIVERGED, None
        return found, Result((z - y).mul_(penalty), status, num_iterations=self.num_steps)


@dataclass(frozen=True)
class _Upper:
    """``F(lambda, y) + <rest, y>`` as a function of y, its slope at the live weights being the v it is made from."""

    loss: LossAt | None  # None where it does not read y
    lower: dict[str, ParameterBlock]
    uppers: dict[str, ParameterBlock]  # those it may depend on directly
    direct: dict[str, Shards]  # dF/dlambda at the live weights
    rest: Shards

    @classmethod
    def through(cls, v: Shards, problem: LowerProblem) -> "_Upper":
        """Take F's derivatives at the live weights, in one pass."""
        loss, lower = problem.upper_loss, {problem.name: problem.block}
        if not problem.is_read:
            return cls(None, lower, {}, {}, v)
        uppers = {name: block for name, block in problem.uppers.items() if block.engine in loss.engines}
        direct = loss.gradient({**lower, **uppers})
        return cls(loss, lower, uppers, direct, v - direct.pop(problem.name))

    def slope(self, y: Shards) -> Shards:
        """By y."""
        if self.loss is None:
            return self.rest
        (slope,) = self._gradient(y, self.lower).values()
        return slope.add_(self.rest)

    def change_of_direct_gradient(self, y: Shards) -> dict[str, Shards]:
        """``dF/dlambda(y) - dF/dlambda(z)``.

        Taken also where F does not depend on lambda and it turns out zero: no sign of that is seen before the pass,
        which then runs forward only.
        """
        moved = self._gradient(y, self.uppers) if self.uppers else {}
        return {name: moved[name].add_(self.direct[name], alpha=-1.0) for name in moved}

    def _gradient(self, y: Shards, wanted: dict[str, ParameterBlock]) -> dict[str, Shards]:
        assert self.loss is not None
        (block,) = self.lower.values()
        return self.loss.at((block, y)).gradient(wanted)
