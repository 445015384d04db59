"""Operations that run otherwise while a derivative is taken: one rule each, for what torch gets wrong or leaves open.

Each rule has a row in ``tests/test_op_audit.py``, ``tests/test_safety.py`` or ``tests/test_wrong``.
"""

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._ops import OpOverload, OpOverloadPacket

from .errors import DerivativeError
from .evaluation import Evaluation, Form, Rule, current_evaluation
from .rng import RNGState
from .tensors import DEPENDS, TRAINED, has_tangent, name_of, plain
from .unfollowed import inert_in_second_pass, unfollowed

MARKS = (TRAINED, "_is_param")
"""Marks of lent weights; torch asks for the second in ``isinstance(x, nn.Parameter)``."""


def evaluation(form: Form) -> Evaluation:
    """An evaluation with the rules of this file.

    Args:
        form: See :data:`.evaluation.Form`.

    Returns:
        The one that is active here, if any, else a new one.
    """
    running = current_evaluation()
    if running is not None:
        return running
    rules = {"dual": DUAL, "along": ALONG, "graph": GRAPH, "value": VALUE, "plain": {}}[form]
    return Evaluation(form, rules, _custom if rules.keys() >= DUAL.keys() else _no_rule)


# ---- random masks ----------------------------------------------------------------------------------------------------
def _dropout(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Any:
    """Outside of torch.func a mask is filled in the order of memory, inside it in that of the indices."""
    x, p, training, inplace = _dropout_arguments(*args, **kwargs)
    if x.is_contiguous() or not training or p == 0.0:
        return run.run(func, args, kwargs)
    like = plain(x)
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        ones = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).fill_(1)
        if "alpha" in name_of(func):  # affine in x
            state = RNGState.capture(like.device)
            shift = func(torch.zeros_like(ones), p, True)
            state.restore()
            mask = func(ones, p, True) - shift
        else:
            mask, shift = func(ones, p, True), None
    if inplace:
        x = x.mul_(mask)
        return x if shift is None else x.add_(shift)
    return x * mask if shift is None else x * mask + shift


def _dropout_arguments(input, p=0.5, training=True, inplace=False, train=None):  # noqa: A002  # torch's names
    return input, p, training if train is None else train, inplace


