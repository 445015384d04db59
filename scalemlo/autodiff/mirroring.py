"""Keeps the attributes, modes, buffers and hooks of a module's copy as those of the live module are."""

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from .copying import HOOKS, Rebinder
from .errors import DerivativeError
from .python_state import UNCOUNTED

_SKIPPED = frozenset(
    ("_parameters", "_modules", "_buffers", "_non_persistent_buffers_set", *HOOKS)
    + ("gradient_checkpointing", "_gradient_checkpointing_func", "_compiled_call_impl")  # off on the copy
    + ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
)
_SAME = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type)
_MISSING = object()


class Mirror:
    """Between a live module and its copy; see the module's docstring.

    What an engine puts on the live module when it wraps it (hooks, methods) is not taken over: :meth:`settle` draws
    the line.

    Args:
        live: The live module, before an engine wraps it.
        copied: Its copy.
        rebinder: Finds the counterparts of objects.
    """

    def __init__(self, live: nn.Module, copied: nn.Module, rebinder: Rebinder):
        self._rebinder = rebinder
        self._pairs = [_Pair(a, b) for a, b in zip(live.modules(), copied.modules(), strict=True)]
        self._containers: dict[int, Any] = {}
        self._tensors: dict[int, tuple[Tensor, int, Tensor, int]] = {}

    def settle(self) -> None:
        """What differs now from the copy is the engine's business."""
        for pair in self._pairs:
            pair.settle()

    def update(self) -> None:
        """Take over what the live module holds now; a submodule or a forward put there since is an error."""
        self._containers = {}
        for pair in self._pairs:
            self._update_attributes(pair)
            self._update_buffers(pair)
            for hooks in HOOKS:
                self._update_hooks(pair, hooks)
        self._containers = {}

    def _update_attributes(self, pair: "_Pair") -> None:
        live, copied, before, own = pair.live.__dict__, pair.copied.__dict__, pair.before, pair.own
        for key, value in live.items():
            if key in _SKIPPED or (isinstance(value, _MUTABLE) and not value and _is_empty(copied.get(key))):
                continue
            if value is before.get(key, _MISSING) and not isinstance(value, _MUTABLE):
                wanted = own.get(key, _MISSING)
                if wanted is _MISSING:
                    continue  # of the engine
            elif key == "forward":
                raise DerivativeError(
                    f"the forward of a {type(pair.live).__name__} was replaced after the program was built. Replace it "
                    "before."
                )
            else:
                if key in pair.of_engine:
                    continue
                wanted = self._counterpart(value)
            if copied.get(key, _MISSING) is not wanted:
                copied[key] = wanted
        for key in [key for key in copied if key not in live and not (key in own and key not in before)]:
            del copied[key]
        if pair.live._modules.keys() != pair.copied._modules.keys():
            raise DerivativeError(
                f"submodules of a {type(pair.live).__name__} have changed since the program was built: "
                f"{sorted(set(pair.live._modules) ^ set(pair.copied._modules))[:5]}. Add adapters and layers before."
            )

    def _update_buffers(self, pair: "_Pair") -> None:
        live, copied = pair.live._buffers, pair.copied._buffers
        if not live and not copied:
            return
        is_uncounted = isinstance(pair.live, UNCOUNTED)
        for name, buffer in live.items():
            if is_uncounted and buffer is not None:
                wanted = buffer.detach().clone()
            else:
                wanted = None if buffer is None else self._counterpart(buffer)
            if copied.get(name, _MISSING) is not wanted:
                copied[name] = wanted
        for name in [name for name in copied if name not in live]:
            del copied[name]

    def _update_hooks(self, pair: "_Pair", name: str) -> None:
        live, copied = getattr(pair.live, name), getattr(pair.copied, name)
        if not live and not copied:
            return
        before, own = pair.hooks_before[name], pair.own_hooks[name]
        wanted = {}
        for key, hook in live.items():
            if hook is not before.get(key, _MISSING):
                wanted[key] = self._rebinder.copied(hook)
            elif key in own:
                wanted[key] = own[key]
        if list(copied.items()) != list(wanted.items()):
            copied.clear()
            copied.update(wanted)

    def _counterpart(self, x: Any) -> Any:
        if isinstance(x, _SAME):
            return x
        if isinstance(x, Tensor):
            return self._tensor(x)
        if isinstance(x, _MUTABLE):
            return self._container(x)
        if type(x) is tuple:
            return tuple(self._counterpart(item) for item in x)
        return self._rebinder.copied(x)

    def _container(self, x: Any) -> Any:
        if id(x) in self._containers:
            return self._containers[id(x)]
        try:
            copied = x.copy()
        except AttributeError:
            return self._rebinder.copied(x)
        self._containers[id(x)] = copied
        if isinstance(x, dict):
            copied.update((key, self._counterpart(item)) for key, item in x.items())
        elif isinstance(x, set):
            copied.clear()
            copied.update(self._counterpart(item) for item in x)
        else:
            copied.clear()
            copied.extend(self._counterpart(item) for item in x)
        return copied

    def _tensor(self, x: Tensor) -> Tensor:
        """A tensor of its own with the same values; the one it had, while neither has changed."""
        if isinstance(x, nn.Parameter):
            return self._rebinder.copied(x)
        kept = self._tensors.get(id(x))
        if kept is not None and kept[0] is x and kept[1] == x._version and kept[2]._version == kept[3]:
            return kept[2]
        copied = x.detach().clone()
        self._tensors[id(x)] = x, x._version, copied, copied._version
        return copied


_MUTABLE = (list, dict, set, deque)


def _is_empty(x: Any) -> bool:
    return isinstance(x, _MUTABLE) and not x


class _Pair:
    """A module and its copy, and what they held when the copy was made."""

    def __init__(self, live: nn.Module, copied: nn.Module):
        self.live, self.copied = live, copied
        self.before, self.own = dict(live.__dict__), dict(copied.__dict__)
        self.hooks_before = {name: dict(getattr(live, name)) for name in HOOKS}
        self.own_hooks = {name: dict(getattr(copied, name)) for name in HOOKS}
        self.of_engine: set[str] = set()

    def settle(self) -> None:
        """Take what the live module holds now for what belongs to what the copy held at first."""
        now = self.live.__dict__
        for key in now:
            if key in _SKIPPED or now.get(key, _MISSING) is self.before.get(key, _MISSING):
                continue
            self.before[key] = now[key]
            if key not in self.own:
                self.of_engine.add(key)
        self.hooks_before = {name: dict(getattr(self.live, name)) for name in HOOKS}
