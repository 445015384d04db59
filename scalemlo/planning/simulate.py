"""Runs a program as one rank of many, with shapes and no numbers: fake tensors, a fake process group.

What runs is the program itself: engines, gradients, estimators. This file holds all that has to be different where
tensors have no values:

* Numbers read from tensors are constants. A float is 1.0, so that solvers take all the steps they may and clipping
  clips; ``all()`` of anything is true and ``any()`` false, so that nothing is found wrong. Only of a batch's own
  integers it is known whether there are zeros among them: padding.
* Ghost products are taken to agree with the forward derivative, as they do where they are used in the end.
* Batches are the largest of the first few the data gives, loaded for real and kept as shapes.
* Models of transformers are made from their configuration where ``from_pretrained`` is called.
* ``DistributedDataParallel`` is one of our own (its C++ needs data), see :class:`_SimulatedDDP`.
"""

import gc
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..autodiff import rng
from ..derivatives.trajectory import Trajectory
from ..distributed import shards
from ..engines import ddp, gather, sharded
from ..engines.deepspeed.engine import DeepSpeed
from ..loop.batches import BatchStream, map_tensors
from ..loop.program import Program
from ..loop.verification import Verification
from ..memory.bytes_tracker import HOST, KIND_OF_STATE, MemoryTracker, PhaseUse
from ..memory.phases import states_of, tensors_of
from .counted_moves import counted_moves, note_away
from .replays import replayed_derivatives

NUM_BATCHES_LOOKED_AT = 8

depth: ContextVar[int | None] = ContextVar("depth", default=None)
"""Number of layers of models that ``from_pretrained`` is asked for; None for what their configuration says."""


@contextmanager
def simulation(world_size: int, *, accelerator: bool) -> Iterator[MemoryTracker]:
    """Be rank 0 of ``world_size``, with fake tensors, while inside.

    Args:
        world_size: Number of ranks.
        accelerator: Whether to follow torch's habits on accelerators (optimizers work on all parameters at once, inner
            products are taken in fp64) with states on the host apart, or those on the CPU.

    Yields:
        What counts bytes, collectives and FLOPs.

    Raises:
        ValueError: If this process is a rank of a real group.
    """
    if dist.is_initialized():
        raise ValueError("a plan is made in one process without a process group; do not use a launcher.")
    # Autograd counts the devices at its first pass, once and for all; for fake ones it would start threads, and this
    # process could no longer be forked.
    torch.zeros((), requires_grad=True).backward()
    tracker = MemoryTracker()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "excepthook", sys.excepthook))  # init_process_group sets its own
        stack.enter_context(mock.patch.dict(os.environ, {"ACCELERATE_USE_CPU": "1", "WORLD_SIZE": "1"}))
        if world_size > 1:
            dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
        stack.callback(_leave_group)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        stack.enter_context(_without_values(mode))
        stack.enter_context(_on_accelerator(tracker) if accelerator else ExitStack())
        stack.enter_context(_tagging(tracker))
        stack.enter_context(counted_moves(tracker, accelerator=accelerator))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(mode)
        stack.enter_context(tracker)
        stack.enter_context(_Constants())
        yield tracker


