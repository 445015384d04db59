"""``du/dg`` of an optimizer's next update ``w <- w - u(g)``, entry by entry.

Each rule reads the state as it is before the step and repeats the optimizer's own arithmetic, so that the derivative
belongs to the very update that the step will make. ``maximize=True`` feeds -g to the update, so the derivative changes
its sign. Decoupled weight decay does not depend on g.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..distributed.shards import Shards
from .base import LowerProblem

Rule = Callable[[Mapping[str, Any], Mapping[str, Tensor], Tensor, Tensor], Tensor]
"""``rule(group, state, gradient, weight) -> du/dg``, all of the shape of the local shard."""


def adam(group: Mapping[str, Any], state: Mapping[str, Tensor], gradient: Tensor, weight: Tensor) -> Tensor:
    """Derivative of the update of Adam, and of AdamW with ``decoupled_weight_decay``.

    With ``m = b1 m' + (1-b1) g``, ``q = b2 q' + (1-b2) g^2``, ``r = sqrt(q / (1-b2^t))`` and
    ``u = lr / (1-b1^t) * m / (r + eps)``::

        du/dg = lr / (1-b1^t) * [ (1-b1) / (r+eps)  -  m (1-b2) g / ((1-b2^t) r (r+eps)^2) ]

    Coupled weight decay adds ``weight_decay * w`` to g first. AMSGrad replaces q by its running maximum; where the
    maximum is an older one the second term is zero.

    Args:
        group: The optimizer's options.
        state: ``exp_avg``, ``exp_avg_sq``, ``step``, before the step; empty at the first one.
        gradient: g.
        weight: w.

    Returns:
        du/dg.
    """
    beta1, beta2 = (float(b) for b in group["betas"])
    step = float(state["step"]) + 1 if state else 1.0
    g = _sign(group) * gradient
    if group["weight_decay"] and not group.get("decoupled_weight_decay", False):
        g = g + group["weight_decay"] * weight
    zero = torch.zeros((), dtype=g.dtype, device=g.device)
    m = beta1 * state.get("exp_avg", zero) + (1 - beta1) * g
    q = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * g * g
    slope = 2 * (1 - beta2) * g  # dq/dg
    if group["amsgrad"]:
        older = state.get("max_exp_avg_sq", zero)
        slope = torch.where(q >= older, slope, 0.0)
        q = torch.maximum(q, older)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    r = (q / correction2).sqrt()
    denominator = r + group["eps"]
    drift = torch.where(r > 0, m * slope / (2 * correction2 * r * denominator**2), 0.0)
    return _sign(group) * group["lr"] / correction1 * ((1 - beta1) / denominator - drift)


def sgd(group: Mapping[str, Any], state: Mapping[str, Tensor], gradient: Tensor, weight: Tensor) -> Tensor:
    """Derivative of the update of SGD with momentum, dampening and Nesterov's variant; a constant.

    ``buf = mu buf' + (1-d) g`` (``buf = g`` at the first step) and ``u = lr * (g + mu buf if nesterov else buf)``.

    Args:
        group: The optimizer's options.
        state: ``momentum_buffer``, before the step; empty at the first one.
        gradient: g.
        weight: w.

    Returns:
        du/dg.
    """
    slope = 1.0
    if group["momentum"]:
        first = state.get("momentum_buffer") is None
        slope = 1.0 if first else 1.0 - group["dampening"]
        if group["nesterov"]:
            slope = 1.0 + group["momentum"] * slope
    return torch.full_like(gradient, _sign(group) * float(group["lr"]) * slope)


def _sign(group: Mapping[str, Any]) -> float:
    return -1.0 if group["maximize"] else 1.0


RULES: dict[type[Optimizer], Rule] = {Adam: adam, AdamW: adam, SGD: sgd}
"""Rule by optimizer class; add one to teach SAMA and Neumann a new optimizer."""


def update_derivative(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    gradient: Tensor,
    weight: Tensor,
) -> Tensor:
    """``du/dg`` of one parameter at the next step of an optimizer.

    Args:
        optimizer: Looked up by its exact class: a subclass may change the update.
        group: Its options for this parameter.
        state: Its state of this parameter, as local shards.
        gradient: The gradient of the next step, local shard.
        weight: The parameter, local shard.

    Returns:
        Diagonal of du/dg, local shard.

    Raises:
        ValueError: If no rule is known for the optimizer.
    """
    if type(optimizer) in RULES:
        return RULES[type(optimizer)](group, state, gradient, weight)
    raise ValueError(unknown_update(optimizer))


def update_derivatives(problem: LowerProblem) -> Shards:
    """``D = du/dg`` of a level's next update, as a diagonal over its parameters, clipping factor (a constant) included.

    Args:
        problem: The lower level; asked for the gradient of its next step.

    Returns:
        A new vector; local, nothing is reduced beyond what the gradient takes.

    Raises:
        ValueError: If no rule is known for the level's optimizer.
    """
    if type(problem.optimizer) not in RULES:
        raise ValueError(f"level {problem.name!r}: {unknown_update(problem.optimizer)}")
    gradient, clip_factor = problem.gradient()
    weights = problem.weights()
    diagonal = {}
    for name in weights:
        diagonal[name] = update_derivative(
            problem.optimizer,
            problem.parameter_group(name),
            problem.optimizer_state(name),
            gradient=gradient[name],
            weight=weights[name],
        )
        if clip_factor != 1.0:
            diagonal[name] *= clip_factor
    return Shards(diagonal, weights.group)


def unknown_update(optimizer: Optimizer) -> str:
    """What to tell a user whose optimizer has no rule."""
    return (
        f"the estimator does not know the update of {type(optimizer).__name__}; it knows "
        f"{sorted(c.__name__ for c in RULES)}. Register its derivative in "
        "scalemlo.hypergradients.update_derivative.RULES, or use Identity()."
    )
