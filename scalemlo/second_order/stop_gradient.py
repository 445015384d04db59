"""Stop-gradients are constants of every derivative, whichever way the derivative is taken."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class NoGradIsConstant(TorchFunctionMode):
    """Values computed under ``torch.no_grad()`` carry no tangent.

    Reverse mode treats them as constants; forward mode by itself does not ("this API does not apply to forward-mode
    AD", says the documentation of ``no_grad``). While active, both agree. ``detach()`` needs no help.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Detach what is computed while gradients are off."""
        out = func(*args, **(kwargs or {}))
        return out if torch.is_grad_enabled() else tree_map(_detached, out)


class Constants(TorchFunctionMode):
    """Record the values of stop-gradients in one evaluation, and put them in place of those of another.

    Finite differences evaluate a function at moved weights; a value behind ``detach()`` or computed under ``no_grad``
    would move with them and be differentiated by mistake. The function must call them in the same order each time.

    Args:
        recorded: What an earlier evaluation recorded, to replay it; None to record.
    """

    def __init__(self, recorded: "list[Tensor] | None" = None):
        super().__init__()
        self.values: list[Tensor] = [] if recorded is None else recorded
        self._replay = None if recorded is None else iter(recorded)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Record or replace the outcome of a stop-gradient."""
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and (func in _DETACH or not torch.is_grad_enabled()):
            if self._replay is not None:
                return next(self._replay)
            self.values.append(out)
        return out


_DETACH = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # ty: ignore[missing-attribute]


def _detached(x):
    return x.detach() if isinstance(x, Tensor) else x
