"""Unrolled differentiation in forward mode along random directions: memory that does not grow with the steps."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from ..derivatives.trajectory import LevelState, RecordedStep, clipping_factor
from ..derivatives.update_rules import State
from ..distributed.shards import Shards
from .base import LowerProblem, Result, Status, UnrollingHypergradient
from .fields import require_count
from .random_directions import along, rademacher
from .registry import estimator


@estimator(
    "forward_gradient",
    citation="Shen et al. 2024, Memory-Efficient Gradient Unrolling for Large-Scale Bi-level Optimization",
)
@dataclass(frozen=True, kw_only=True)
class ForwardGradient(UnrollingHypergradient):
    """FG2U: an unbiased estimate of the unrolled hypergradient from M directional derivatives.

    With v = dF/dw at w_K, b of independent entries +-1 and ``t = (dw_K/dlambda) b``, carried forward through the K
    steps of the lower optimizer::

        dF/dlambda  =  E[ <v, t> b ],     here the mean over M draws of b

    Per step and direction one gradient with tangents, about two gradients' work, by weights and upper parameters moving
    together. Memory: weights, optimizer state and their tangents, whatever K. The variance grows with the number of
    upper parameters: meant for few of them, or with a large M.

    Reference: Shen et al. 2024, "Memory-Efficient Gradient Unrolling for Large-Scale Bi-level Optimization", eq. 6.

    Args:
        num_steps: See :class:`UnrollingHypergradient`.
        num_directions: M.
        seed: Of the directions.

    Raises:
        ValueError: If a value is out of range.
    """

    num_directions: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self, "num_directions")

    def pull_back(self, v: Shards, problem: LowerProblem) -> tuple[dict[str, Shards], Result]:
        """See :meth:`Hypergradient.pull_back`."""
        total: dict[str, Shards] = {}
        for _ in range(self.num_directions):
            direction = rademacher(problem, self.seed)
            moved = _tangent_of_weights(problem, direction)
            part = along(direction, float(v.dot(moved)) / self.num_directions)
            total = {n: total[n].add_(x) if n in total else x for n, x in part.items()}
        num_hvps = self.num_directions * problem.trajectory.num_steps
        return total, Result(v, Status.DONE, num_iterations=problem.trajectory.num_steps, num_hvps=num_hvps)


def _tangent_of_weights(problem: LowerProblem, direction: Mapping[str, Shards]) -> Shards:
    """``dw_K/dlambda`` times a direction."""
    trajectory, block = problem.trajectory, problem.block
    state = trajectory.start()
    tangent = state.weights * 0.0
    moments: dict[str, State] = {name: {} for name in tangent}
    above = [(problem.uppers[name], b) for name, b in direction.items()]
    for step in trajectory.steps:
        loss = step.at(state)
        gradients, tangents = loss.gradient_and_tangents([(block, tangent), *above], {"lower": block})
        state, tangent, moments = _update(step, state, gradients["lower"], tangent, tangents["lower"], moments)
    return tangent


def _update(
    step: RecordedStep, state: LevelState, gradient: Shards, tangent: Shards, slope: Shards, moments: dict[str, State]
) -> tuple[LevelState, Shards, dict[str, State]]:
    """State, tangent of the weights and tangents of the optimizer's moments after a step."""
    factor = clipping_factor(gradient, step.max_grad_norm)
    clipped = gradient * factor
    slope = slope * factor
    if factor < 1.0:
        assert step.max_grad_norm is not None
        norm = float(gradient.norm())
        growth = float(gradient.dot(slope)) / (factor * norm)  # of the norm
        slope.add_(gradient, alpha=-step.max_grad_norm / (norm + 1e-6) ** 2 * growth)
    weights, optimizer, moved, moved_moments = {}, {}, {}, {}
    for name, g in clipped.items():
        held = state.optimizer[name]
        with fwAD.dual_level():
            dual = {k: fwAD.make_dual(t, moments[name][k]) if k in moments[name] else t for k, t in held.items()}
            after, weight = step.rule(
                step.groups[name],
                dual,
                fwAD.make_dual(state.weights[name], tangent[name]),
                fwAD.make_dual(g, slope[name]),
            )
            weights[name], moved[name] = _split(weight)
            pairs = {key: _split(t) for key, t in after.items()}
        optimizer[name] = {key: primal for key, (primal, _) in pairs.items()}
        moved_moments[name] = {key: t for key, (_, t) in pairs.items() if key != "step"}
    group = gradient.group
    return LevelState(Shards(weights, group), optimizer), Shards(moved, group), moved_moments


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = fwAD.unpack_dual(x)
    return primal, torch.zeros_like(primal) if tangent is None else tangent