def run_iterations(program: Program, tracker: MemoryTracker) -> tuple[list[PhaseUse], list[PhaseUse]]:
    """Outer iterations of a program made under :func:`simulation`: two, or within a memory budget five.

    In the first one within a budget every phase has nothing but its own states on the device, to be measured, and the
    second begins with what that left there; then levels may change places, are measured again, and leave other states.

    Args:
        program: The program.
        tracker: Of the simulation.

    Returns:
        Phases of the first, which allocates optimizer states and checks derivatives, and of the last and all others.
    """
    timed, note_moves = program.history.phase, program.history.note_moves

    @contextmanager
    def phase(level: str, name: str, device: torch.device) -> Iterator[None]:
        gc.collect()  # graphs in reference cycles, whose end would else be a matter of chance
        with timed(level, name, device), tracker.phase(f"{level}/{name}"):
            yield
            note_away(program, tracker)
        _classify(program, tracker)

    def note(level: str, name: str, num_bytes: int, seconds: float) -> None:
        tracker.phases[-1].moved_bytes += num_bytes
        note_moves(level, name, num_bytes, seconds)

    _classify(program, tracker)
    program.iteration.gradients.verification = Verification("off", 1)  # it compares values
    for trainer in program.trainers.values():
        trainer.is_verified = False
    found = []
    gc.collect()
    gc.freeze()  # the collections before each phase look at what is new
    try:
        within = program.iteration.scheduler.residency
        with (
            # What is moved depends on what a tracker of the program's own measures.
            replayed_derivatives(tracker) if within is None else nullcontext(),
            mock.patch.object(program.history, "phase", phase),
            mock.patch.object(program.history, "note_moves", note),
        ):
            for _ in range(2 if within is None else 5):
                tracker.phases = []
                program.step()
                found.append(tracker.phases)
    finally:
        gc.unfreeze()
    return found[0], found[-1]


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class _Constants(TorchDispatchMode):
    """Answers what a fake tensor's value is, and makes the zeros of forward mode, which have no memory, real ones.

    A view of a fake one would lie on the meta device, by C++ code that knows nothing of fake tensors.
    """

    def __torch_dispatch__(self, func, types, args: tuple[Any, ...] = (), kwargs=None):
        """Answer, or run the operation."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if func is torch.ops.prim.device.default:  # half of all dispatches
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return _value(args[0])
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten._efficientzerotensor.default:
            with _disable_current_modes():
                return func(*args, **{**(kwargs or {}), "device": torch.device("cpu")})
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            if any(getattr(t, "_has_zeros", False) for t in args[:2]):
                out._has_zeros = not out.is_floating_point()
            if func._overloadpacket in _SAYS:
                says = _SAYS[func._overloadpacket] and not getattr(out, "_has_zeros", False)
                out._says = says
        return out


_SAYS = {torch.ops.aten.all: True, torch.ops.aten.any: False}


def _without_data(t: Tensor) -> Tensor:
    """A fake tensor like a batch's real one; of integers it is remembered whether some are zero, as padding masks ask.

    Transformers makes an explicit mask, and copies of keys and values for it, only where a row is padded.
    """
    has_zeros = False
    if not isinstance(t, FakeTensor) and not t.is_floating_point():
        with _disable_current_modes():
            has_zeros = bool((t == 0).any())
    fake: Any = torch.empty(t.shape, dtype=t.dtype)
    fake._has_zeros = has_zeros
    return fake


def _value(t: Tensor) -> bool | float | int:
    says = getattr(t, "_says", None)
    if says is not None:
        return says
    constant = getattr(t, "constant", None)  # fake tensors keep the value of torch.tensor(x)
    if constant is not None:
        with _disable_current_modes():
            return constant.item()
    return True if t.dtype == torch.bool else 1.0 if t.is_floating_point() else 1


@contextmanager
def _without_values(mode: FakeTensorMode) -> Iterator[None]:
    """Put what needs values out of the way."""
    init_mesh = sharded.init_device_mesh
    next_global = BatchStream._next_global
    largest: dict[BatchStream, Any] = {}

    def init_device_mesh(*args: Any) -> Any:
        with _disable_current_modes():
            return init_mesh(*args)

    def next_batch(stream: BatchStream) -> Any:
        if stream not in largest:
            with _disable_current_modes():
                largest[stream] = max(_first_batches(stream, next_global), key=_numel)
        return map_tensors(_without_data, largest[stream])

    def gather_object(everyone: list, mine: Any, **_: Any) -> None:
        everyone[:] = [mine] * len(everyone)

    def refuse(spec: Any, module: nn.Module, *, name: str, **_: Any) -> None:
        raise ValueError(
            f"level {name!r}: engine DeepSpeed cannot be planned: its code needs data. Plan with engine=fsdp, whose "
            "shards have the sizes of stage 3; stages 1 and 2 hold whole weights on every rank beside them."
        )

    patches = [
        mock.patch.object(dist, "all_gather_object", gather_object),
        mock.patch.object(dist, "broadcast_object_list", lambda held, **_: None),
        mock.patch.object(rng.RNGState, "capture", classmethod(lambda cls, device: cls(None, None, device))),
        mock.patch.object(rng.RNGState, "restore", lambda self: None),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(sharded, "init_device_mesh", init_device_mesh),
        mock.patch.object(shards, "_dot", _dot),
        mock.patch.object(BatchStream, "_next_global", next_batch),
        mock.patch.object(ddp, "DistributedDataParallel", _SimulatedDDP),
        mock.patch.object(DeepSpeed, "wrap", refuse),
        # It would take fake tensors for tracing, in which it prepares for every kind of batch.
        mock.patch("transformers.utils.import_utils.is_fake_tensor", lambda tensor: False),
        _models_from_configuration(),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` by new parameters: torch would swap the old ones, which fake tensors refuse."""
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules() if recurse else [module]:
        for name, p in owner._parameters.items():
            if p is None:
                continue
            if id(p) not in made:
                with torch.no_grad():
                    value = function(p)
                made[id(p)] = p if value is p else nn.Parameter(value, p.requires_grad)
            owner._parameters[name] = made[id(p)]
        for name, b in owner._buffers.items():
            owner._buffers[name] = None if b is None else function(b)
    return module


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """As on the CPU, where pieces of 256 KiB are converted: nothing that counts is allocated."""
    return torch.dot(a.reshape(-1), b.reshape(-1)).double()


