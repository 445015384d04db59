"""A hook-free copy of a module's structure whose weights are lent to it, unit by unit, while it runs.

The live module belongs to its engine: its parameters are sharded, hooked and in the optimizer. Derivatives that no
stock engine computes run on the skeleton instead: the same forward code, parameters on the meta device, and, while a
unit (a block, or what is left at the root) is executing, whatever tensors the caller lends it: gathered weights,
moved weights, dual numbers. Nothing is ever written to the live weights, so they are bit-identical afterwards by
construction.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType

import torch
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack
from torch._dynamo.eval_frame import OptimizedModule

from .errors import DerivativeError
from .remat import remat
from .safety import find_foreign_kernel, guarded, make_safe


@dataclass(frozen=True)
class Lender:
    """What a skeleton computes with.

    Args:
        shards: Local shards of all parameters of the module, by canonical name.
        gather: Makes whole tensors of some of them.
        at_once: Lend all units' tensors from the start, where they are whole anyway, so that a module may also use a
            block's weights outside the block's forward.
        remat: Run every unit again in the backward pass, with its weights gathered again, instead of keeping its graph.
    """

    shards: Mapping[str, Tensor]
    gather: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    at_once: bool = False
    remat: bool = False


@dataclass
class Unit:
    """The parameters that are lent together, for the duration of one module's forward."""

    name: str
    slots: list[tuple[nn.Module, str, str]] = field(default_factory=list)  # (owner, attribute, canonical name)

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
        unit_names: Names of the submodules that form a unit each; parameters outside all of them form the root's unit.

    Raises:
        ValueError: If the module cannot be copied, or a unit is nested in another.
    """

    def __init__(self, module: nn.Module, unit_names: Sequence[str] = ()):
        self._live = module
        self.module = _structure(module)
        self._foreign_kernel = find_foreign_kernel(module)
        canonical = {id(p): name for name, p in module.named_parameters()}
        names = {name: canonical[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
        self.units = [Unit("")] + [Unit(name) for name in unit_names]
        claimed: dict[int, str] = {}
        self.layers: list[Layer] = []
        for unit in reversed(self.units):  # the root takes what the others left
            for prefix, owner in self.module.get_submodule(unit.name).named_modules(prefix=unit.name):
                if id(owner) in claimed:
                    if unit.name:
                        raise ValueError(
                            f"unit {unit.name!r} contains unit {claimed[id(owner)]!r}; units must not nest"
                        )
                    continue
                claimed[id(owner)] = unit.name
                own = {
                    a: names[f"{prefix}.{a}" if prefix else a] for a, p in owner._parameters.items() if p is not None
                }
                unit.slots += [(owner, attribute, name) for attribute, name in own.items()]
                if own:
                    self.layers.append(Layer(prefix, unit.name, own))
        for unit in self.units[1:]:
            _lend_around_forward(self, unit)
        self._lender: Lender | None = None
        self._buffers = [
            (owner, attribute, prefix)
            for prefix, owner in self.module.named_modules()
            for attribute, buffer in owner._buffers.items()
            if buffer is not None
        ]

    @property
    def in_use(self) -> bool:
        """Whether a call of the module is running on what the skeleton is lent."""
        return self._lender is not None

    @contextmanager
    def lent(self, lender: Lender) -> Iterator[None]:
        """While inside, calls of the skeleton compute with what ``lender`` gives.

        Buffers are copies of the live ones, so that running statistics of the live module stay as they are; train and
        eval modes follow the live module.

        Raises:
            DerivativeError: If an exact derivative is taken through a kernel that has none; see :mod:`.safety`.
        """
        assert self._lender is None, "the skeleton is already in use"
        keeps_graph = torch.is_grad_enabled() and not get_interpreter_stack()
        if self._foreign_kernel and (lender.remat or keeps_graph):  # values alone are right
            raise DerivativeError(f"no exact derivatives: {self._foreign_kernel}")
        for skeleton, live in zip(self.module.modules(), self._live.modules(), strict=True):
            skeleton.training = live.training
        for owner, attribute, prefix in self._buffers:
            owner._buffers[attribute] = self._live.get_submodule(prefix).get_buffer(attribute).clone()
        self._lender = lender
        try:
            yield
        finally:
            self._lender = None

    def call(self, method: str, args: tuple, kwargs: dict) -> object:
        """Run a method of the root module (``"forward"`` or any other) with the lent weights."""
        lender = self._lender
        assert lender is not None, "a skeleton runs only inside `lent`"
        units = self.units if lender.at_once else self.units[:1]
        names = dict.fromkeys(name for unit in units for name in unit.names)
        with guarded(), _borrowed(units, lender.gather({name: lender.shards[name] for name in names})):
            bound = self.module if method == "forward" else getattr(self.module, method)
            return bound(*args, **kwargs)

    def run_unit(self, unit: Unit, forward: Callable, args: tuple, kwargs: dict) -> object:
        """Run one unit's forward with what it is lent; outside :meth:`lent`, with what it holds."""
        lender = self._lender
        if lender is None or (lender.at_once and not lender.remat):
            return forward(*args, **kwargs)

        def with_shards(shards: Mapping[str, Tensor], args: tuple, kwargs: dict) -> object:
            with guarded(), _borrowed([unit], lender.gather(shards)):  # guarded: a backward has threads of its own
                return forward(*args, **kwargs)

        shards = {name: lender.shards[name] for name in unit.names}
        return (remat if lender.remat else _call)(with_shards, shards, args, kwargs)


@contextmanager
def _borrowed(units: Iterable[Unit], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of the parameters of some units for the duration."""
    slots = [slot for unit in units for slot in unit.slots]
    before = [owner._parameters[attribute] for owner, attribute, _ in slots]
    for owner, attribute, name in slots:
        owner._parameters[attribute] = tensors[name]  # ty: ignore[invalid-assignment]  # not an nn.Parameter, on purpose
    try:
        yield
    finally:
        for (owner, attribute, _), tensor in zip(slots, before, strict=True):
            owner._parameters[attribute] = tensor


def _call(function: Callable, *args: object) -> object:
    return function(*args)


def _structure(module: nn.Module) -> nn.Module:
    """Deep copy with every parameter on the meta device; no weight is copied, buffers are shared."""
    for name, m in module.named_modules():
        if isinstance(m, OptimizedModule):
            raise ValueError(
                f"{name or 'the module'} is wrapped by torch.compile, whose copy would go on calling the live module. "
                "Call its compile() method instead (module.compile()), which keeps the module as it is."
            )
        if isinstance(m.__dict__.get("forward"), FunctionType):  # a closure would go on calling the live module
            raise ValueError(
                f"the forward of {name or type(module).__name__!r} was replaced by a function on the instance; exact "
                "derivatives need a copy of the module that does not refer to the original. Use a subclass, or forward "
                "hooks."
            )
    memo: dict[int, object] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in module.buffers():
        memo[id(b)] = b
    try:
        structure = copy.deepcopy(module, memo)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} cannot be deep-copied, which exact derivatives need ({error}). Keep locks, open "
            "files and process groups out of the module's attributes."
        ) from error
    make_safe(structure)
    return structure


def _lend_around_forward(skeleton: Skeleton, unit: Unit) -> None:
    module = skeleton.module.get_submodule(unit.name)
    forward = module.forward

    def forward_with_lent_weights(*args, **kwargs):
        return skeleton.run_unit(unit, forward, args, kwargs)

    module.forward = forward_with_lent_weights