# ---- functions whose insides have to be seen -------------------------------------------------------------------------
def _opened(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Any:
    """A function of torch.nn.functional in Python, operation by operation, so that rules apply inside it."""
    with run:
        return _without_overrides(func)(*args, **kwargs)


@functools.cache
def _without_overrides(func: types.FunctionType) -> Callable:
    scope = dict(func.__globals__)
    for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
        scope[name] = lambda *tensors: False
    opened = types.FunctionType(func.__code__, scope, name_of(func), func.__defaults__, func.__closure__)
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened


# ---- formulas --------------------------------------------------------------------------------------------------------
def _mse_loss(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Any:
    """Its tangent formula cannot add to a target that does not move."""
    if len(args) != 2 or any(v is not None for k, v in kwargs.items() if k != "reduction"):
        return run.run(func, args, kwargs)
    with run:
        squares = (args[0] - args[1]).square()
        reduce = {"mean": squares.mean, "sum": squares.sum}.get(kwargs.get("reduction", "mean"))
        return squares if reduce is None else reduce()


def _weight_norm(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """``g v / |v|``, the norm over every dimension but one, or over all for ``dim = -1``: the fused one is wrong."""

    def norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
        over = [d for d in range(v.dim()) if dim == -1 or d != dim % v.dim()]
        return v * (g / v.square().sum(over, keepdim=dim != -1).sqrt())

    with run:
        return norm(*args, **kwargs)


def _batch_norm(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Running statistics belong to the module, and torch.func would not let them be changed: updated beside."""

    def normalised(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):  # noqa: A002
        if not training or running_mean is None:
            return run.run(func, (input, running_mean, running_var, weight, bias, training, momentum, eps), {})
        with temporarily_clear_interpreter_stack(), torch.no_grad():
            values = plain(input).to(running_mean.dtype)
            over = [d for d in range(values.dim()) if d != 1]
            running_mean.lerp_(values.mean(over), momentum)
            running_var.lerp_(values.var(over), momentum)
        return run.run(func, (input, None, None, weight, bias, True, momentum, eps), {})

    return normalised(*args, **kwargs)


def _attention(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Autocast reaches into attention written out, and its backward then meets two dtypes: cast before, not inside."""
    kind = args[0].device.type if args else kwargs["query"].device.type
    if not torch.is_autocast_enabled(kind):
        return run.run(func, args, kwargs)
    dtype = torch.get_autocast_dtype(kind)

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.dtype in _CAST else x

    with torch.autocast(kind, enabled=False):
        return run.run(func, tuple(map(cast, args)), {key: cast(x) for key, x in kwargs.items()})


_CAST = (torch.float32, torch.float16, torch.bfloat16)


def _scatter_reduce(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Any:
    if any(isinstance(x, str) and x == "prod" for x in (*args, *kwargs.values())):
        raise DerivativeError(
            "scatter_reduce(reduce='prod') has a wrong second derivative in torch. Sum logarithms with "
            "scatter_add and take the exponential, or put it behind torch.no_grad()."
        )
    return run.run(func, args, kwargs)


def _masked_scatter(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Written out: the entries of the source, in order, where the mask is True."""

    def scattered(input, mask, source):  # noqa: A002  # torch's names
        mask = mask.expand_as(input)
        place = (mask.reshape(-1).cumsum(0) - 1).clamp_min(0)
        picked = source.reshape(-1)[place].view(input.shape)
        return torch.where(mask, picked, input)

    with run:
        out = scattered(*args, **kwargs)
        return args[0].copy_(out) if name_of(func).endswith("_") else out


def _embedding(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Rows of padding get no gradient, so their tangents are not followed either; nor are scaled ones unscaled."""
    ids, weight, padding, max_norm, _, scaled, sparse = _embedding_arguments(*args, **kwargs)
    if max_norm is not None:
        raise DerivativeError(
            "embedding(max_norm=...) changes its weights in the forward pass, which no derivative follows. Normalise "
            "the looked-up rows instead, or clip the weights in a callback."
        )
    if sparse:
        func, args, kwargs = F.embedding, (ids, weight, padding), {"scale_grad_by_freq": scaled}
    if (padding is None and not scaled) or not torch.is_grad_enabled():
        return run.run(func, args, kwargs)
    with run:
        rows = F.embedding(ids, weight)
        if scaled:
            counts = torch.bincount(ids.reshape(-1), minlength=weight.shape[0])[ids].to(rows.dtype).unsqueeze(-1)
            still = unfollowed(rows)
            rows = still + (rows - still) / counts
        if padding is not None:
            is_padding = (ids == padding % weight.shape[0]).unsqueeze(-1)
            rows = torch.where(is_padding, unfollowed(rows), rows)
        return rows


def _embedding_arguments(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False  # noqa: A002
):  # fmt: skip
    return input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse


# ---- stop-gradients --------------------------------------------------------------------------------------------------
def _data(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """``x.data`` is a constant."""
    return args[0].detach()


def _detach_in_place(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """``x.detach_()``: whoever holds x holds a constant from here on."""
    run.replace(args[0], args[0].detach())
    return args[0]


# ---- questions -------------------------------------------------------------------------------------------------------
def depends(x: Tensor) -> bool:
    """Whether a tensor would require a gradient in the training step."""
    if not (x.is_floating_point() or x.is_complex()):
        return False
    if getattr(x, TRAINED, False) or getattr(x, DEPENDS, False) or x.requires_grad:
        return True
    return functorch.maybe_get_level(x) > 0 or has_tangent(x)


def _asked_by_torch() -> bool:
    """Whether it is torch's own machinery that asks, torch.func in a loss say, and not the code of a module."""
    return sys._getframe(3).f_globals.get("__name__", "").startswith(_MACHINERY)


_MACHINERY = (
    *("scalemlo.autodiff", "scalemlo.derivatives", "torch._functorch", "torch.func", "torch.autograd", "torch._tensor"),
    *("torch.overrides", "torch._ops"),
)


def _requires_grad(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> bool:
    return func(*args) if _asked_by_torch() else depends(args[0])


def _is_leaf(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> bool:
    if _asked_by_torch():
        return func(*args)
    return getattr(args[0], TRAINED, False) or not depends(args[0])


class _GradFn:
    """Stands for the ``grad_fn`` of a tensor that would have one."""

    def __repr__(self) -> str:
        return "<grad_fn of the training step>"


def _grad_fn(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Any:
    if _asked_by_torch():
        return func(*args)
    return _GradFn() if depends(args[0]) and not getattr(args[0], TRAINED, False) else None


def _set_data(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> None:
    """``x.data = y``: ``Module.to`` assigns what is there already where dtype and device are right."""
    x, y = args
    if x is y or run.resolve(x) is run.resolve(y):
        return
    if functorch.maybe_current_level() is None and not has_tangent(x):
        func(*args, **kwargs)
        return
    raise DerivativeError(
        "the forward assigns to `.data` of a tensor (Module.to(...) does so, for another dtype or device), which no "
        "derivative follows. Convert modules before the program is built."
    )


def _set_requires_grad(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Any:
    if _asked_by_torch():
        return func(*args, **kwargs)
    x, value = args[0], args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
    if not value and depends(x):
        run.replace(x, x.detach())
    return x


def _backward(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Any:
    caller = sys._getframe(2)
    while caller is not None and caller.f_globals.get("__name__") in ("torch.overrides", "torch.autograd"):
        caller = caller.f_back
    if caller is not None and caller.f_globals.get("__name__", "").startswith(_MACHINERY):
        return func(*args, **kwargs)
    raise DerivativeError(
        f"the loss calls {name_of(func)}() itself, which does not reach through dual numbers. Use torch.func.grad or "
        "torch.func.vjp for a gradient inside a loss; or an estimator with first derivatives only, Penalty() say."
    )


# ---- hooks on activations --------------------------------------------------------------------------------------------
def _register_hook(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Any:
    """A hook that changes the gradient of an activation changes what moves on from it in the same way, transposed."""
    x, hook = args[0], kwargs.get("hook", args[1] if len(args) > 1 else None)
    assert hook is not None, "torch has an argument for it"
    if depends(x) and _changes_gradients(hook, plain(x)):
        run.changes_gradients = True
        with run:
            still = unfollowed(x)
            run.replace(x, still + _transposed(hook, x - still))
    return _Handle()


def _register_hook_in_graph(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Any:
    return func(args[0], inert_in_second_pass(kwargs.get("hook", args[1] if len(args) > 1 else None)))


class _Handle:
    def remove(self) -> None:
        """Nothing was registered."""


def _changes_gradients(hook: Callable, like: Tensor) -> bool:
    """Whether a hook returns other gradients than it is given; that it does so linearly.

    Raises:
        DerivativeError: If it does not.
    """
    generator = torch.Generator(device=like.device).manual_seed(0)
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        a, b = (torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator) for _ in range(2))
        of_a = hook(a.clone())
        if of_a is None or torch.equal(of_a, a):
            return False
        of_b, of_sum = hook(b.clone()), hook(a + 2 * b)
        error = (of_sum - of_a - 2 * of_b).abs().max()
        if not error <= 1e-2 * of_sum.abs().max().clamp_min(1e-30):
            raise DerivativeError(
                "a hook changes the gradient of an activation in a way that is not linear in it (clipping, signs, "
                "normalising), so the hypergradient of that update is not known. Put it into the optimizer's side "
                "(max_grad_norm), or write it as a torch.autograd.Function with a forward derivative."
            )
        return True


def _transposed(hook: Callable, t: Tensor) -> Tensor:
    """The transpose of a linear hook."""
    return torch.func.vjp(hook, torch.zeros_like(plain(t)))[1](t)[0]


# ---- operations of others --------------------------------------------------------------------------------------------
_OF_TORCH = frozenset(("aten", "prim", "prims", "torch", "quantized", "_c10d_functional", "inductor", "c10d"))


def _no_rule(func: Callable) -> None:
    return None


def _custom(func: Callable) -> Rule | None:
    if isinstance(func, OpOverload):
        return None if func.namespace in _OF_TORCH else _keeps_tangents
    if isinstance(func, OpOverloadPacket):
        return None if func._qualified_op_name.split("::")[0] in _OF_TORCH else _keeps_tangents
    return None


def _keeps_tangents(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Any:
    """Refuse an operator that drops what moves."""
    moves = any(
        isinstance(x, Tensor) and x.is_floating_point() and (has_tangent(x) or functorch.maybe_get_level(x) > 0)
        for x in (*args, *kwargs.values())
    )
    out = run.run(func, args, kwargs)
    outputs = out if isinstance(out, (tuple, list)) else (out,)
    if moves and torch.is_grad_enabled():
        for x in outputs:
            if isinstance(x, Tensor) and x.is_floating_point() and not has_tangent(x) and any(map(has_tangent, args)):
                raise DerivativeError(
                    f"the operator {func} has no forward derivative: what moves in its arguments would stand still "
                    "behind it. Write it as a torch.autograd.Function with a jvp, use an implementation in torch's own "
                    "operations, or an estimator with first derivatives only, Penalty() say."
                )
    return out


_ATTRIBUTES = vars(torch._C.TensorBase)

GRAPH: dict[Callable, Rule] = {
    torch._weight_norm: _weight_norm,
    torch._VF._weight_norm: _weight_norm,
    F.scaled_dot_product_attention: _attention,
    F.embedding: _embedding,
    Tensor.register_hook: _register_hook_in_graph,
    Tensor.scatter_reduce: _scatter_reduce,
    Tensor.scatter_reduce_: _scatter_reduce,
    torch.scatter_reduce: _scatter_reduce,
}
"""Rules for reverse over reverse."""

DUAL: dict[Callable, Rule] = {
    **GRAPH,
    F.dropout: _dropout,
    F.alpha_dropout: _dropout,
    torch.dropout: _dropout,
    F.multi_head_attention_forward: _opened,
    F.batch_norm: _batch_norm,
    F.mse_loss: _mse_loss,
    Tensor.masked_scatter: _masked_scatter,
    Tensor.masked_scatter_: _masked_scatter,
    torch.masked_scatter: _masked_scatter,
    _ATTRIBUTES["data"].__get__: _data,
    _ATTRIBUTES["data"].__set__: _set_data,
    Tensor.detach_: _detach_in_place,
    torch.detach_: _detach_in_place,
    _ATTRIBUTES["requires_grad"].__get__: _requires_grad,
    _ATTRIBUTES["is_leaf"].__get__: _is_leaf,
    _ATTRIBUTES["grad_fn"].__get__: _grad_fn,
    _ATTRIBUTES["requires_grad"].__set__: _set_requires_grad,
    Tensor.requires_grad_: _set_requires_grad,
    torch.autograd.grad: _backward,
    Tensor.backward: _backward,
    torch.autograd.backward: _backward,
    Tensor.register_hook: _register_hook,
    Tensor.retain_grad: lambda run, func, args, kwargs: None,
}
"""Rules for forward over reverse, where what moves pulls at an update."""

ALONG: dict[Callable, Rule] = {
    **DUAL,
    F.embedding: lambda run, func, args, kwargs: run.run(func, args, kwargs),
    Tensor.register_hook: lambda run, func, args, kwargs: run.run(func, args, kwargs),
}
"""Rules for forward over reverse, where an update moves with what moves: values do, and gradients are changed alike."""


def _embedding_as_function(run: Evaluation, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    ids, weight, *_ = _embedding_arguments(*args, **kwargs)
    return func(ids, weight)


VALUE: dict[Callable, Rule] = {
    F.embedding: _embedding_as_function,
    Tensor.register_hook: lambda run, func, args, kwargs: _Handle(),
}
"""Rules for first derivatives of the value alone."""


def mark_trained(weight: Tensor) -> None:
    """Make a lent weight say of itself what the live one says: a parameter that requires a gradient."""
    weight.__dict__[TRAINED] = True
    weight.__dict__["_is_param"] = True


def mark_parameter(weight: Tensor) -> None:
    """Likewise for one that is not trained."""
    weight.__dict__["_is_param"] = True
