"""Parts of a computation that are run again in the backward pass, one after the other, whoever takes the derivative.

A long computation that falls into independent chunks (queries of attention, tokens of a cross entropy) needs the memory
of one chunk if each is rematerialised. What does that depends on who differentiates: :func:`remat` inside
``torch.func.grad``, where all exact products are taken, and ``torch.utils.checkpoint`` in a live backward pass, which
it cannot enter.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.utils.checkpoint import checkpoint

from .evaluation import Run, current_evaluation
from .remat import remat


def inside_grad() -> bool:
    """Whether ``torch.func.grad`` (or ``vjp``), and no other transform of ``torch.func``, is running.

    Or the first run of a rematerialised block, which will run again inside one.
    """
    transforms = get_interpreter_stack()
    if transforms:
        return all(t.key() == TransformType.Grad for t in transforms)
    running = current_evaluation()
    return running is not None and isinstance(running.scopes[-1], Run)


def recomputed(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """``function(*args)``, run again in the backward pass where there will be one.

    Every derivative is that of the function, second ones by double backward included. Inside ``torch.func.jvp`` or
    ``vmap`` the function just runs.

    Args:
        function: Draws no random numbers; what is to be differentiated are its arguments.
        *args: Tensors, or None.

    Returns:
        What the function returns.
    """
    if inside_grad():
        return remat(function, *args)
    if torch.is_grad_enabled() and not get_interpreter_stack() and any(_requires_grad(x) for x in args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


def _requires_grad(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad
