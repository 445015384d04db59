"""A copy of a module's structure that refers to the copy wherever the module refers to itself.

``copy.deepcopy`` follows attributes, but it takes functions, weak references and what they refer to as they are: an
activation ``lambda x: x * self.scale``, a hook that closes over an adapter, a ``weakref`` to the parent would go on
reading the live weights, and every derivative by them would be silently zero. Here such references are found by walking
attributes, closures, defaults, partials, bound methods, hooks and weak references, and bound anew to the copy.

What does not lead back to the module is shared rather than copied where it is an object of the user's own class (a
recorder that hooks write into, say): a loss that reads it must see what the copy wrote.
"""

import copy
import functools
import types
import weakref
from abc import ABC
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, Protocol

import torch
from torch import Tensor, nn

LIBRARIES = frozenset(
    ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "deepspeed", "trl", "timm")
    + ("numpy", "pandas", "scipy", "sklearn", "pyarrow", "scalemlo", "bitsandbytes", "builtins", "collections")
    + ("functools", "types", "typing", "weakref", "threading", "logging", "enum", "abc", "torchvision", "omegaconf")
)
"""Packages whose objects are parts of the machinery: copied with the module, never taken for a user's own state."""

_MAX_DEPTH = 12


def is_of_user(x: Any) -> bool:
    """Whether a function or a class was written outside the libraries that models are built with."""
    return (getattr(x, "__module__", None) or "").split(".")[0] not in LIBRARIES


def is_object_of_user(x: Any) -> bool:
    """Whether an object with attributes is of a user's own class, not derived from one of a library."""
    if isinstance(x, type) or not hasattr(x, "__dict__"):
        return False
    return all(is_of_user(base) for base in type(x).__mro__ if base not in _NEUTRAL)


_NEUTRAL = (object, Generic, Protocol, ABC)


def copy_structure(module: nn.Module) -> tuple[nn.Module, "Rebinder"]:
    """Copy a module with every parameter on the meta device; no weight is copied, buffers are shared.

    Args:
        module: The live module.

    Returns:
        The copy, and what binds references to the live module to it.

    Raises:
        ValueError: If the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in module.buffers():
        memo[id(b)] = b
    tree = _Tree(module)
    for holder in module.modules():
        for value in _attributes(holder):
            if isinstance(value, Tensor) and not value.is_leaf:  # old-style weight_norm keeps its weight so
                memo.setdefault(id(value), value.detach())
            for shared in _objects_of_user(value):
                if not tree.is_reached_from(shared):
                    memo[id(shared)] = shared
    try:
        structure = copy.deepcopy(module, memo)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} cannot be deep-copied, which exact derivatives need ({error}). Keep locks, open "
            "files and process groups out of the module's attributes."
        ) from error
    rebinder = Rebinder(tree, memo)
    for copied in structure.modules():
        rebinder.rebind_attributes(copied)
    _refuse_global_references(module, tree)
    return structure, rebinder


class _Tree:
    """The modules, parameters and buffers of a live module."""

    def __init__(self, module: nn.Module):
        self.ids = {id(x) for x in (*module.modules(), *module.parameters(), *module.buffers())}
        self._keep = module  # ids stay taken
        self.copies: set[int] = set()
        """Modules of the copy: what they hold is bound by itself."""

    def is_reached_from(self, x: Any) -> bool:
        """Whether some path of references leads from an object to the module or a part of it."""
        return self._search(x, set(), 0)

    def _search(self, x: Any, seen: set[int], depth: int) -> bool:
        if id(x) in self.ids:
            return True
        if id(x) in seen or id(x) in self.copies or depth > _MAX_DEPTH:
            return False
        seen.add(id(x))
        return any(self._search(part, seen, depth + 1) for part in _parts(x))


class Rebinder:
    """Makes objects that refer to a live module refer to its copy.

    Args:
        tree: The live module.
        memo: Copies by the ``id`` of their originals.
    """

    def __init__(self, tree: _Tree, memo: dict[int, Any]):
        self._tree, self._memo = tree, memo
        tree.copies.update(id(x) for x in memo.values() if isinstance(x, nn.Module))

    def copied(self, x: Any) -> Any:
        """The counterpart of an object: itself where it does not lead to the live module."""
        if id(x) in self._memo:
            return self._memo[id(x)]
        if isinstance(x, _PLAIN) or not self._tree.is_reached_from(x):
            return x
        rebound = self._rebound(x)
        self._memo[id(x)] = rebound
        self._memo.setdefault(id(self._memo), []).append(x)  # as deepcopy does: ids stay taken
        return rebound

    def rebind_attributes(self, module: nn.Module) -> None:
        """Bind what the attributes and hooks of a copied module hold, in place."""
        self._rebind_dict(module.__dict__)
        for hooks in HOOKS:
            self._rebind_dict(getattr(module, hooks, {}))

    def _rebind_dict(self, held: dict) -> None:
        for key, value in list(held.items()):
            if isinstance(value, (types.FunctionType, types.MethodType, functools.partial, weakref.ReferenceType)):
                held[key] = self.copied(value)
            elif isinstance(value, (list, tuple, dict, set, frozenset, deque)) and key not in _OF_TORCH:
                if self._tree.is_reached_from(value):
                    held[key] = self._rebound(value)
            elif is_object_of_user(value):
                if self._tree.is_reached_from(value):  # copied by deepcopy, but for its functions
                    self._rebind_dict(value.__dict__)

    def _rebound(self, x: Any) -> Any:
        if isinstance(x, types.FunctionType):
            return self._rebound_function(x)
        if isinstance(x, types.MethodType):
            return types.MethodType(self.copied(x.__func__), self.copied(x.__self__))
        if isinstance(x, functools.partial):
            keywords = {key: self.copied(value) for key, value in x.keywords.items()}
            return type(x)(self.copied(x.func), *(self.copied(value) for value in x.args), **keywords)
        if isinstance(x, weakref.ReferenceType):
            return weakref.ref(self.copied(x()))
        if isinstance(x, tuple):
            parts = [self.copied(value) for value in x]
            return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
        if isinstance(x, dict):
            copied = copy.copy(x)
            copied.update({key: self.copied(value) for key, value in x.items()})
            return copied
        if isinstance(x, (list, deque)):
            copied = copy.copy(x)
            copied.clear()
            copied.extend(self.copied(value) for value in x)
            return copied
        if isinstance(x, (set, frozenset)):
            return type(x)(self.copied(value) for value in x)
        copied = copy.deepcopy(x, self._memo)
        if hasattr(copied, "__dict__") and copied is not x:
            self._rebind_dict(copied.__dict__)
        return copied

    def _rebound_function(self, function: types.FunctionType) -> types.FunctionType:
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        named = _global_references(function, self._tree)
        scope = _Overlay(function.__globals__, {k: self.copied(v) for k, v in named.items()}) if named else None
        rebound = types.FunctionType(
            function.__code__, scope if scope is not None else function.__globals__, function.__name__, None, cells
        )
        self._memo[id(function)] = rebound  # before its parts, which may refer to it
        rebound.__defaults__ = self.copied(function.__defaults__)
        rebound.__kwdefaults__ = self.copied(function.__kwdefaults__)
        rebound.__dict__.update({key: self.copied(value) for key, value in function.__dict__.items()})
        rebound.__qualname__, rebound.__module__ = function.__qualname__, function.__module__
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            try:
                cell.cell_contents = self.copied(original.cell_contents)
            except ValueError:  # an empty cell
                continue
        return rebound


class _Overlay(dict):
    """Globals of a function in which some names stand for something else; all others are looked up where they were."""

    def __init__(self, base: dict[str, Any], named: dict[str, Any]):
        super().__init__(named)
        self._base = base

    def __missing__(self, key: str) -> Any:
        return self._base[key]


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Dictionaries of a module that hold hooks of its passes."""

