"""Hooks on an optimizer's step that make the update another function of the gradient than the optimizer's own.

Estimators differentiate the loss, its gradient and the optimizer's rule. A ``step_pre_hook`` that masks or rescales
gradients, and a ``step_post_hook`` that clamps weights, come on top, where no derivative sees them. Most hooks only
look.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from ..autodiff.errors import DerivativeError


@contextmanager
def watched(optimizer: Optimizer, level: str) -> Iterator[None]:
    """Context of one step: hooks that change gradients or weights are found out; nothing has changed then but by them.

    Args:
        optimizer: About to step.
        level: Name for messages.

    Yields:
        Nothing.
    """
    before = [*optimizer._optimizer_step_pre_hooks, *torch_optimizer._global_optimizer_pre_hooks]
    after = list(optimizer._optimizer_step_post_hooks)
    with ExitStack() as stack:
        if before:
            gradients = _gradients(optimizer)
            last = optimizer.register_step_pre_hook(
                lambda *_: _check(
                    _gradients(optimizer) == gradients,
                    f"level {level!r}: a step_pre_hook of its optimizer changes gradients before the step, which no "
                    "derivative follows. Do that with a hook on the weight (weight.register_hook(...), which is "
                    "followed), with max_grad_norm, or in the loss",
                )
            )
            stack.callback(last.remove)
        if after:
            seen: list[Any] = []
            first = optimizer.register_step_post_hook(lambda *_: seen.extend(_weights(optimizer)))
            optimizer._optimizer_step_post_hooks.move_to_end(first.id, last=False)  # ty: ignore[missing-attribute]
            last = optimizer.register_step_post_hook(
                lambda *_: _check(
                    _weights(optimizer) == seen,
                    f"level {level!r}: a step_post_hook of its optimizer changes weights after the step, which no "
                    "derivative follows. Constrain them in the module (torch.nn.utils.parametrize), say",
                )
            )
            stack.callback(first.remove)
            stack.callback(last.remove)
        yield


def _check(is_same: bool, message: str) -> None:
    if not is_same:
        raise DerivativeError(f"{message}; verify='off' trains with what may be wrong.")


def _gradients(optimizer: Optimizer) -> list[Any]:
    held = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return [None if g is None else (id(g), _version(g)) for g in held]


def _weights(optimizer: Optimizer) -> list[int]:
    return [_version(p) for group in optimizer.param_groups for p in group["params"]]


def _version(t: Tensor) -> int:
    return t._local_tensor._version if isinstance(t, DTensor) else t._version