def _first_batches(stream: BatchStream, next_global: Any) -> Iterator[Any]:
    for number in range(NUM_BATCHES_LOOKED_AT):
        try:
            yield next_global(stream)
        except ValueError:
            if number == 0:
                raise
            return  # data that can be iterated once, and has fewer


def _numel(batch: Any) -> int:
    sizes: list[int] = []
    map_tensors(lambda t: sizes.append(t.numel()), batch)
    return sum(sizes)


def pretrained_depth(build: Any) -> int | None:
    """Layers of the first model that a function loads by ``AutoModel*.from_pretrained``, which is as far as it gets.

    Args:
        build: The function; it is run.

    Returns:
        Their number; None where it loads no model.
    """
    try:
        with simulation(1, accelerator=False), _models_from_configuration(only_depth=True):
            build()
    except _Depth as found:
        return found.num_layers
    return None


class _Depth(BaseException):
    def __init__(self, num_layers: int):
        super().__init__(num_layers)
        self.num_layers = num_layers


@contextmanager
def _models_from_configuration(*, only_depth: bool = False) -> Iterator[None]:
    """``AutoModel*.from_pretrained`` without weights, with :data:`depth` layers."""
    import transformers
    from transformers.models.auto import auto_factory

    def config_of(cls: Any, name: Any) -> Any:
        config = (getattr(cls, "config_class", None) or transformers.AutoConfig).from_pretrained(name)
        if only_depth:
            raise _Depth(config.num_hidden_layers)
        layers = depth.get()
        if layers is not None:
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None) is not None:
                config.layer_types = config.layer_types[:layers]
        return config

    def from_pretrained(cls: Any, name: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> nn.Module:
        make = cls.from_config if hasattr(cls, "from_config") else cls._from_config
        options = {k: v for k, v in kwargs.items() if k == "attn_implementation"}
        return make(config_of(cls, name), dtype=dtype or torch.float32, **options)

    classes = [transformers.PreTrainedModel, auto_factory._BaseAutoModelClass]
    overriding = [c for c in vars(transformers.models.auto.modeling_auto).values() if isinstance(c, type)]
    classes += [c for c in overriding if "from_pretrained" in vars(c) and c not in classes]
    with ExitStack() as stack:
        for cls in classes:
            stack.enter_context(mock.patch.object(cls, "from_pretrained", classmethod(from_pretrained)))
        yield


@contextmanager
def _on_accelerator(tracker: MemoryTracker) -> Iterator[None]:
    """What torch and the program do otherwise where the device is no CPU."""
    record = Trajectory.record

    def record_on_host(trajectory: Trajectory, step: Any, state: Any) -> None:
        with tracker.allocating(HOST):
            record(trajectory, step, state)

    def brought_back(trajectory: Trajectory, state: Any, gradient: Any) -> tuple[Any, Any]:
        return state.copied(torch.device("cpu")), gradient.clone()

    def put_away(trajectory: Trajectory, state: Any, gradient: Any) -> tuple[Any, Any]:
        with tracker.allocating(HOST):
            return brought_back(trajectory, state, gradient)

    def foreach(params: Any, differentiable: bool, use_fused: bool = False) -> tuple[bool, bool]:
        return False, True

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Trajectory, "record", record_on_host))
        stack.enter_context(mock.patch.object(Trajectory, "_put_away", put_away))
        stack.enter_context(mock.patch.object(Trajectory, "_brought_back", brought_back))
        stack.enter_context(mock.patch.object(shards, "_dot", shards.dot_on_accelerator))
        for name in ("adam", "sgd"):  # adamw runs adam
            optimizer = importlib.import_module(f"torch.optim.{name}")  # torch.optim hides its modules
            stack.enter_context(mock.patch.object(optimizer, "_default_to_fused_or_foreach", foreach))
        yield


