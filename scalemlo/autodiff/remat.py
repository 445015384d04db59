"""Rematerialisation that every derivative passes through: pairs (x, dx) in, pairs (y, dy) out, nothing kept between.

``torch.utils.checkpoint`` fails inside ``torch.func``. :func:`remat` runs a function without a graph and runs it again
when its gradient is asked for. Under a dual level (:class:`torch.autograd.forward_ad.dual_level`) either run computes
values and tangents together, so a Hessian-vector product through it costs one forward with tangents and one backward
with tangents, and between the two only the function's inputs and their tangents are alive.

Tensors need not pass through arguments and results. What a run has made and something still holds when it ends (an
attribute, a list, a hook's dictionary, an object that torch does not know) becomes an output: wherever it is used
outside, it stands for that output. What a run takes besides its arguments (from an attribute that a parent has set, or
a closure) becomes an input. And the second run starts from the Python state that the first one started from.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch._C import DisableTorchFunction
from torch._C import _functorch as functorch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..versions import accelerator_types
from .evaluation import Captured, Evaluation, Marking, Run, Scope, WritesItsInput
from .operations import MARKS, evaluation
from .python_state import PythonState
from .rng import RNGState
from .tensors import DEPENDS, memory


class Replay:
    """Runs something several times from one and the same state of Python, and in the same autocast.

    Args:
        capture: Takes the state; None where there is none to take.
    """

    def __init__(self, capture: Callable[[], PythonState] | None = None):
        self._capture = capture
        self._entry: PythonState | None = None
        self._autocast: list[tuple[str, bool, torch.dtype]] | None = None

    def restart(self) -> None:
        """Come back to the state before the first run, which did not come to its end and is to be made anew."""
        if self._entry is not None:
            self._entry.restore()
        self._autocast = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context of a run: the first leaves what it changes, later ones put back what they found.

        Yields:
            Nothing.
        """
        if self._autocast is None:
            self._autocast = [
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in accelerator_types()
            ]
            self._entry = None if self._capture is None else self._capture()
            yield
            return
        if self._capture is None or self._entry is None:
            with _as_it_was(self._autocast):
                yield
            return
        now = self._capture()
        self._entry.restore()
        try:
            with _as_it_was(self._autocast):
                yield
        finally:
            now.restore()


def remat(function: Callable[..., Any], *args: Any, capture: Callable[[], PythonState] | None = None) -> Any:
    """``function(*args)``, run again in the backward pass instead of keeping its graph.

    Forward, reverse and forward-over-reverse derivatives are those of the function itself; random numbers are replayed.
    Arguments may be nested in any way.

    Args:
        function: Any function of tensors.
        *args: Its arguments.
        capture: Takes the state of Python that the function may change; by default it is held to change none.

    Returns:
        What the function returns.
    """
    watched = evaluation("dual")
    outside = watched.scopes[-1]
    if isinstance(outside, Run) and functorch.maybe_current_level() is None:
        # A part of a run without a graph. In the run that has one it will be a call of its own, so it is one here too.
        with watched.within(Marking(outside)):
            return _known(outside, function(*args))
    replay = Replay(capture)
    captured: list[Tensor] = []
    written: set[int] = set()
    while True:
        with DisableTorchFunction():
            call = _Call(function, args, captured, written, replay, watched)
        try:
            outputs = _Remat.apply(call, *call.differentiable)
        except Captured as more:
            captured += more.tensors
            replay.restart()
        except WritesItsInput as one:
            written.add(one.address)
            replay.restart()
        else:
            return _known(outside, call.rebuild(outputs))


def _known(scope: Scope, returned: Any) -> Any:
    """Let a scope know of what a call has returned."""
    with DisableTorchFunction():
        for x in tree_leaves(returned):
            if isinstance(x, Tensor):
                scope.created(x, depends=True)
    return returned


class _Call:
    """One call of a function: what is constant in it, what it takes and leaves, and how that is nested."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple,
        captured: Sequence[Tensor],
        written: Collection[int],
        replay: Replay,
        watched: Evaluation,
    ):
        self._function, self._replay, self._watched = function, replay, watched
        self._scopes = list(watched.scopes)
        self._args = args
        flat, self._spec = tree_flatten(args)
        self._flat: list[Any] = [watched.resolve(x) for x in flat]
        self._moving = [i for i, x in enumerate(self._flat) if isinstance(x, Tensor) and _is_continuous(x)]
        self.differentiable: list[Tensor] = [self._flat[i] for i in self._moving] + list(captured)
        for i in self._moving:
            self._flat[i] = None
        self._copied = [i for i, x in enumerate(self.differentiable) if memory(x) in written]
        self._depends: list[bool] | None = None
        devices = [x.device for x in self.differentiable if x.device.type != "cpu"]  # shards may lie on the host
        self._rng = RNGState.capture(devices[0] if devices else torch.device("cpu"))
        self._tangents: Sequence[Tensor | None] = ()
        self._operations: list[Callable] | None = None
        self._left: list[int] = []  # numbers of what is left behind
        self._written: list[int] = []  # of the copied inputs, those that were written into
        self._last: Run | None = None

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Primal outputs; the tangents are kept for :meth:`tangents`, which is asked next."""
        with _derivatives_enabled():
            outputs = self._evaluate(*inputs)
            return self._split(outputs)

    def pullback(self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], wanted: Sequence[bool]):
        """Primal gradients by the wanted inputs; the tangents are kept as in :meth:`forward`."""
        outside = RNGState.capture(self._rng.where)
        self._rng.restore()
        with _derivatives_enabled():
            indices = [i for i, want in enumerate(wanted) if want]

            def of_wanted(*some: Tensor) -> tuple[Tensor, ...]:
                full = list(inputs)
                for i, x in zip(indices, some, strict=True):
                    full[i] = x
                return self._evaluate(*full)

            pull = torch.func.vjp(of_wanted, *(inputs[i] for i in indices))[1]
            gradients = pull(tuple(cotangents))
        assert self._last is not None, "it has just run"
        self._last.release()  # calls inside it have been pulled back too
        self._last = None
        outside.restore()
        with _derivatives_enabled():
            return self._split(gradients)

    def tangents(self) -> tuple[Tensor | None, ...]:
        """Tangents of what was computed last."""
        found, self._tangents = tuple(self._tangents), ()
        return found

    def rebuild(self, outputs: Sequence[Tensor]) -> Any:
        """Nest the outputs as the function did; what else it made stands for the rest of them from here on."""
        flat = list(self._constants)
        for i, x in zip(self._floating, outputs, strict=False):
            flat[i] = x
        for made, x in (*zip(self._made, outputs, strict=True), *self._inner):
            self._watched.replace(made, x)
        for i, x in zip(self._written, outputs[len(outputs) - len(self._written) :], strict=True):
            self._watched.replace(self.differentiable[i], x)
        del self._made, self._inner
        return tree_unflatten(flat, self._out_spec)

    def _evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One run. The first finds what it takes and leaves; later ones give the same again."""
        is_first = self._operations is None
        run = Run(functorch.maybe_current_level() or 0, self._operations, self._left)
        if self._depends is None:
            self._depends = [
                functorch.maybe_get_level(x) > run.level or DEPENDS in x.__dict__ for x in self.differentiable
            ]
        with DisableTorchFunction():
            inputs = tuple(self._prepared(run, i, x) for i, x in enumerate(inputs))
        flat = list(self._flat)
        for i, x in zip(self._moving, inputs, strict=False):
            flat[i] = x
        args = tree_unflatten(flat, self._spec)
        given = []
        if is_first:
            given = [(original, rebuilt, _items(rebuilt)) for original, rebuilt in _mutable(self._args, args)]
        watched = self._watched
        with watched.active(), watched.at(*self._scopes), watched.within(run), self._replay.running():
            returned = self._function(*args)
            out, out_spec = tree_flatten(returned)
            out = [run.resolve(x) if isinstance(x, Tensor) else x for x in out]
        if is_first:
            if run.captured:
                raise Captured(run.captured)
            self._operations, self._out_spec = run.operations, out_spec
            self._hand_back(given, inputs)
            with DisableTorchFunction():
                self._look_at_outcome(run, out, inputs)
        else:
            run.check_end()
            self._last = run
        left = [run.resolve(x) for x in run.kept.values()]
        return (*(out[i] for i in self._floating), *left, *(run.resolve(inputs[i]) for i in self._written))

    def _prepared(self, run: Run, i: int, x: Tensor) -> Tensor:
        """An input as the run sees it."""
        original = self.differentiable[i]
        if i in self._copied:
            x = x.clone()
        else:
            run.inputs.add(memory(x))
        run.replace(original, x)  # reached through something that holds the object
        marks = {key: True for key in MARKS if key in original.__dict__}
        if self._depends is not None and self._depends[i]:
            marks[DEPENDS] = True
        if marks:
            x.__dict__.update(marks)
        return x

    def _hand_back(self, given: Sequence[tuple[Any, Any, list]], inputs: Sequence[Tensor]) -> None:
        """Lists and dictionaries that were given hold what the function has put into them."""
        outside = {id(inner): x for inner, x in zip(inputs, self.differentiable, strict=True)}
        outside |= {id(rebuilt): original for original, rebuilt, _ in given}
        for original, rebuilt, before in given:
            after = _items(rebuilt)
            if len(after) == len(before) and all(
                key == other and x is y for (key, x), (other, y) in zip(after, before, strict=True)
            ):
                continue
            values = {key: outside.get(id(x), x) for key, x in after}
            if isinstance(original, dict):
                original.clear()
                original.update(values)
            else:
                original[:] = values.values()

    def _look_at_outcome(self, run: Run, out: Sequence[Any], inputs: Sequence[Tensor]) -> None:
        """What comes out: results, what is left somewhere else, and inputs that were written into."""
        self._floating = [i for i, x in enumerate(out) if isinstance(x, Tensor) and _is_continuous(x)]
        self._constants = [None if i in set(self._floating) else x for i, x in enumerate(out)]
        left = run.left({id(x) for x in out} | {id(x) for x in inputs})
        self._left, run.kept = [number for number, _ in left], dict(left)
        self._written = [i for i in self._copied if inputs[i]._version > 0]
        self._inner = [(inputs[i], x) for i, x in enumerate(self.differentiable) if i not in self._written]
        self._made = [*(out[i] for i in self._floating), *run.kept.values(), *(inputs[i] for i in self._written)]

    def _split(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with DisableTorchFunction():
            if fwAD._current_level < 0:
                self._tangents = [None] * len(outputs)
                return tuple(x.view_as(x) for x in outputs)
            pairs = [fwAD.unpack_dual(x) for x in outputs]
            # Zeros where nothing moves an output: torch wants a tangent of every output if inputs move.
            self._tangents = [torch.zeros_like(x) if tangent is None else tangent for x, tangent in pairs]
            return tuple(primal.view_as(primal) for primal, _ in pairs)


class _Remat(torch.autograd.Function):
    @staticmethod
    def forward(run: _Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        return run.forward(inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.run = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, *cotangents: Tensor):
        wanted = ctx.needs_input_grad[1:]
        gradients = iter(_Pullback.apply(ctx.run, wanted, len(wanted), *ctx.saved_tensors, *cotangents))
        return None, *(next(gradients) if want else None for want in wanted)

    @staticmethod
    def jvp(ctx, _run, *_tangents):
        return ctx.run.tangents()


class _Pullback(torch.autograd.Function):
    @staticmethod
    def forward(run: _Call, wanted: Sequence[bool], num_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return run.pullback(tensors[:num_inputs], tensors[num_inputs:], wanted)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.run = inputs[0]

    @staticmethod
    def jvp(ctx, *_tangents):
        return ctx.run.tangents()


def _mutable(original: Any, rebuilt: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of lists and dictionaries at the same place of two structures."""
    if isinstance(original, (list, dict)):
        yield original, rebuilt
    if isinstance(original, (list, tuple)):
        for a, b in zip(original, rebuilt, strict=True):
            yield from _mutable(a, b)
    elif isinstance(original, dict):
        for key, a in original.items():
            yield from _mutable(a, rebuilt[key])


def _items(x: list | dict) -> list[tuple[Any, Any]]:
    return list(x.items() if isinstance(x, dict) else enumerate(x))


def _is_continuous(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


@contextmanager
def _as_it_was(autocast: Sequence[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    """Autocast as in the first run; without its cache, which would keep casts of weights that have gone."""
    if len(autocast) == 1:
        kind, enabled, dtype = autocast[0]
        with torch.autocast(kind, dtype, enabled, cache_enabled=False):
            yield
        return
    with _as_it_was(autocast[:1]), _as_it_was(autocast[1:]):
        yield


@contextmanager
def _derivatives_enabled():
    """Inside an autograd function gradients and tangents are off; switch both on."""
    with torch.enable_grad(), fwAD._set_fwd_grad_enabled(True):
        yield
