"""What a tensor or an operation is while a derivative is being taken: dual, traced, constant, in place."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch._C import DisableTorchFunction
from torch._C import _functorch as functorch

TRAINED = "_scalemlo_trained"
"""Marks lent weights whose live ones require a gradient: they say so themselves."""

DEPENDS = "_scalemlo_depends"
"""Marks tensors inside a run that depend on weights which are trained: they would require a gradient."""


def inside_function() -> bool:
    """Whether the forward or the jvp of a ``torch.autograd.Function`` is running: torch switches tangents off there."""
    return not torch._C._is_fwd_grad_enabled()


# ---- constants -------------------------------------------------------------------------------------------------------
def as_constant(func: Callable, args: tuple, kwargs: dict) -> Any:
    """An operation under ``no_grad``: its outcome carries no derivative, and what it writes into keeps its own."""
    written = kwargs.get("out")
    if isinstance(written, Tensor):
        func(*constants(args), **constants(kwargs))
        return written
    if args and isinstance(args[0], Tensor) and is_in_place(func, args, kwargs):
        func(*constants(args), **constants(kwargs))
        return args[0]
    out = func(*args, **kwargs)
    if isinstance(out, Tensor) and args and isinstance(args[0], Tensor) and is_the_same(func, args[0], out):
        return args[0]  # x.float() of an fp32 tensor is x itself, whose gradient no_grad does not stop
    out = constants(out)
    if has_traced(args):
        for x in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(x, Tensor):
                x.__dict__[_STOPPED] = True
    return out


_STOPPED = "_scalemlo_stopped"
"""Marks constants that have been computed from what moves."""


def has_traced(args: Sequence[Any]) -> bool:
    """Whether an argument carries a derivative, or is a constant that was computed from one."""
    return any(isinstance(x, Tensor) and (_STOPPED in x.__dict__ or is_traced(x)) for x in args)


def constants(x: Any) -> Any:
    """All tensors of a structure detached."""
    if isinstance(x, Tensor):
        return x.detach() if x.is_floating_point() or x.is_complex() else x
    if isinstance(x, (list, tuple)):
        found = [constants(item) for item in x]
        return type(x)(*found) if hasattr(x, "_fields") else type(x)(found)
    if isinstance(x, dict):
        return type(x)({key: constants(item) for key, item in x.items()})
    return x


_MAY_RETURN_ITS_INPUT = frozenset(
    ("to", "type", "float", "double", "half", "bfloat16", "cpu", "cuda", "xpu", "contiguous")
)


def is_the_same(func: Callable, x: Tensor, out: Tensor) -> bool:
    """Whether an operation would have returned its very input outside of any derivative."""
    if name_of(func) not in _MAY_RETURN_ITS_INPUT or out.dtype != x.dtype or out.device != x.device:
        return False
    return x.stride() == out.stride() and x.shape == out.shape


def name_of(func: Callable) -> str:
    """Its plain name; empty for objects that can be called and have none."""
    return getattr(func, "__name__", "")


def plain(x: Tensor) -> Tensor:
    """The value of a tensor, out of all derivatives."""
    with DisableTorchFunction():
        x = _unwrapped(x)
        if fwAD._current_level >= 0:
            with fwAD._set_fwd_grad_enabled(True):
                x = fwAD.unpack_dual(x).primal
        return x.detach()


def plain_in(x: Any) -> Any:
    """A structure with the values of its tensors."""
    if isinstance(x, Tensor):
        return plain(x)
    if isinstance(x, (list, tuple)):
        return type(x)(plain_in(item) for item in x)
    if isinstance(x, dict):
        return {key: plain_in(item) for key, item in x.items()}
    return x


def is_traced(x: Tensor) -> bool:
    """Whether a tensor carries a derivative of any kind."""
    if not (x.is_floating_point() or x.is_complex()):
        return False
    return has_tangent(x) or (functorch.is_functorch_wrapped_tensor(x) and x.requires_grad)


def has_tangent(x: Tensor) -> bool:
    """Whether a plain dual number is somewhere inside a tensor."""
    if fwAD._current_level < 0:
        return False
    with DisableTorchFunction(), fwAD._set_fwd_grad_enabled(True):
        return fwAD.unpack_dual(_unwrapped(x)).tangent is not None


def memory(x: Tensor) -> int:
    """Identifies the memory that a tensor and its views lie in, whatever transforms wrap it."""
    with DisableTorchFunction():
        return _unwrapped(x).untyped_storage()._cdata


def _unwrapped(x: Tensor) -> Tensor:
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


@cache
def _writes_by_name(func: Callable) -> bool:
    name = name_of(func)
    if name in ("requires_grad_", "detach_", "share_memory_", "rename_"):
        return False
    return (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name in _IN_PLACE_OPERATORS)


_IN_PLACE_OPERATORS = frozenset(
    f"__{name}__"
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift")
) | {"__irshift__", "__imatmul__"}


def is_in_place(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether an operation writes into its first argument, or into ``out=``."""
    if _writes_by_name(func) or func is _SET_ITEM or kwargs.get("out") is not None:
        return True
    return kwargs.get("inplace") is True or (len(args) > 1 and _inplace_by_position(func, args))


@cache
def _position_of_inplace(func: Callable) -> int | None:
    """Where the functions of torch.nn.functional have their argument ``inplace``."""
    code = getattr(func, "__code__", None)
    if code is None or "inplace" not in code.co_varnames[: code.co_argcount]:
        return None
    return code.co_varnames.index("inplace")


def _inplace_by_position(func: Callable, args: tuple) -> bool:
    position = _position_of_inplace(func)
    return position is not None and position < len(args) and args[position] is True


_SET_ITEM = Tensor.__setitem__


def described(func: Callable) -> str:
    """How to call an operation in a message."""
    return getattr(func, "__qualname__", None) or name_of(func) or repr(func)
