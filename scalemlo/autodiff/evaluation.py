"""How the operations of a loss run while a derivative of it is taken: as the update that follows would see them.

A training step computes a value and its gradient. A hypergradient differentiates that step, by dual numbers around
``torch.func.grad`` or by a second backward pass, and there torch's own rules leave gaps: forward mode looks through
``no_grad`` and ``x.data``, knows no gradient hooks and no masked rows of embeddings, and code that asks a weight
whether it ``requires_grad`` gets another answer. :class:`Evaluation` watches every operation and closes them; what it
cannot close it refuses by name. It also knows which tensor stands for which where a block is rematerialised
(:mod:`.remat`): tensors that leave or enter a block through attributes, hooks, lists or closures.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodWrapperType
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .errors import DerivativeError
from .tensors import (
    DEPENDS,
    TRAINED,
    as_constant,
    described,
    has_traced,
    inside_function,
    is_in_place,
    is_traced,
    memory,
    plain,
    plain_in,
)

Form = Literal["dual", "along", "graph", "plain", "value"]
"""How a pass is differentiated.

``dual``: forward over reverse, for what pulls at an update (``d<g, u>/dq``). ``along``: the same, for how an update
moves with what moves. ``graph``: reverse over reverse, in a graph that is kept. ``plain``: first derivatives as the
training step has them, or values. ``value``: first derivatives of the value, whatever the step makes of gradients.
"""

Rule = Callable[["Evaluation", Callable, tuple, dict], Any]
"""``rule(evaluation, operation, args, kwargs)`` runs an operation in the place of torch."""


def current_evaluation() -> "Evaluation | None":
    """The evaluation that watches the operations of this thread."""
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, Evaluation):
            return mode
    return None


class Captured(Exception):
    """A rematerialised function uses tensors that are none of its arguments."""

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self.tensors = tensors


class WritesItsInput(Exception):
    """A rematerialised function writes into one of its arguments, identified by its memory."""

    def __init__(self, address: int):
        super().__init__()
        self.address = address


class Scope:
    """What tensors stand for, within one evaluation or within one run of a rematerialised function."""

    def __init__(self) -> None:
        self._replaced: dict[int, tuple[weakref.ref, Tensor]] = {}  # by id, for as long as the object lives

    def replace(self, x: Tensor, meaning: Tensor) -> None:
        """From here on an object stands for another tensor.

        Args:
            x: The object that code holds.
            meaning: What operations on it are to compute with.
        """
        if x is not meaning:
            scope: weakref.ref[Scope] = weakref.ref(self)
            self._replaced[id(x)] = weakref.ref(x, partial(_forget, scope, id(x))), meaning

    def resolve(self, x: Tensor) -> Tensor:
        """What an object stands for."""
        found = self._replaced.get(id(x))
        while found is not None:
            x = found[1]
            found = self._replaced.get(id(x))
        return x

    def release(self) -> None:
        """Forget everything: what tensors stand for may belong to a graph that leads back here."""
        self._replaced.clear()

    @property
    def is_empty(self) -> bool:
        """Whether every object stands for itself."""
        return not self._replaced

    def started(self, func: Callable) -> None:
        """An operation begins."""

    def look_at(self, x: Tensor) -> None:
        """An operation reads a tensor."""

    def created(self, out: Any, depends: bool) -> None:
        """An operation has ended."""


def _forget(scope: "weakref.ref[Scope]", key: int, _: object) -> None:
    held = scope()
    if held is not None:
        held._replaced.pop(key, None)


class Evaluation(TorchFunctionMode):
    """See the module's docstring.

    Args:
        form: How second derivatives are had.
        rules: What to do instead of an operation, by the operation.
        fallback: Asked for a rule where ``rules`` has none.
    """

    def __init__(
        self,
        form: Form,
        rules: Mapping[Callable, Rule],
        fallback: Callable[[Callable], Rule | None] = lambda func: None,
    ):
        super().__init__()
        self.form: Form = form
        self._rules, self._fallback = rules, fallback
        self._stops_tangents = form in ("dual", "along")
        self.scopes: list[Scope] = [Scope()]
        self.buffers: Mapping[int, str] = {}
        """Names of the buffers of the modules that run, by memory."""
        self.carried: dict[int, str] = {}
        """Buffers into which this pass has written values that depend on what moves, under ``no_grad``."""
        self.reads_carried: set[str] = set()
        """Those of them that were computed with afterwards."""
        self.changes_gradients = False
        """Whether a hook on an activation has changed gradients."""
        self.weights: Counter[int] = Counter()
        """Memory of the weights that are lent now, which a pass must not write into."""

    @contextmanager
    def active(self) -> Iterator["Evaluation"]:
        """Run operations under it in this thread; entered again inside itself it does nothing.

        Yields:
            Itself.
        """
        if current_evaluation() is self:
            yield self
            return
        with self:
            yield self

    @contextmanager
    def within(self, scope: Scope) -> Iterator[None]:
        """Run operations in a scope of their own, inside the current one.

        Args:
            scope: The scope.

        Yields:
            Nothing.
        """
        self.scopes.append(scope)
        try:
            yield
        finally:
            self.scopes.pop()

    @contextmanager
    def at(self, *scopes: Scope) -> Iterator[None]:
        """Run operations in other scopes than the current ones; in none of them, those of the machinery itself.

        Args:
            *scopes: Outermost first.

        Yields:
            Nothing.
        """
        before, self.scopes = self.scopes, list(scopes) or [Scope()]
        try:
            yield
        finally:
            self.scopes = before

    def release(self) -> None:
        """Forget what tensors stand for, when the derivative has been taken."""
        for scope in self.scopes:
            scope.release()

    def replace(self, x: Tensor, meaning: Tensor) -> None:
        """See :meth:`Scope.replace`, in the innermost scope."""
        self.scopes[-1].replace(x, meaning)

    def resolve(self, x: Any) -> Any:
        """What a tensor stands for here; containers of tensors likewise, anything else as it is."""
        if isinstance(x, Tensor):
            for scope in self.scopes:
                x = scope.resolve(x)
            return x
        if isinstance(x, (list, tuple)):
            found = [self.resolve(item) for item in x]
            if all(a is b for a, b in zip(found, x, strict=True)):
                return x
            return type(x)(*found) if hasattr(x, "_fields") else type(x)(found)
        if type(x) is dict:
            found = {key: self.resolve(item) for key, item in x.items()}
            return x if all(found[key] is x[key] for key in x) else found
        return x

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run one operation."""
        kwargs = kwargs or {}
        if func is custom_function_call or inside_function():
            return func(*args, **kwargs)  # it has its own derivatives
        scope = self.scopes[-1]
        if len(self.scopes) > 1 or not scope.is_empty:
            args, kwargs = self.resolve(args), self.resolve(kwargs)
            scope.started(func)
            depends = self._look(scope, args) | self._look(scope, kwargs.values())
        else:
            depends = False
        writes = bool(args) and is_in_place(func, args, kwargs)
        if writes:
            self._check_write(func, kwargs.get("out", args[0]))
        if self._stops_tangents:
            self._watch_buffers(args, kwargs, writes)
        rule = self._rules.get(func)
        if rule is None:
            rule = self._fallback(func)
        if rule is not None:
            out = rule(self, func, args, kwargs)
        elif writes and self._stops_tangents and functorch.maybe_current_level() is not None:
            out = self._write(func, args, kwargs)
        elif self._stops_tangents and not torch.is_grad_enabled():
            out = as_constant(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        scope.created(out, depends and torch.is_grad_enabled())
        return out

    def run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """An operation as torch runs it, or as a constant where gradients are off; for rules that change arguments."""
        if self._stops_tangents and not torch.is_grad_enabled():
            return as_constant(func, args, kwargs)
        return func(*args, **kwargs)

    def _watch_buffers(self, args: tuple, kwargs: dict, writes: bool) -> None:
        """Note values that depend on what moves, go through a buffer without a gradient, and come back."""
        if writes and not torch.is_grad_enabled():
            target = kwargs.get("out", args[0])
            address = memory(target) if isinstance(target, Tensor) else 0
            if address in self.buffers and has_traced(args):
                self.carried[address] = self.buffers[address]
        elif self.carried and torch.is_grad_enabled():
            for x in args:
                if isinstance(x, Tensor) and memory(x) in self.carried:
                    self.reads_carried.add(self.carried[memory(x)])

    def _write(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """An operation in place inside torch.func, which refuses to change tensors from outside: buffers, data."""
        target = kwargs.get("out", args[0])
        if not isinstance(target, Tensor) or functorch.is_functorch_wrapped_tensor(target):
            return self.run(func, args, kwargs)
        sources = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x is not target]
        if not torch.is_grad_enabled() or not any(map(is_traced, sources)):
            with temporarily_clear_interpreter_stack(), torch.no_grad():
                func(*plain_in(args), **plain_in(kwargs))
            return target
        copied = target.clone()  # belongs to the transform
        self.replace(target, copied)
        func(
            *(copied if x is target else x for x in args),
            **{k: copied if x is target else x for k, x in kwargs.items()},
        )
        return target

    def _look(self, scope: Scope, items: Any) -> bool:
        depends = False
        for x in items:
            if isinstance(x, Tensor):
                scope.look_at(x)
                marks = x.__dict__
                depends = depends or DEPENDS in marks or TRAINED in marks
            elif isinstance(x, (list, tuple)):
                depends = self._look(scope, x) or depends
        return depends

    def _check_write(self, func: Callable, target: Any) -> None:
        if not isinstance(target, Tensor):
            return
        address, scope = memory(target), self.scopes[-1]
        if self.weights[address] > 0:
            raise DerivativeError(
                f"the forward pass writes into a weight of {list(target.shape)} entries ({described(func)}): the "
                "training step then moves it as no derivative follows. Compute with a changed copy, or change "
                "the weights in a callback between steps."
            )
        if isinstance(scope, Run) and address in scope.inputs:
            raise WritesItsInput(address)


class Marking(Scope):
    """A scope in which tensors know whether they depend on weights that are trained, though no derivative is taken.

    Args:
        outside: A run that this is a part of, but whose operations do not count there.
    """

    def __init__(self, outside: Scope | None = None):
        super().__init__()
        self._outside = outside

    def look_at(self, x: Tensor) -> None:
        """See :meth:`Scope.look_at`."""
        if self._outside is not None:
            self._outside.look_at(x)

    def created(self, out: Any, depends: bool) -> None:
        """See :meth:`Scope.created`."""
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if depends and isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
                x.__dict__[DEPENDS] = True


class Run(Scope):
    """One run of a rematerialised function: what it makes, and what it takes besides its arguments.

    Args:
        level: How many transforms of ``torch.func`` are active inside; tensors of more are from outside.
        operations: Those of the first run, if this is a later one: it must take the same.
        wanted: Numbers of floating tensors to keep, in the order in which they are made.
    """

    def __init__(self, level: int, operations: Sequence[Callable] | None = None, wanted: Sequence[int] = ()):
        super().__init__()
        self.level = level
        self.operations: list[Callable] = []
        self.captured: list[Tensor] = []
        self.kept: dict[int, Tensor] = dict.fromkeys(wanted)  # ty: ignore[invalid-assignment]  # filled as they are made
        self.inputs: set[int] = set()
        """Memory of the arguments, which belongs to others."""
        self._made: list[weakref.ref] = []
        self._expected = operations
        self._is_first = operations is None
        self._count = 0

    def resolve(self, x: Tensor) -> Tensor:
        """See :meth:`Scope.resolve`; integers and masks from outside have no derivative, and are taken as they are."""
        x = super().resolve(x)
        if functorch.maybe_get_level(x) > self.level and not (x.is_floating_point() or x.is_complex()):
            self.replace(x, plain(x))
            return super().resolve(x)
        return x

    def started(self, func: Callable) -> None:
        """See :meth:`Scope.started`."""
        if type(func) is MethodWrapperType:  # an attribute is read
            return
        if self._expected is not None:
            i = len(self.operations)
            before = self._expected[i] if i < len(self._expected) else None
            if before is not func:
                was = "ended there" if before is None else f"was {described(before)}"
                raise DerivativeError(
                    f"a block took another way when it ran again for its gradient: operation {i + 1} is "
                    f"{described(func)}, and {was} before. {_CHANGED}"
                )
        self.operations.append(func)

    def look_at(self, x: Tensor) -> None:
        """See :meth:`Scope.look_at`."""
        if functorch.maybe_get_level(x) > self.level:
            if functorch.is_dead_tensor_wrapper(x):  # ty: ignore[missing-attribute]  # the stub lacks it
                raise DerivativeError(
                    "a block uses a tensor that an earlier pass has left behind. Reset what keeps it (an attribute, a "
                    "list, a closure) at the beginning of forward."
                )
            if not any(x is known for known in self.captured):
                self.captured.append(x)

    def created(self, out: Any, depends: bool) -> None:
        """See :meth:`Scope.created`."""
        if isinstance(out, Tensor):
            if out.is_floating_point() or out.is_complex():
                if self._is_first:
                    self._made.append(weakref.ref(out))
                elif self._count in self.kept:
                    self.kept[self._count] = out
                self._count += 1
                if depends:
                    out.__dict__[DEPENDS] = True
        elif isinstance(out, (tuple, list)):
            for x in out:
                self.created(x, depends)

    def check_end(self) -> None:
        """That this run, a later one, did all that the first did."""
        expected = self._expected or ()
        if len(self.operations) != len(expected) or any(x is None for x in self.kept.values()):
            raise DerivativeError(
                f"a block ended after {len(self.operations)} operations when it ran again for its gradient, and after "
                f"{len(expected)} before. {_CHANGED}"
            )

    def left(self, known: set[int]) -> list[tuple[int, Tensor]]:
        """What the run has made that is still there: some attribute, container or closure holds it.

        Args:
            known: ``id`` s of tensors that need no mention.

        Returns:
            Numbers and tensors, in the order in which they were made.
        """
        found: dict[int, tuple[int, Tensor]] = {}
        for number, reference in enumerate(self._made):
            x = reference()
            if x is not None and id(x) not in known and id(x) not in found:
                found[id(x)] = number, x
        return list(found.values())


_CHANGED = (
    "Something that it reads has changed in between, and is neither an attribute of its modules nor a buffer, a hook "
    "or a container that they refer to. Keep it in an attribute of the module, or pass it as an argument."
)
