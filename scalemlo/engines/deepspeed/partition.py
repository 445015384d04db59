"""Every private attribute of DeepSpeed that scalemlo reads or sets; ``tests/test_deepspeed_contract.py`` checks them.

DeepSpeed partitions, gathers and reduces; it never steps. Its own step would need its own optimizer, while a level's
optimizer is the user's. So DeepSpeed is given an SGD that never runs, and its fp32 master shards are lent to the real
optimizer: :class:`Partition` says where they lie, takes the reduced gradients out, and publishes changed masters to the
weights that the module computes with.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...distributed.group import any_rank, rank, world_size
from .jit_locks import warn_of_stale_locks


def initialize(module: nn.Module, config: Mapping[str, Any], device: torch.device, level: str) -> "Partition":
    """Hand a module to DeepSpeed. Collective; there must be a process group.

    Args:
        module: Partitioned in place.
        config: DeepSpeed's configuration.
        device: Of this rank.
        level: Name for messages.

    Returns:
        The partitioned module.

    Raises:
        ValueError: If DeepSpeed is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # read once, at the first import
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"level {level!r}: engine DeepSpeed needs the package deepspeed. Install it with "
            "`pip install 'scalemlo[deepspeed]'`, or use engine=FSDP()."
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute, and a kill leaves a lock
    warn_of_stale_locks()
    stage = config["zero_optimization"]["stage"]
    trainable = [p for p in module.parameters() if p.requires_grad]
    # Stages 1 and 2 flatten and split whole groups: with a group per parameter every rank has a part of each of them.
    groups = [{"params": trainable}] if stage == 3 else [{"params": [p]} for p in trainable]
    with _launcher_variables(), _partitioning_optimizer():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=torch.optim.SGD(groups, lr=0.0), config=dict(config), dist_init_required=False
        )
    return (Stage3 if stage == 3 else Stages1And2)(engine, trainable, device)


def step_local_shards(optimizer: torch.optim.Optimizer) -> None:
    """Let DeepSpeed's own CPU optimizers step parameters that are DTensors: their kernels want plain tensors.

    Args:
        optimizer: Changed in place; others than DeepSpeed's are left alone.
    """
    kernel = getattr(optimizer, "ds_opt_adam", None)
    if kernel is not None:
        optimizer.ds_opt_adam = _OnLocalShards(kernel)  # ty: ignore[missing-attribute]


class _OnLocalShards:
    """A kernel of DeepSpeed whose calls get the local parts of DTensors."""

    def __init__(self, kernel: Any):
        self._kernel = kernel

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._kernel, name)
        return lambda *args: function(*(t.to_local() if isinstance(t, DTensor) else t for t in args))


