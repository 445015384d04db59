"""Exact differentiation through the steps that the lower level really took."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..autodiff.errors import DerivativeError
from ..derivatives.trajectory import LevelState, RecordedStep, clipping_factor
from ..derivatives.update_rules import State, UpdateRule
from ..distributed.shards import Shards
from .base import LowerProblem, Result, Status, UnrollingHypergradient
from .registry import estimator


@estimator(
    "unrolled", citation="Franceschi et al. 2017, Forward and Reverse Gradient-Based Hyperparameter Optimization"
)
@dataclass(frozen=True, kw_only=True)
class Unrolled(UnrollingHypergradient):
    """Reverse mode through the last K steps of the lower level's optimizer, clipping included.

    With ``(w_{k+1}, m_{k+1}) = U(w_k, m_k, g_k)``, ``g_k = dL_k/dw (w_k, lambda)`` and the adjoints
    ``a_K = dF/dw (w_K)``, ``b_K = 0``, going backwards::

        (a, b, u) = (dU/d(w_k, m_k, g_k))^T (a_{k+1}, b_{k+1})
        a_k = a + H_k u,     b_k = b,     dF/dlambda += d2L_k/dlambda dw . u

    One Hessian-vector product and one mixed partial per step, both out of one pass; the update U is elementwise and
    differentiated on the shards. Exact for SGD, momentum, Adam and AdamW, to the rounding of the recomputed states.
    Costs two gradients and one product per step. Memory: about 2 sqrt(K) copies of weights and optimizer state, all but
    two of them on the host.

    Reference: Franceschi et al. 2017, "Forward and Reverse Gradient-Based Hyperparameter Optimization", alg. 1;
    truncated: Shaban et al. 2019, "Truncated Back-propagation for Bilevel Optimization", eq. 5.

    Some forward passes carry values from step to step past every gradient: spectral normalisation iterates vectors in
    buffers, a moving average of activations or weights is compared with. How those depend on the weights is not
    followed. Where a step computes with such a buffer, that is an error unless ``holds_buffers`` says that it is meant.

    Args:
        num_steps: See :class:`UnrollingHypergradient`.
        holds_buffers: Take buffers that steps compute from weights without a gradient for constants.
    """

    holds_buffers: bool = False

    def pull_back(self, v: Shards, problem: LowerProblem) -> tuple[dict[str, Shards], Result]:
        """See :meth:`Hypergradient.pull_back`; the pass above, once."""
        weights, moments = v, {name: {} for name in v}
        total: dict[str, Shards] = {}
        wanted = {**problem.uppers, problem.name: problem.block}
        for i, (step, state, gradient) in enumerate(problem.trajectory.backward()):
            if i == 0 and problem.is_verified:
                _check_replay(step, state, gradient, problem)
            weights, moments, direction = _through_update(
                step, state.weights, state.optimizer, gradient, weights, moments
            )
            loss = step.at(state)
            del state, gradient  # the pass below needs the weights alone
            found = loss.tangents([(problem.block, direction)], wanted)
            weights = weights + found.pop(problem.name)
            total = {n: total[n].add_(x) if n in total else x for n, x in found.items()}
            if not self.holds_buffers:
                _refuse_carried(problem)
            del loss, direction  # before the state of the step before is brought back
        num_steps = problem.trajectory.num_steps
        return total, Result(weights, Status.EXACT, num_iterations=num_steps, num_hvps=num_steps)


REPLAY_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-1, torch.bfloat16: 5e-1, torch.float16: 5e-1}
"""How far replayed weights may be from the live ones, relative to the last step, by the dtype that is computed in."""


def _check_replay(step: RecordedStep, state: LevelState, gradient: Shards, problem: LowerProblem) -> None:
    """That the steps taken again come to where the live ones came: nearly free, as only the last update is added."""
    live = problem.block.shards()
    error = float((step.update(state, gradient).weights - live).norm())
    size = float((state.weights - live).norm())
    dtype = problem.block.engine.spec.compute_dtype or next(iter(live.values())).dtype
    if error <= REPLAY_TOLERANCE[dtype] * size or not math.isfinite(error):
        return
    raise DerivativeError(
        f"level {problem.name!r}: its last {problem.trajectory.num_steps} step(s), taken again, end "
        f"{error / max(size, 1e-300):.1e} of the last step's length away from where the live ones ended. They depend "
        "on something that is another one the second time (random numbers from a generator of its own, data that "
        "changes in place, weights that a callback writes), or the optimizer's update is not the one that its class is "
        "known for. verify='off' trains with what may be wrong."
    )


def _refuse_carried(problem: LowerProblem) -> None:
    carried = sorted(problem.block.engine.skeleton.carries)
    if carried:
        raise DerivativeError(
            f"level {problem.name!r}: its forward pass writes values that depend on the weights into {carried[:3]} "
            "under no_grad, and computes with them: a step depends on the weights through them in a way that no "
            "gradient follows. Freeze them (eval mode of spectral_norm, say), or take them for constants, as the "
            "gradient of each step does: Unrolled(holds_buffers=True)."
        )


def _through_update(
    step: RecordedStep,
    weights: Shards,
    states: Mapping[str, State],
    gradient: Shards,
    weights_adjoint: Shards,
    state_adjoints: Mapping[str, State],
) -> tuple[Shards, dict[str, State], Shards]:
    """Adjoints of weights, optimizer state and gradient before a step, from those after it."""
    factor = clipping_factor(gradient, step.max_grad_norm)
    before: dict[str, Tensor] = {}
    moments: dict[str, State] = {}
    direction: dict[str, Tensor] = {}
    for name, g in gradient.items():
        before[name], moments[name], direction[name] = _through_rule(
            step.rule, step.groups[name], states[name], weights[name], g * factor,
            weights_adjoint[name], state_adjoints[name],
        )  # fmt: skip
    through_clipping = Shards(direction, gradient.group)
    if factor < 1.0:
        assert step.max_grad_norm is not None
        norm = float(gradient.norm())
        slope = -step.max_grad_norm / (norm + 1e-6) ** 2  # of the factor by the norm
        along = slope * float(gradient.dot(through_clipping)) / norm
        through_clipping = (through_clipping * factor).add_(gradient, alpha=along)
    return Shards(before, weights.group), moments, through_clipping


def _through_rule(
    rule: UpdateRule,
    group: Mapping[str, Any],
    state: State,
    weight: Tensor,
    gradient: Tensor,
    weight_adjoint: Tensor,
    state_adjoint: State,
) -> tuple[Tensor, State, Tensor]:
    """The same for one parameter: autograd through an elementwise rule."""
    moving = {key: t.detach().requires_grad_() for key, t in state.items() if key != "step"}
    w, g = weight.detach().requires_grad_(), gradient.detach().requires_grad_()
    with torch.enable_grad():
        after, moved = rule(group, {**state, **moving}, w, g)
        outputs, adjoints = [moved], [weight_adjoint]
        for key, adjoint in state_adjoint.items():
            outputs.append(after[key])
            adjoints.append(adjoint)
        found = torch.autograd.grad(
            outputs, [w, g, *moving.values()], adjoints, allow_unused=True, materialize_grads=True
        )
    return found[0], dict(zip(moving, found[2:], strict=True)), found[1]