@contextmanager
def _tagging(tracker: MemoryTracker) -> Iterator[None]:
    """Say of what is gathered for derivatives that it is."""
    unsplit = gather._unsplit

    def tagged(slot: Tensor, layout: gather.RowSharding) -> Tensor:
        full = unsplit(slot, layout)
        tracker.tag(full, "gathered")
        return full

    with mock.patch.object(gather, "_unsplit", tagged):
        yield


def _classify(program: Program, tracker: MemoryTracker) -> None:
    """Tag all that lives from one iteration to the next, and is on the device."""
    within = program.iteration.scheduler.residency
    for trainer in program.trainers.values():
        for name in states_of(trainer):
            # A view of a fake tensor that was evicted would give its storage the bytes back.
            is_away = within is not None and not within.states[name].is_resident
            if name.kind != "trajectory" and not is_away:
                for t in tensors_of(trainer, name.kind):
                    tracker.tag(t, KIND_OF_STATE[name.kind])
        for t in trainer.engine.module.buffers():
            tracker.tag(t, "weights")
        for bucket in getattr(getattr(trainer.engine, "_ddp", None), "buckets", ()):
            tracker.tag(bucket, "engine")


class _SimulatedDDP(nn.Module):
    """What ``DistributedDataParallel`` allocates and sends: one bucket copy of every gradient, all-reduced.

    Buckets of ``bucket_cap_mb`` (the first one of 1 MiB) live from the construction on. Gradients are copied into them
    and back, so that there are two copies; each bucket is all-reduced in place once per synchronised pass.
    """

    def __init__(self, module: nn.Module, *, bucket_cap_mb: float, **_: Any):
        super().__init__()
        self.module = module
        self.buckets: list[Tensor] = []
        self._hooked = False
        sizes: dict[torch.dtype, list[int]] = {}
        for p in reversed([p for p in module.parameters() if p.requires_grad]):
            groups = sizes.setdefault(p.dtype, [0])
            limit = 2**20 if len(groups) == 1 else bucket_cap_mb * 2**20
            if groups[-1] * p.element_size() >= limit:
                groups.append(0)
            groups[-1] += p.numel()
        for dtype, groups in sizes.items():
            self.buckets += [torch.empty(n, dtype=dtype) for n in groups]

    def forward(self, *inputs: Any) -> Any:
        """The module's forward; its backward ends with the reduction."""
        out = self.module(*inputs)
        out.register_hook(lambda _: self._queue())
        return out

    def _queue(self) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(self._reduce)

    def _reduce(self) -> None:
        if dist.is_initialized():
            for bucket in self.buckets:
                dist.all_reduce(bucket)