@contextmanager
def _launcher_variables() -> Iterator[None]:
    """Under plain ``python`` DeepSpeed would look for MPI."""
    os.environ.setdefault("LOCAL_RANK", "0")  # read in every backward pass
    wanted = {"RANK": rank(), "WORLD_SIZE": world_size(), "MASTER_ADDR": "127.0.0.1"}
    missing = {key: str(value) for key, value in wanted.items() if key not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for key in missing:
            os.environ.pop(key, None)


@contextmanager
def _partitioning_optimizer() -> Iterator[None]:
    """For bf16 at stage 1 DeepSpeed would take an optimizer that keeps its masters otherwise; have ZeRO's."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    choose = DeepSpeedEngine._do_optimizer_sanity_check
    DeepSpeedEngine._do_optimizer_sanity_check = lambda self, basic_optimizer: ZERO_OPTIMIZATION
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


class Partition(ABC):
    """A module that DeepSpeed partitioned, seen parameter by parameter.

    Args:
        engine: Of DeepSpeed.
        trainable: The trainable parameters of the module, which stay the same objects.
        device: Where the module computes.
    """

    def __init__(self, engine: Any, trainable: list[nn.Parameter], device: torch.device):
        self._engine, self._optimizer = engine, engine.optimizer
        self._trainable = trainable
        self._device = device
        offload = engine.zero_offload_optimizer()
        self.is_offloaded = offload is not None and offload.device == "cpu"
        """Whether masters and reduced gradients lie in host memory."""
        self.reached: set[nn.Parameter] = set()
        """Trainable parameters with a gradient since the last :meth:`clear`."""
        for p in trainable:
            p.register_post_accumulate_grad_hook(self.reached.add)

    @property
    @abstractmethod
    def masters(self) -> list[Tensor]:
        """Flat fp32 master shards as DeepSpeed holds them."""

    @abstractmethod
    def local(self, p: nn.Parameter) -> Tensor:
        """This rank's part of a parameter, flat: a view of the master, or of the weights if it is frozen."""

    @abstractmethod
    def published(self, p: nn.Parameter) -> Tensor:
        """What this rank holds of a parameter to compute with, between two passes."""

    @abstractmethod
    def shape(self, p: nn.Parameter) -> torch.Size:
        """The shape of the whole parameter."""

    @abstractmethod
    def flat_numel(self, p: nn.Parameter) -> int:
        """Entries of the whole parameter that the ranks' parts of a trainable one make up, padding included."""

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Parts of the reduced gradients (mean over ranks) of the reached parameters, alive until :meth:`clear`."""
        if self.is_offloaded and self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)  # copies to pinned memory do not wait
        return {p: self._gradient(p) for p in self.reached}

    @abstractmethod
    def _gradient(self, p: nn.Parameter) -> Tensor:
        """This rank's part of the reduced gradient."""

    @abstractmethod
    def publish(self) -> None:
        """Copy the masters to the weights that the module computes with, where they differ. Collective.

        Masters are compared, not watched: optimizers and checkpoints write through aliases that count no versions.
        """

    @abstractmethod
    def _is_boundary(self, last: bool) -> bool:
        """Whether DeepSpeed should take a micro-batch for the last one of a window."""

    @abstractmethod
    def _reduce(self, *, last: bool) -> None:
        """Reduce what the backward just finished has left."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all gradients."""

    @contextmanager
    def backward_pass(self, *, last: bool) -> Iterator[None]:
        """Context of forward and backward: DeepSpeed's hooks collect, and what is left is reduced at the end.

        Args:
            last: Whether this ends an accumulation window.
        """
        optimizer = self._optimizer
        optimizer.clear_backward_seen_flag()
        optimizer.set_gradient_accumulation_boundary(self._is_boundary(last))
        # Its hooks would end the pass by themselves, after the first of several backwards; we end it below.
        self._engine._running_engine_backward = True
        try:
            yield
            self._reduce(last=last)
            optimizer.backward_epilogue()
        except BaseException:
            self.clear()
            raise
        finally:
            self._engine._running_engine_backward = False

    def repartition(self) -> None:
        """Free gathered weights."""
        return None


class Stage3(Partition):
    """Weights, gradients and masters in pieces: of each parameter every rank holds 1/W of the flattened entries.

    Parameters are ``Any`` where attributes that DeepSpeed gives them are read.
    """

    def __init__(self, engine: Any, trainable: list[nn.Parameter], device: torch.device):
        self._places: dict[nn.Parameter, tuple[int, int, int]] = {}  # (sub-group, offset in it, offset over all)
        first = 0
        for i, group in enumerate(engine.optimizer.fp16_groups):
            offset = 0
            for p in group:
                self._places[p] = (i, offset, first + offset)
                offset += p.partition_numel()
            first += offset
        super().__init__(engine, trainable, device)
        for master in self.masters:
            master.grad = None  # of DeepSpeed's own step, where it offloads
        self.clear()

    @property
    def masters(self) -> list[Tensor]:
        """See :attr:`Partition.masters`; one per sub-group."""
        return self._optimizer.fp32_partitioned_groups_flat

    def local(self, p: Any) -> Tensor:
        """See :meth:`Partition.local`; without the padding of the last ranks."""
        if p not in self._places:
            return p.ds_tensor.detach()[: self._rows(p)]
        i, offset, _ = self._places[p]
        return self.masters[i].detach().narrow(0, offset, self._rows(p))

    def published(self, p: Any) -> Tensor:
        """See :meth:`Partition.published`; its part."""
        return p.ds_tensor

    def shape(self, p: Any) -> torch.Size:
        """See :meth:`Partition.shape`."""
        return torch.Size(p.ds_shape)

    def flat_numel(self, p: Any) -> int:
        """See :meth:`Partition.flat_numel`; no padding."""
        return p.ds_numel

    def _gradient(self, p: nn.Parameter) -> Tensor:
        return self._optimizer.grad_partitions_flat_buffer.narrow(0, self._places[p][2], self._rows(p))

    def repartition(self) -> None:
        """See :meth:`Partition.repartition`."""
        self._optimizer._partition_all_parameters()

    def clear(self) -> None:
        """See :meth:`Partition.clear`."""
        optimizer = self._optimizer
        optimizer.zero_grad()
        self._drop_buckets()
        # DeepSpeed's first micro-batch overwrites the buffer and later ones add to it; a parameter that the first one
        # does not reach would be added to the last step's gradient. So all of them add, to zero.
        optimizer.grad_partitions_flat_buffer.zero_()
        optimizer.micro_step_id = 1
        self.reached.clear()

    def _drop_buckets(self) -> None:
        for bucket in self._optimizer.ipg_buckets.values():  # of a pass that failed half way
            bucket.params.clear()
            bucket.elements, bucket.process_group = 0, None

    def _is_boundary(self, last: bool) -> bool:
        return False  # it would copy offloaded gradients once more, for its own step

    def _reduce(self, *, last: bool) -> None:
        self._optimizer.overlapping_partition_gradients_reduce_epilogue()

    @torch.no_grad()
    def publish(self) -> None:
        """See :meth:`Partition.publish`."""
        optimizer = self._optimizer
        self.repartition()
        for i, master in enumerate(self.masters):
            optimizer.fp16_partitioned_groups_flat[i].data.copy_(master)
            optimizer._unflatten_partitioned_parameters(i)
        optimizer.invalidate_secondary_tensor()

    def _rows(self, p: Any) -> int:
        chunk = p.partition_numel()
        return max(0, min(chunk, p.ds_numel - chunk * rank()))


class Stages1And2(Partition):
    """Whole weights on every rank, masters (and gradients, from stage 2) in pieces."""

    def __init__(self, engine: Any, trainable: list[nn.Parameter], device: torch.device):
        self._groups = {group[0]: i for i, group in enumerate(engine.optimizer.bit16_groups)}
        super().__init__(engine, trainable, device)
        self.clear()

    @property
    def masters(self) -> list[Tensor]:
        """See :attr:`Partition.masters`; one per parameter."""
        return self._optimizer.single_partition_of_fp32_groups

    def local(self, p: nn.Parameter) -> Tensor:
        """See :meth:`Partition.local`; with the padding of the last ranks."""
        if p in self._groups:
            return self.masters[self._groups[p]].detach()
        chunk = -(-p.numel() // world_size())
        return p.detach().view(-1)[chunk * rank() : chunk * (rank() + 1)]

    def published(self, p: nn.Parameter) -> Tensor:
        """See :meth:`Partition.published`; all of it."""
        return p

    def shape(self, p: nn.Parameter) -> torch.Size:
        """See :meth:`Partition.shape`."""
        return p.shape

    def flat_numel(self, p: nn.Parameter) -> int:
        """See :meth:`Partition.flat_numel`."""
        return self.local(p).numel() * world_size() if p in self._groups else p.numel()

    def _gradient(self, p: nn.Parameter) -> Tensor:
        i = self._groups[p]
        if self.is_offloaded:
            gradient = self.masters[i].grad
            assert gradient is not None, "DeepSpeed makes one for each offloaded master"
            return gradient
        part = torch.cat([t.reshape(-1) for t in self._optimizer.averaged_gradients[i]])
        return nn.functional.pad(part, (0, self.masters[i].numel() - part.numel()))

    def clear(self) -> None:
        """See :meth:`Partition.clear`."""
        optimizer = self._optimizer
        optimizer.zero_grad()
        for held in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for key in list(held):
                held[key] = None
        if self.is_offloaded:
            self._clear_offloaded()
        self.reached.clear()

    def _clear_offloaded(self) -> None:
        """All micro-batches add to zero, see :meth:`Stage3.clear`."""
        optimizer = self._optimizer
        for t in [*optimizer.accumulated_grads_in_cpu.values(), *map(self._gradient, self._groups)]:
            t.zero_()
        optimizer._offload_accumulated_param_ids.clear()
        optimizer.micro_step_id = 1

    def _is_boundary(self, last: bool) -> bool:
        # Stage 2 would offload the gradients of the parameters that the last micro-batch reached, not of all.
        return last and not (self.is_offloaded and self._engine.zero_optimization_partition_gradients())

    def _reduce(self, *, last: bool) -> None:
        self._optimizer.setup_buckets()  # they are not there where no parameter was reached
        if self._engine.zero_optimization_partition_gradients():
            self._optimizer.overlapping_partition_gradients_reduce_epilogue()
            if last and self.is_offloaded:
                self._optimizer.finalize_gradient_accumulation_boundary()
        elif last:
            self._optimizer.reduce_gradients()

    @torch.no_grad()
    def publish(self) -> None:
        """See :meth:`Partition.publish`."""
        from deepspeed.runtime.utils import all_gather_dp_groups

        optimizer = self._optimizer
        mine = [parts[rank()] for parts in optimizer.parallel_partitioned_bit16_groups]
        is_stale = False
        for weights, master in zip(mine, self.masters, strict=True):
            wanted = master.to(weights)  # dtype and device
            if not torch.equal(weights, wanted):
                weights.data.copy_(wanted)
                is_stale = True
        if not any_rank(is_stale):
            return
        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )
