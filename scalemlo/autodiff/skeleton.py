"""A hook-free copy of a module's structure whose weights are lent to it, unit by unit, while it runs.

The live module belongs to its engine: its parameters are sharded, hooked and in the optimizer. Derivatives that no
stock engine computes run on the skeleton instead: the same forward code, parameters on the meta device, and, while a
unit (a block, or what is left at the root) is executing, whatever tensors the caller lends it: gathered weights,
moved weights, dual numbers. Nothing is ever written to the live weights, so they are bit-identical afterwards by
construction. Attributes, modes, buffers and hooks are those that the live module has when a pass begins.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from .copying import copy_structure
from .errors import DerivativeError
from .evaluation import Form, current_evaluation
from .mirroring import Mirror
from .operations import mark_parameter, mark_trained
from .python_state import PythonState
from .remat import Replay, remat
from .safety import find_foreign_kernel, find_suspects, make_safe
from .tensors import memory

Rematerialised = Literal["not", "remat", "checkpoint"]
"""What becomes of a unit's graph: it is kept, or made again in the backward, by :mod:`.remat` or torch's checkpoint."""


@dataclass(frozen=True)
class Lender:
    """What a skeleton computes with.

    Args:
        shards: Local shards of all parameters of the module, by canonical name.
        gather: Makes whole tensors of some of them.
        trained: Names of parameters that require a gradient in the live module.
        at_once: Lend all units' tensors from the start, where they are whole anyway, so that a module may also use a
            block's weights outside the block's forward.
        units: Whether units run again in the backward pass, with their weights gathered again.
        form: Of the derivative, see :data:`.evaluation.Form`.
    """

    shards: Mapping[str, Tensor]
    gather: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    trained: Collection[str] = ()
    at_once: bool = False
    units: Rematerialised = "not"
    form: Form = "plain"


@dataclass
class Unit:
    """The parameters that are lent together, for the duration of one module's forward."""

    name: str
    slots: list[tuple[nn.Module, str, str]] = field(default_factory=list)  # (owner, attribute, canonical name)
    of_root: list[tuple[nn.Module, str]] = field(default_factory=list)  # of modules it shares: lent with the root

    @property
    def names(self) -> list[str]:
        """Canonical parameter names, each once (tied parameters share one)."""
        return list(dict.fromkeys(name for _, _, name in self.slots))


@dataclass(frozen=True)
class Layer:
    """A module that holds parameters itself, not in a submodule."""

    path: str
    unit: str
    parameters: dict[str, str]  # attribute -> canonical name


class Skeleton:
    """See the module's docstring.

    Args:
        module: The live module, before an engine wraps it.
        unit_names: Names of the submodules that form a unit each; parameters outside all of them, or in several, form
            the root's unit.

    Raises:
        ValueError: If the module cannot be copied, or a unit is nested in another.
    """

    def __init__(self, module: nn.Module, unit_names: Sequence[str] = ()):
        _refuse_compiled(module)
        self.module, rebinder = copy_structure(module)
        make_safe(self.module)
        self._foreign_kernel = find_foreign_kernel(module)
        self.suspects = find_suspects(module)
        """What the code of the module uses that derivatives of second order may not reach through, in words."""
        self.units = [Unit("")] + [Unit(name) for name in unit_names]
        self.layers: list[Layer] = []
        self._find_slots(module)
        for unit in self.units[1:]:
            inside = set(self.module.get_submodule(unit.name).modules())
            unit.of_root += [(owner, attribute) for owner, attribute, _ in self.units[0].slots if owner in inside]
            _lend_around_forward(self, unit)
        self._mirror = Mirror(module, self.module, rebinder)
        self._mirror.update()
        self._lender: Lender | None = None
        self.carries: set[str] = set()
        """Buffers that take values from weights without a gradient, and give them back to differentiated passes."""
        self.has_gaps = any(
            isinstance(m, nn.Embedding) and (m.padding_idx is not None or m.scale_grad_by_freq)
            for m in module.modules()
        )
        """Whether gradients of the live module may not be those of its values: rows of padding get none."""

    def _find_slots(self, live: nn.Module) -> None:
        canonical = {id(p): name for name, p in live.named_parameters()}
        names = {name: canonical[id(p)] for name, p in live.named_parameters(remove_duplicate=False)}
        claims: dict[int, set[str]] = {}
        for unit in self.units[1:]:
            for inner in self.units[1:]:
                if inner.name.startswith(unit.name + "."):
                    raise ValueError(f"unit {unit.name!r} contains unit {inner.name!r}; units must not nest")
        by_name = {unit.name: unit for unit in self.units}
        for path, owner in self.module.named_modules(remove_duplicate=False):
            inside = [name for name in by_name if name and (path == name or path.startswith(name + "."))]
            claims.setdefault(id(owner), set()).add(inside[0] if inside else "")
        seen: set[int] = set()
        for prefix, owner in self.module.named_modules():
            if id(owner) in seen:
                continue
            seen.add(id(owner))
            of_units = claims[id(owner)]
            unit = by_name[next(iter(of_units))] if len(of_units) == 1 else self.units[0]  # of several: lent throughout
            own = {a: names[f"{prefix}.{a}" if prefix else a] for a, p in owner._parameters.items() if p is not None}
            unit.slots += [(owner, attribute, name) for attribute, name in own.items()]
            if own:
                self.layers.append(Layer(prefix, unit.name, own))

    def buffers(self) -> dict[int, str]:
        """Names of the copy's floating-point buffers, by memory."""
        return {memory(b): name for name, b in self.module.named_buffers() if b.is_floating_point()}

    @property
    def in_use(self) -> bool:
        """Whether a call of the module is running on what the skeleton is lent."""
        return self._lender is not None

    def settle(self) -> None:
        """An engine has put hooks and attributes on the live module, which are not to be taken over."""
        self._mirror.settle()

    def mirror(self) -> None:
        """Take over the attributes, modes, buffers and hooks that the live module has now."""
        self._mirror.update()

    @contextmanager
    def lent(self, lender: Lender) -> Iterator[None]:
        """While inside, calls of the skeleton compute with what ``lender`` gives.

        Raises:
            DerivativeError: If an exact derivative is taken through a kernel that has none; see :mod:`.safety`.
        """
        assert self._lender is None, "the skeleton is already in use"
        if self._foreign_kernel and lender.form not in ("plain", "value"):  # values and first derivatives are right
            raise DerivativeError(f"no exact derivatives: {self._foreign_kernel}")
        self._lender = lender
        try:
            yield
        finally:
            self._lender = None

    def call(self, method: str, args: tuple, kwargs: dict) -> object:
        """Run a method of the root module (``"forward"`` or any other) with the lent weights."""
        lender = self._lender
        assert lender is not None, "the skeleton is already in use"
        units = self.units if lender.at_once else self.units[:1]
        names = dict.fromkeys(name for unit in units for name in unit.names)
        with _borrowed(lender, units, {name: lender.shards[name] for name in names}):
            bound = self.module if method == "forward" else getattr(self.module, method)
            return bound(*args, **kwargs)

    def run_unit(self, unit: Unit, forward: Callable, args: tuple, kwargs: dict) -> object:
        """Run one unit's forward with what it is lent; outside :meth:`lent`, with what it holds."""
        lender = self._lender
        if lender is None or (lender.at_once and lender.units == "not"):
            return forward(*args, **kwargs)

        gathered: list[Mapping[str, Tensor]] = []  # of a first run that must begin anew, on one rank only perhaps
        of_root = [(owner, attribute, owner._parameters[attribute]) for owner, attribute in unit.of_root]

        def with_shards(shards: Mapping[str, Tensor], args: tuple, kwargs: dict) -> object:
            with _borrowed(lender, [unit], shards, gathered), _in_place_again(of_root):
                return forward(*args, **kwargs)

        shards = {name: lender.shards[name] for name in unit.names}
        if lender.units == "not" or not torch.is_grad_enabled():
            return with_shards(shards, args, kwargs)
        objects = [x for x in tree_leaves((args, kwargs)) if not isinstance(x, Tensor)]
        capture = partial(PythonState.of, [self.module.get_submodule(unit.name)], objects=objects)
        if lender.units == "remat":
            try:
                return remat(with_shards, shards, args, kwargs, capture=capture)
            finally:
                gathered.clear()
        replay = Replay(capture)

        def replayed(*given: Any) -> object:
            gathered.clear()
            with replay.running():
                return with_shards(*given)

        return checkpoint(replayed, shards, args, kwargs, use_reentrant=False)


@contextmanager
def _in_place_again(held: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """What the root was lent when a unit first ran, also where it runs again after that."""
    before = [owner._parameters[attribute] for owner, attribute, _ in held]
    for owner, attribute, tensor in held:
        owner._parameters[attribute] = tensor
    try:
        yield
    finally:
        for (owner, attribute, _), tensor in zip(held, before, strict=True):
            owner._parameters[attribute] = tensor


@contextmanager
def _borrowed(
    lender: Lender,
    units: Iterable[Unit],
    shards: Mapping[str, Tensor],
    gathered: list[Mapping[str, Tensor]] | None = None,
) -> Iterator[None]:
    """Have whole weights in the place of the parameters of some units for the duration.

    They answer what the live ones would when they are asked, and must not be written into. What an earlier attempt has
    gathered is used again: a collective that one rank alone makes anew would hang them all.
    """
    watched = current_evaluation()
    with nullcontext() if watched is None else watched.at():  # a gather is no operation of the module
        weights = gathered[0] if gathered else lender.gather(shards)
        if gathered is not None and not gathered:
            gathered.append(weights)
        addresses = [memory(t) for t in weights.values()]
    for name, t in weights.items():
        (mark_trained if name in lender.trained else mark_parameter)(t)
    slots = [slot for unit in units for slot in unit.slots]
    before = [owner._parameters[attribute] for owner, attribute, _ in slots]
    for owner, attribute, name in slots:
        owner._parameters[attribute] = weights[name]  # ty: ignore[invalid-assignment]  # not an nn.Parameter, on purpose
    if watched is not None:
        watched.weights.update(addresses)
    try:
        yield
    finally:
        if watched is not None:
            watched.weights.subtract(addresses)
        for (owner, attribute, _), tensor in zip(slots, before, strict=True):
            owner._parameters[attribute] = tensor


def _refuse_compiled(module: nn.Module) -> None:
    for name, m in module.named_modules():
        if isinstance(m, OptimizedModule):
            raise ValueError(
                f"{name or 'the module'} is wrapped by torch.compile, whose copy would go on calling the live module. "
                "Call its compile() method instead (module.compile()), which keeps the module as it is."
            )


def _lend_around_forward(skeleton: Skeleton, unit: Unit) -> None:
    module = skeleton.module.get_submodule(unit.name)
    forward = module.forward

    def forward_with_lent_weights(*args, **kwargs):
        return skeleton.run_unit(unit, forward, args, kwargs)

    module.forward = forward_with_lent_weights
