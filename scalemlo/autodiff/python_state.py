"""What code can change besides the tensors that it returns, put back so that a pass can run again as it ran before.

A forward pass may leave things behind: running statistics, an annealed temperature, a counter, a captured feature, a
list that was appended to, a module switched between training and evaluation, hooks put on for one call. Derivatives run
a pass again, in the backward of a rematerialised block or steps later through an unrolled trajectory, and must run it
from the state that it had. :class:`PythonState` holds that: attributes of modules and of a user's own objects, the
containers and closures reachable from them, buffers, and the states of Python's and numpy's random generators.
"""

import dis
import functools
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.weak import WeakTensorKeyDictionary

from .copying import is_object_of_user, is_of_user

BUFFER_BYTES = 1 << 26
"""Buffers up to this size are copied when they are first met, and small ones always."""

SMALL_BYTES = {"buffer": 1 << 18, "attribute": 1 << 12}
"""Tensors up to this size are copied with every state; larger ones once they were seen to change in place."""

MAX_ITEMS = 512
"""Longer containers are data, not state."""

_SKIPPED = frozenset(
    ("_parameters", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
    + ("_load_state_dict_post_hooks", "_non_persistent_buffers_set", "_is_full_backward_hook")
)
"""Attributes of modules that no pass changes, or that belong to engines."""

_changing: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Large tensors by version when last looked at; -1 once seen to change in place."""


class PythonState:
    """A state of some modules and objects: what it takes to come back to it.

    Containers are remembered with what they held, tensors with their values where those may change in place. Making one
    takes microseconds per module.
    """

    def __init__(self) -> None:
        self._containers: list[tuple[Any, Any]] = []  # each with a copy of what it held
        self._attributes: list[tuple[Any, dict[str, Any], frozenset[str]]] = []  # likewise, and what else is there
        self._cells: list[tuple[types.CellType, Any]] = []
        self._globals: list[tuple[dict, str, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor | None]] = []  # each with its version, and its value
        self._seen: set[int] = set()
        self._keep: list[Any] = []  # what was seen stays alive, so that no id is used again

    @classmethod
    def of(
        cls,
        modules: Iterable[nn.Module],
        functions: Iterable[Callable] = (),
        attributes: Iterable[tuple[Any, Collection[str]]] = (),
        objects: Iterable[Any] = (),
    ) -> "PythonState":
        """Remember a state.

        Args:
            modules: With all inside them.
            functions: Their closures and the global containers that they name.
            attributes: Objects, and which of their attributes are no state.
            objects: Objects of any class, caches say; what they hold and what those hold.

        Returns:
            The state.
        """
        state = cls()
        with DisableTorchFunction(), temporarily_clear_interpreter_stack():
            for module in modules:
                state._visit(module, 0)
            for function in functions:
                state._visit(function, 0)
            for x, skipped in attributes:
                held = {key: value for key, value in vars(x).items() if key not in skipped}
                state._attributes.append((x, held, frozenset(skipped)))
                state._visit_all(held.values(), 0)
            for x in objects:
                state._visit_object(x, 0)
        return state

    def restore(self) -> None:
        """Come back to it: containers hold what they held, tensors have the values they had."""
        for container, held in self._containers:
            _refill(container, held)
        for x, held, skipped in self._attributes:
            others = {key: value for key, value in vars(x).items() if key in skipped}
            _refill(vars(x), {**others, **held})
        for cell, content in self._cells:
            if _content(cell) is not content:
                if content is _MISSING:
                    del cell.cell_contents
                else:
                    cell.cell_contents = content
        for scope, name, value in self._globals:
            if scope.get(name, _MISSING) is not value:
                scope[name] = value
        with DisableTorchFunction(), temporarily_clear_interpreter_stack(), torch.no_grad():
            for i, (tensor, version, value) in enumerate(self._tensors):
                if tensor._version != version and value is not None:
                    tensor.detach().copy_(value)
                    self._tensors[i] = tensor, _UNKNOWN if version == _UNKNOWN else tensor._version, value

    # ---- looking around ------------------------------------------------------------------------------------------
    def _visit(self, x: Any, depth: int) -> None:
        if isinstance(x, _NO_STATE) or id(x) in self._seen or depth > 8:
            return
        self._seen.add(id(x))
        self._keep.append(x)
        if isinstance(x, Tensor):
            self._visit_tensor(x, "attribute")
        elif isinstance(x, nn.Module):
            self._visit_module(x, depth)
        elif isinstance(x, dict):
            if len(x) <= MAX_ITEMS:
                self._containers.append((x, dict(x)))
                self._visit_all(x.values(), depth)
        elif isinstance(x, (list, deque, set)):
            if len(x) <= MAX_ITEMS:
                self._containers.append((x, list(x)))
                self._visit_all(x, depth)
        elif isinstance(x, (tuple, frozenset)):
            if len(x) <= MAX_ITEMS:
                self._visit_all(x, depth)
        elif isinstance(x, types.FunctionType):
            self._visit_function(x, depth)
        elif isinstance(x, types.MethodType):
            self._visit(x.__func__, depth + 1)
            self._visit(x.__self__, depth + 1)
        elif isinstance(x, functools.partial):
            self._visit_all((x.func, *x.args, *x.keywords.values()), depth)
        elif is_object_of_user(x):
            self._containers.append((vars(x), dict(vars(x))))
            self._visit_all(list(vars(x).values()), depth)

    def _visit_object(self, x: Any, depth: int) -> None:
        if isinstance(x, _NO_STATE) or isinstance(x, (Tensor, nn.Module)) or id(x) in self._seen or depth > 5:
            return
        if isinstance(x, (list, tuple, dict)):
            items = list(x.values() if isinstance(x, dict) else x)
            if len(items) <= MAX_ITEMS:
                self._seen.add(id(x))
                self._keep.append(x)
                if not isinstance(x, tuple):
                    self._containers.append((x, x.copy()))
                for item in items:
                    self._visit_object(item, depth + 1)
        elif hasattr(x, "__dict__") and not callable(x):
            self._seen.add(id(x))
            self._keep.append(x)
            self._containers.append((vars(x), dict(vars(x))))
            for item in list(vars(x).values()):
                self._visit_object(item, depth + 1)
        else:
            self._visit(x, depth)

    def _visit_all(self, items: Iterable[Any], depth: int) -> None:
        for item in items:
            if type(item) not in _NO_STATE_SET:
                self._visit(item, depth + 1)

    def _visit_module(self, module: nn.Module, depth: int) -> None:
        attributes = module.__dict__
        self._containers.append((attributes, dict(attributes)))
        for key, value in attributes.items():
            if key in _SKIPPED or type(value) in _NO_STATE_SET:
                continue
            if key == "_modules":
                self._containers.append((value, dict(value)))
                for child in value.values():
                    self._visit(child, 1)
            elif key == "_buffers":
                if value:
                    self._containers.append((value, dict(value)))
                    for buffer in value.values():
                        if buffer is not None and id(buffer) not in self._seen:
                            self._seen.add(id(buffer))
                            if isinstance(module, UNCOUNTED):
                                self._tensors.append((buffer, _UNKNOWN, buffer.detach().clone()))
                            else:
                                self._visit_tensor(buffer, "buffer")
            elif isinstance(value, dict) and not value:  # as most dictionaries of hooks
                self._containers.append((value, {}))
            else:
                self._visit(value, depth + 1)

    def _visit_function(self, function: types.FunctionType, depth: int) -> None:
        for cell in function.__closure__ or ():
            content = _content(cell)
            self._cells.append((cell, content))
            self._visit(content, depth + 1)
        if not is_of_user(function):
            return
        scope = function.__globals__
        for name in _stored_globals(function.__code__):
            self._globals.append((scope, name, scope.get(name, _MISSING)))
        for name in function.__code__.co_names:
            value = scope.get(name)
            if isinstance(value, (list, dict, set, deque)):
                self._visit(value, depth + 1)

    def _visit_tensor(self, x: Tensor, kind: str) -> None:
        if functorch.is_functorch_wrapped_tensor(x) or x.requires_grad:
            return  # an activation, which a pass has left
        version, size = x._version, x.numel() * x.element_size()
        copied = size <= SMALL_BYTES[kind]
        if not copied:
            last = _changing.get(x)
            is_first = last is None and kind == "buffer" and size <= BUFFER_BYTES
            copied = is_first or (last is not None and last != version)  # -1: changed once, may change again
            _changing[x] = -1 if last is not None and last != version else version
        self._tensors.append((x, version, x.detach().clone() if copied else None))


UNCOUNTED = _NormBase
"""Modules whose forward writes into buffers without a trace: batch norm's kernels count no versions."""

_UNKNOWN = -1


class _Missing:
    pass


_MISSING = _Missing()
_NO_STATE = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, type, types.ModuleType)
_NO_STATE_SET = frozenset(_NO_STATE)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _refill(container: Any, held: Any) -> None:
    """Make a container hold what it held, writing only where it differs."""
    if isinstance(container, OrderedDict):  # of hooks, say: their order counts
        if list(container) != list(held) or any(container[key] is not value for key, value in held.items()):
            container.clear()
            container.update(held)
    elif isinstance(container, dict):
        for key in [key for key in container if key not in held]:
            del container[key]
        for key, value in held.items():
            if container.get(key, _MISSING) is not value:
                container[key] = value
    elif isinstance(container, set):
        if container != set(held):
            container.clear()
            container.update(held)
    elif len(container) != len(held) or any(a is not b for a, b in zip(container, held, strict=True)):
        container.clear()
        container.extend(held)


@functools.cache
def _stored_globals(code: types.CodeType) -> frozenset[str]:
    """Global variables that a function assigns to."""
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL")
