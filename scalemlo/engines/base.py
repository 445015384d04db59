"""What every engine offers: training as its framework does it, and its shards for everything else."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..autodiff.skeleton import Skeleton
from ..distributed.group import is_main_process
from ..distributed.shards import Shards
from .kept import KeptWeights
from .loss_scaler import LossScaler

DType = Literal["fp32", "bf16", "fp16"]
COMPUTE_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Call = Callable[[str, tuple, dict], Any]
"""``call(method, args, kwargs)`` runs a method of a module, however an engine or a derivative wants it run."""


@dataclass(frozen=True)
class StepOptions:
    """What an engine is told of the steps of a level that it holds the module of.

    Attributes:
        name: Of the level, for messages.
        max_grad_norm: To which gradients are clipped; None where they are not.
        gradient_accumulation_steps: Micro-batches of one step.
    """

    name: str
    max_grad_norm: float | None
    gradient_accumulation_steps: int


@dataclass(frozen=True, kw_only=True)
class EngineSpec(ABC):
    """How a level's module is to be wrapped; give it to :class:`scalemlo.Program` or to one level.

    Args:
        dtype: Precision of the forward and backward computation. Master weights stay in the dtype the module has
            (load it in fp32 for mixed precision). ``"fp16"`` scales the loss and needs a GPU.

    Raises:
        ValueError: If the dtype is unknown.
    """

    dtype: DType = "fp32"

    def __post_init__(self) -> None:
        if self.dtype not in COMPUTE_DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose one of {sorted(COMPUTE_DTYPES)}.")

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The reduced precision to compute in, or None for the module's own."""
        return COMPUTE_DTYPES[self.dtype]

    def loss_scaler(self) -> LossScaler:
        """A new loss scaler for a level in this precision."""
        return LossScaler.for_dtype(self.dtype)

    def check_options(self, options: "StepOptions", optimizer: torch.optim.Optimizer) -> None:
        """Refuse a level that contradicts what this engine was told about it.

        Args:
            options: Of the level's steps.
            optimizer: Its optimizer.
        """
        return None

    @abstractmethod
    def wrap(self, module: nn.Module, *, name: str, device: torch.device, may_skip_parameters: bool) -> "Engine":
        """Take over a module whose ``requires_grad`` flags say what is trained.

        Args:
            module: Module on any device; it is moved and possibly sharded in place.
            name: What to call it in messages.
            device: Device of this rank.
            may_skip_parameters: Whether a backward pass may leave some trainable parameters without a gradient.

        Returns:
            The engine that owns the module from now on.
        """


@dataclass(frozen=True)
class ParameterBlock:
    """The parameters of one level: some names in one engine."""

    engine: "Engine"
    names: tuple[str, ...]

    def shards(self) -> Shards:
        """Local weights; aliases the live ones."""
        self.engine.require_resident()
        return Shards({name: self.engine.local(name) for name in self.names}, self.engine.group)

    def vector(self, tensors: Mapping[str, Tensor | None]) -> Shards:
        """A vector over these parameters; None entries become zeros."""
        filled = {n: torch.zeros_like(self.engine.local(n)) if (t := tensors[n]) is None else t for n in self.names}
        return Shards(filled, self.engine.group)


class Engine(ABC):
    """One module, wrapped for training, and its skeleton for the derivatives no training framework computes."""

    def __init__(self, module: nn.Module, spec: EngineSpec, *, name: str, device: torch.device, units: Sequence[str]):
        check_precision(spec, device, name)
        self.spec, self.name, self.device = spec, name, device
        self.module = module.to(device)
        named = list(module.named_parameters(remove_duplicate=False))
        first = {id(p): n for n, p in reversed(named)}
        self.dtypes = {n: p.dtype for n, p in named if first[id(p)] == n}
        """Of the parameters as they were given, by canonical name."""
        self._tied = {n: first[id(p)] for n, p in named if first[id(p)] != n}
        self.skeleton = Skeleton(self.module, units)
        self._functional: Call | None = None
        self.is_running = False
        """Whether a call of the live module is running."""
        self.is_resident = True
        """Whether its weights are on the device; see :mod:`scalemlo.memory`."""
        self.kept: KeptWeights | None = None
        """See :meth:`keep_gathered`."""

    def note_residence(self, is_resident: bool) -> None:
        """Be told that the weights have come onto the device, or left it."""
        self.is_resident = is_resident

    def keep_gathered(self, kept: KeptWeights) -> None:
        """Gather constants where they may be kept from one pass to the next; nothing to keep where nothing is gathered.

        Args:
            kept: Where.
        """
        self.kept = None if self.group is None else kept

    @property
    def shards_device(self) -> torch.device:
        """Where the shards of trained weights lie, and with them optimizer states and all vectors."""
        return self.device

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Make ready an optimizer that is going to step this engine's parameters."""
        return None

    # ---- what differs between engines --------------------------------------------------------------------------
    @property
    @abstractmethod
    def group(self) -> dist.ProcessGroup | None:
        """The group shards are split over; None where every rank holds whole parameters."""

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """All parameters by canonical name, as an optimizer must see them."""

    @abstractmethod
    def call_live(self, method: str, args: tuple, kwargs: dict) -> Any:
        """Run the live module the way the training framework wants it run."""

    @abstractmethod
    def local(self, name: str) -> Tensor:
        """This rank's shard of a parameter: detached, aliasing the live weights."""

    @abstractmethod
    def shard(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's shards of tensors that every rank holds whole; the inverse of :meth:`gather`."""

    @abstractmethod
    def gather(self, shards: Mapping[str, Tensor], *, tangents_only: bool = False) -> dict[str, Tensor]:
        """Full tensors in the dtype the live module computes in; differentiable in every mode.

        The adjoint is a reduce-scatter (sum) in the dtype of the shards; for replicated parameters nothing is summed.

        Args:
            shards: Local shards by parameter name.
            tangents_only: Whether of dual gradients only the tangents are wanted: half the bytes; the rest may be zero.
        """

    @abstractmethod
    def average_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean over ranks of gradients that each rank computed through :meth:`gather` from its part of the batch.

        The gradients may be averaged in place.
        """

    @abstractmethod
    def full_tensor(self, name: str) -> Tensor:
        """One whole parameter in the dtype of its shards, for reading. Collective."""

    def watch_loss(self, loss: Tensor) -> Tensor:
        """Return the loss of a live pass, before its backward; where an engine must know it, as part of that engine."""
        return loss

    def live_pass(self, *, wanted: bool, last: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward over the live module.

        Args:
            wanted: Whether this pass is meant to give this module's gradients.
            last: Whether the accumulated gradients must be reduced over ranks in this pass.
        """
        return nullcontext() if wanted else _frozen(self.module)

    def shape(self, name: str) -> torch.Size:
        """The shape of the whole parameter in the module, however it is held."""
        return self.parameters[name].shape

    def start(self, name: str) -> int:
        """Where this rank's shard begins in the flattened parameter; a shard is consecutive entries of it."""
        return 0

    def held_tensors(self) -> Iterator[Tensor]:
        """All local tensors that hold weights: what shares their memory is moved off the device with them."""
        for name in self.parameters:
            yield self.local(name)

    # ---- the same for all --------------------------------------------------------------------------------------
    @property
    def trained(self) -> frozenset[str]:
        """Names of the parameters that require a gradient."""
        return frozenset(name for name, p in self.parameters.items() if p.requires_grad)

    def constant(self, name: str) -> Tensor:
        """This rank's shard of a parameter, for passes that do not move it."""
        return self.local(name)

    def require_resident(self) -> None:
        """Raise a ``ValueError`` where the weights are off the device: reading them then would crash the process."""
        if not self.is_resident:
            raise ValueError(
                f"the weights of level '{self.name}' are off the device, to keep to the program's memory budget. Use "
                "them inside `with program.resident(level):`, or call the module inside `program.inference(level)`."
            )

    def full_tensors(self, *, trainable_only: bool = False, also: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Parameters by canonical name, then persistent buffers, one whole tensor after the other. Collective.

        Args:
            trainable_only: Whether to leave frozen parameters and buffers out.
            also: Frozen parameters that are not left out.

        Yields:
            Names and tensors on the CPU, for reading; on rank 0 alone, and the other ranks must exhaust it too.
        """
        for name, p in self.parameters.items():
            if p.requires_grad or not trainable_only or name in also:
                full = self.full_tensor(name)
                if is_main_process():
                    yield name, full.cpu()
                del full
        if is_main_process() and not trainable_only:
            yield from ((name, buffer.cpu()) for name, buffer in self.persistent_buffers().items())

    def full_state_dict(self, *, trainable_only: bool = False) -> dict[str, Tensor]:
        """Full tensors on the CPU of rank 0 (empty elsewhere), names as in the unwrapped module. Collective."""
        state = {name: t.clone() for name, t in self.full_tensors(trainable_only=trainable_only)}
        return state | {name: state[first] for name, first in self._tied.items() if first in state}

    def persistent_buffers(self) -> dict[str, Tensor]:
        """Live buffers that belong to the module's state."""
        kept = self.module.state_dict().keys()
        return {name: buffer.detach() for name, buffer in self.module.named_buffers() if name in kept}

    def call(self, method: str, args: tuple, kwargs: dict) -> Any:
        """Run a method of the module: live, or functionally inside :meth:`functional`."""
        self.require_resident()
        if self._functional is not None:
            return self._functional(method, args, kwargs)
        outer, self.is_running = self.is_running, True
        try:
            return self.call_live(method, args, kwargs)
        finally:
            self.is_running = outer

    @property
    def visible(self) -> nn.Module:
        """The module that answers a loss which asks for an attribute: the live one, or its skeleton where that runs."""
        return self.module if self._functional is None else self.skeleton.module

    @contextmanager
    def functional(self, call: Call) -> Iterator[None]:
        """While inside, every call of the module goes to ``call`` instead of the live module."""
        assert self._functional is None, "functional passes do not nest"
        self._functional = call
        try:
            yield
        finally:
            self._functional = None

    def autocast(self, *, cache: bool = True) -> AbstractContextManager:
        """Autocast to the compute dtype, where this engine uses autocast."""
        if self.spec.compute_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.spec.compute_dtype, cache_enabled=cache)

    def call_skeleton(self, method: str, args: tuple, kwargs: dict) -> Any:
        """Run the skeleton with the weights it is lent, in the precision of the live module."""
        with self.autocast(cache=False):
            return self.skeleton.call(method, args, kwargs)

    def take_gradients(self, names: Sequence[str]) -> dict[str, Tensor | None]:
        """Take the local gradients out of the module: mean over ranks, dtype of the weights; None where absent."""
        taken = {}
        for name in names:
            parameter = self.parameters[name]
            taken[name] = None if parameter.grad is None else self.to_local(parameter.grad)
            parameter.grad = None
        return taken

    def put_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Hand gradients to the optimizer."""
        for name, grad in gradients.items():
            self.parameters[name].grad = self.from_local(name, grad)

    def recover(self) -> None:
        """After an error in a pass: no gradient is left, and the next pass finds what it would have found without it.

        Not collective: an error may come on one rank alone.
        """
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Drop all gradients of the module."""
        for p in self.parameters.values():
            p.grad = None

    def to_local(self, t: Tensor) -> Tensor:
        """This rank's part of a tensor that has the layout of a parameter."""
        return t

    def from_local(self, name: str, t: Tensor) -> Tensor:
        """The inverse of :meth:`to_local` for a tensor laid out like the parameter ``name``."""
        return t


def check_precision(spec: EngineSpec, device: torch.device, name: str) -> None:
    """Refuse fp16 on the CPU, where few modules have all their kernels and every one is slow.

    Args:
        spec: How the module is to be wrapped.
        device: Of this rank.
        name: Of the level.

    Raises:
        ValueError: For fp16 on the CPU.
    """
    if spec.dtype == "fp16" and device.type == "cpu":
        raise ValueError(f"engine of {name!r}: dtype='fp16' needs a GPU, this rank runs on {device}. Use 'bf16'.")


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
