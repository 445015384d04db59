"""One step of torch's optimizers as a differentiable function ``(state, w, g) -> (state', w')`` of local shards.

Every rule is elementwise, so its derivatives need no communication. It repeats the arithmetic of ``torch.optim`` to
rounding; the tests compare the two. Square roots have derivative zero at zero, as an entry that never had a gradient
has a finite derivative under Adam: of g / (|g| + eps) it is 1 / eps.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

State = dict[str, Tensor]
"""What an optimizer keeps of one parameter, ``step`` as a 0-dimensional tensor; empty before the first step."""

UpdateRule = Callable[[Mapping[str, Any], State, Tensor, Tensor], tuple[State, Tensor]]
"""``rule(group, state, weight, gradient) -> (state, weight)`` after the step; changes nothing in place."""


def sgd_step(group: Mapping[str, Any], state: State, weight: Tensor, gradient: Tensor) -> tuple[State, Tensor]:
    """SGD with momentum, dampening, Nesterov's variant and coupled weight decay.

    ``g <- g + wd w``;  ``b <- mu b + (1 - d) g`` (``b = g`` at the first step);  ``w <- w - lr (g + mu b or b)``.

    Args:
        group: The optimizer's options.
        state: ``momentum_buffer``, or empty.
        weight: w.
        gradient: g.

    Returns:
        State and weight after the step.
    """
    g = _signed(group, gradient)
    if group["weight_decay"]:
        g = g + group["weight_decay"] * weight
    state = dict(state)
    if group["momentum"]:
        buffer = state.get("momentum_buffer")
        buffer = g if buffer is None else group["momentum"] * buffer + (1 - group["dampening"]) * g
        state["momentum_buffer"] = buffer
        g = g + group["momentum"] * buffer if group["nesterov"] else buffer
    return state, weight - float(group["lr"]) * g


def adam_step(group: Mapping[str, Any], state: State, weight: Tensor, gradient: Tensor) -> tuple[State, Tensor]:
    """Adam and, with ``decoupled_weight_decay``, AdamW; also their AMSGrad variants.

    ``m <- b1 m + (1-b1) g``;  ``q <- b2 q + (1-b2) g^2``;
    ``w <- w - lr / (1-b1^t) * m / (sqrt(q / (1-b2^t)) + eps)``.

    Args:
        group: The optimizer's options.
        state: ``step``, ``exp_avg``, ``exp_avg_sq`` and, for AMSGrad, ``max_exp_avg_sq``; or empty.
        weight: w.
        gradient: g.

    Returns:
        State and weight after the step.
    """
    beta1, beta2 = (float(b) for b in group["betas"])
    rate, decay = float(group["lr"]), group["weight_decay"]
    g = _signed(group, gradient)
    if decay and group.get("decoupled_weight_decay", False):
        weight = weight * (1 - rate * decay)
    elif decay:
        g = g + decay * weight
    zero = torch.zeros_like(weight)
    step = state["step"] + 1 if state else torch.ones((), dtype=torch.float64)
    m = beta1 * state.get("exp_avg", zero) + (1 - beta1) * g
    q = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * g * g
    after: State = {"step": step, "exp_avg": m, "exp_avg_sq": q}
    if group["amsgrad"]:
        q = torch.maximum(state.get("max_exp_avg_sq", zero), q)
        after["max_exp_avg_sq"] = q
    t = float(step)
    denominator = _safe_sqrt(q) / (1 - beta2**t) ** 0.5 + group["eps"]
    return after, weight - rate / (1 - beta1**t) * m / denominator


def _safe_sqrt(x: Tensor) -> Tensor:
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _signed(group: Mapping[str, Any], gradient: Tensor) -> Tensor:
    return -gradient if group["maximize"] else gradient


UPDATE_RULES: dict[type[Optimizer], UpdateRule] = {Adam: adam_step, AdamW: adam_step, SGD: sgd_step}
"""Rule by optimizer class; add one to teach unrolled differentiation a new optimizer."""


def update_rule(optimizer: Optimizer, level: str) -> UpdateRule:
    """The rule of an optimizer, by its exact class: a subclass may change the update.

    Args:
        optimizer: The optimizer.
        level: Name for messages.

    Returns:
        Its rule.

    Raises:
        ValueError: If none is known.
    """
    rule = UPDATE_RULES.get(type(optimizer))
    if rule is None:
        raise ValueError(
            f"level {level!r}: the update of {type(optimizer).__name__} is not known, which differentiating through "
            f"its steps needs; known are {sorted(c.__name__ for c in UPDATE_RULES)}. Register it in "
            "scalemlo.derivatives.update_rules.UPDATE_RULES, or use an implicit estimator, ConjugateGradient() say."
        )
    return rule
