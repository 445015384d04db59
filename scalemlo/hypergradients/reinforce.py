"""The score-function estimate: for lower levels trained on what upper levels draw."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from ..derivatives.products import LossAt
from ..distributed.group import world_size
from ..distributed.shards import Shards
from ..ops import ScoreTape
from .base import LowerProblem, Result, Status, UnrollingHypergradient
from .registry import estimator


@estimator(
    "reinforce",
    citation="Williams 1992, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning",
)
@dataclass(frozen=True, kw_only=True)
class Reinforce(UnrollingHypergradient):
    """REINFORCE: the lower loss draws with :func:`scalemlo.sample`, and draws that did well become more likely.

    With m the draws of the K lower steps, of probability p(m; lambda), and F the upper loss after them::

        d/dlambda E_m[F]  =  E_m[ (F - c) * sum over steps of d/dlambda log p(m_k; lambda) ]

    of which this is one draw. The baseline c is a running mean of F, which leaves the expectation as it is; the first
    outer iteration only sets it, and contributes nothing. F is only evaluated: it may have no derivative, and draws may
    be discrete. Costs one gradient per step to come to its state again and one pass for its score.

    Reference: Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
    Learning", eq. 11.

    Args:
        num_steps: See :class:`UnrollingHypergradient`.
        baseline_decay: Of the running mean: ``c <- decay c + (1 - decay) F``.

    Raises:
        ValueError: If a value is out of range, the lower loss draws nothing, or the level that asks does not read the
            lower one in its own loss.
    """

    differentiates_upper: ClassVar[bool] = False
    scores: ClassVar[bool] = True
    evaluates_upper: ClassVar[bool] = True

    baseline_decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.baseline_decay < 1:
            raise ValueError(f"baseline_decay={self.baseline_decay} must be in [0, 1).")

    def pull_back(self, v: Shards, problem: LowerProblem) -> tuple[dict[str, Shards], Result]:
        """See :meth:`Hypergradient.pull_back`; v, which may be zero, is not used."""
        problem.require_read(type(self).__name__)
        outcome = problem.upper_loss.value()
        baseline = problem.memory.get("baseline", outcome)
        problem.memory["baseline"] = self.baseline_decay * baseline + (1 - self.baseline_decay) * outcome
        total = {name: block.shards() * 0.0 for name, block in problem.uppers.items()}
        for step, state in problem.trajectory.states():
            for name, score in _score(step.at(state), problem).items():
                total[name].add_(score, alpha=outcome - baseline)
        return total, Result(v, Status.DONE, num_iterations=problem.trajectory.num_steps)


def _score(loss: LossAt, problem: LowerProblem) -> dict[str, Shards]:
    """``d/dlambda log p`` of all draws of one step, on all ranks and micro-batches together."""
    log_probability = replace(loss, evaluate=partial(_log_probability, loss.evaluate, problem.name))
    count = world_size() * len(loss.batches)  # a sum, where gradients of losses are means
    return {name: x.mul_(count) for name, x in log_probability.gradient(problem.uppers).items()}


def _log_probability(evaluate: Callable[[Any], Tensor], level: str, batch: Any) -> Tensor:
    tape = ScoreTape()
    with tape.recording():
        loss = evaluate(batch)
    if not tape.scores:
        raise ValueError(
            f"level {level!r}: Reinforce needs a loss that draws with scalemlo.sample(distribution), so that the upper "
            "parameters decide how likely a draw is; this one draws nothing."
        )
    return sum(tape.scores, 0.0 * loss.detach())