_OF_TORCH = frozenset(
    (*HOOKS, "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook")
    + ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    + ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
)

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, type)


def _attributes(module: nn.Module) -> Iterator[Any]:
    """What a module holds besides parameters, buffers and submodules: attributes and hooks."""
    for key, value in module.__dict__.items():
        if key not in _OF_TORCH:
            yield value
    for hooks in HOOKS:
        yield from getattr(module, hooks, {}).values()


def _objects_of_user(value: Any, depth: int = 0) -> Iterator[Any]:
    """Objects of users' own classes in an attribute or a hook."""
    if isinstance(value, types.MethodType):
        value = value.__self__
    if isinstance(value, (list, tuple, deque)) and depth < 3:
        for item in list(value)[:100]:
            yield from _objects_of_user(item, depth + 1)
    elif isinstance(value, dict) and depth < 3:
        for item in list(value.values())[:100]:
            yield from _objects_of_user(item, depth + 1)
    elif is_object_of_user(value):
        yield value


def _parts(x: Any) -> Iterator[Any]:
    """What an object refers to, as far as references to a module may hide there."""
    if isinstance(x, (*_PLAIN, Tensor, types.ModuleType)):
        return
    if isinstance(x, types.FunctionType):
        for cell in x.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:
                continue
        yield from x.__defaults__ or ()
        yield from (x.__kwdefaults__ or {}).values()
        yield from x.__dict__.values()
        yield from _globals_read_by(x).values()
    elif isinstance(x, types.MethodType):
        yield x.__self__
        yield x.__func__
    elif isinstance(x, functools.partial):
        yield x.func
        yield from x.args
        yield from x.keywords.values()
    elif isinstance(x, weakref.ReferenceType):
        yield x()
    elif isinstance(x, dict):
        yield from list(x.values())
    elif isinstance(x, (list, tuple, set, frozenset, deque)):
        yield from list(x)
    elif isinstance(x, nn.Module):  # one outside the tree, kept where torch does not register it
        yield from _attributes(x)
        yield from x._modules.values()
        yield from x._parameters.values()
        yield from x._buffers.values()
    elif is_object_of_user(x):
        yield from list(vars(x).values())


def _globals_read_by(function: types.FunctionType) -> dict[str, Any]:
    """Global variables that a user's function names and that may lead to a module: modules, weights, functions."""
    if not is_of_user(function):
        return {}
    found = {}
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, (nn.Module, Tensor)) or (isinstance(value, types.FunctionType) and value is not function):
            found[name] = value
    return found


def _names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _global_references(function: types.FunctionType, tree: _Tree) -> dict[str, Any]:
    return {k: v for k, v in _globals_read_by(function).items() if tree.is_reached_from(v)}


def _refuse_global_references(module: nn.Module, tree: _Tree) -> None:
    """Methods belong to their class and cannot be bound anew: one that names the live module globally is an error."""
    for kind in {type(m) for m in module.modules()}:
        for base in kind.__mro__:
            if base is nn.Module or not is_of_user(base):
                continue
            for name, method in vars(base).items():
                function = getattr(method, "fget", None) or getattr(method, "__func__", method)
                if not isinstance(function, types.FunctionType):
                    continue
                held = {k for k, v in _globals_read_by(function).items() if id(v) in tree.ids}
                if held:
                    raise ValueError(
                        f"{base.__name__}.{name} uses the global variable {sorted(held)[0]!r}, which is a part of the "
                        "module itself: exact derivatives run a copy of the module, whose weights that would not be. "
                        "Reach it through self."
                    )
