"""Stop-gradients held at their values, for differences: inside derivatives :mod:`.evaluation` makes them constants."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .tensors import inside_function


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
        if not (isinstance(out, Tensor) and out.is_floating_point()):
            return out
        if func in _DETACH or not (torch.is_grad_enabled() or inside_function()):
            if self._replay is not None:
                return next(self._replay).clone()  # which may be written into
            self.values.append(out.clone())
        return out


_DETACH = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # ty: ignore[missing-attribute]
