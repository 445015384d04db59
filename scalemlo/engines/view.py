"""What a loss sees of a module."""

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..autodiff.copying import is_of_user
from .base import Engine


class ModuleView:
    """What a loss sees of a module: call it, or any of its methods, and the engine runs it.

    Calls go through the training framework in ordinary passes and through the skeleton where a derivative is taken,
    so the same loss serves both; properties and functions kept in attributes are calls too. Other attributes
    (``config``, or what a forward has left behind) are those of the module that runs, and are set on it. Weights and
    submodules are not handed out, nor containers of them: used past the engine they would be constants of every
    derivative.
    """

    _engine: Engine

    def __init__(self, engine: Engine):
        object.__setattr__(self, "_engine", engine)
        object.__setattr__(self, "_plain_properties", set())

    def __call__(self, *args, **kwargs):
        """Run the module's forward."""
        return self._engine.call("forward", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        engine, module = self._engine, self._engine.visible
        if name in _HANDS_OUT_WEIGHTS:
            raise self._refusal(name)
        if _is_property_of_user(type(module), name) and name not in self._plain_properties:
            value = engine.call("__getattribute__", (name,), {})
            self._check(name, value)
            if not any(isinstance(x, Tensor) for x in _items(value)):
                self._plain_properties.add(name)
            return value
        value = getattr(module, name)
        if _is_run_by_engine(module, name, value):
            return functools.partial(_call, engine, name)
        self._check(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._engine.visible, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._call_operator("__getitem__", key)

    def __len__(self) -> int:
        return len(self._engine.visible)  # ty: ignore[invalid-argument-type]  # as the module says

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        return self._call_operator("__iter__")

    def __contains__(self, key: Any) -> bool:
        return self._call_operator("__contains__", key)

    def __repr__(self) -> str:
        return f"ModuleView({self._engine.name})"

    def __dir__(self) -> list[str]:
        return sorted({*dir(self._engine.visible), *vars(type(self))})

    def _call_operator(self, name: str, *args: Any) -> Any:
        module = self._engine.visible
        defined = next((kind for kind in type(module).__mro__ if name in vars(kind)), None)
        if defined is None:
            raise TypeError(f"{type(module).__name__} of level '{self._engine.name}' has no {name}.")
        if not is_of_user(defined):
            raise self._refusal(name)
        value = self._engine.call(name, args, {})
        self._check(name, value)
        return value

    def _check(self, name: str, value: Any) -> None:
        """That an attribute gives no weights away."""
        weights = {id(p) for p in self._engine.module.parameters()}
        for x in _items(value):
            if isinstance(x, (nn.Module, nn.Parameter)) or id(x) in weights:
                raise self._refusal(name)

    def _refusal(self, name: str) -> ValueError:
        kind = type(self._engine.module).__name__
        return ValueError(
            f"level '{self._engine.name}': a loss uses {name!r} of {kind} directly, which is not differentiated "
            "through when a hypergradient is taken. Put what it computes with it into a method of the module and "
            "call that."
        )


def _call(engine: Engine, name: str, *args: Any, **kwargs: Any) -> Any:
    return engine.call(name, args, kwargs)


def _is_run_by_engine(module: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute is code of the module: a method that torch does not define, or a function it keeps."""
    if getattr(value, "__self__", None) is module:
        return not hasattr(nn.Module, name)
    return isinstance(value, _FUNCTIONS) and name in vars(module)


_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


@functools.cache
def _is_property_of_user(kind: type, name: str) -> bool:
    for base in kind.__mro__:
        if name in vars(base):
            return isinstance(vars(base)[name], (property, functools.cached_property)) and is_of_user(base)
    return False


def _items(x: Any, depth: int = 0) -> Iterator[Any]:
    """An object, or all that a container holds."""
    if isinstance(x, (list, tuple, set, frozenset)) and depth < 4:
        for item in x:
            yield from _items(item, depth + 1)
    elif isinstance(x, dict) and depth < 4:
        for item in x.values():
            yield from _items(item, depth + 1)
    else:
        yield x


_HANDS_OUT_WEIGHTS = frozenset(
    ("parameters", "named_parameters", "get_parameter", "modules", "named_modules", "children", "named_children")
    + ("get_submodule", "state_dict")
)
