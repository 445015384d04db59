"""The process group: who we are, and the few collectives the mathematics needs.

Every collective here treats "no process group" as a group of one, so the same code runs under plain ``python``,
``torchrun`` and ``accelerate launch``. All of them are collective: every rank calls them, in the same order.
"""

import os
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """Rank of this process in the default group (0 without one)."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the default group (1 without one)."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process writes files and prints for all."""
    return rank() == 0


def default_device() -> torch.device:
    """The accelerator of this process (``LOCAL_RANK`` picks it), or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true"):
        return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def initialize(device: torch.device | None = None, *, timeout_seconds: float = 1800.0) -> torch.device:
    """Join the default process group when a launcher started us; do nothing otherwise.

    Args:
        device: Device of this rank; by default :func:`default_device`.
        timeout_seconds: How long a collective may wait for the other ranks.

    Returns:
        The device of this rank.
    """
    device = device or default_device()
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(_backend(device), timeout=timedelta(seconds=timeout_seconds))
    return device


def ensure_group(device: torch.device) -> None:
    """Make a group of one where an engine insists on a process group and no launcher made one."""
    if not dist.is_initialized():
        store = dist.FileStore(os.path.join(tempfile.mkdtemp(prefix="scalemlo-"), "store"), 1)
        dist.init_process_group(_backend(device), store=store, rank=0, world_size=1)


def check_launch(requested: int | None) -> None:
    """Compare the number of processes with the number that was asked for.

    On a machine without GPUs some launch commands start one process where two were asked for; without this check
    the run would silently train on half the batch.

    Args:
        requested: The world size the user asked for, or None where nothing was asked.

    Raises:
        ValueError: If another number of processes is running.
    """
    if requested is not None and requested != world_size():
        raise ValueError(
            f"num_processes={requested} was asked for, but {world_size()} process(es) are running. On CPU, "
            "`accelerate launch --num_processes N` may start a single one: use "
            f"`--launch ddp --num-processes {requested}` or `torchrun --nproc-per-node {requested} -m scalemlo ...`."
        )


def communication_device() -> torch.device:
    """Where a tensor must lie for the default group to communicate it."""
    return torch.device("cpu") if dist.get_backend() == "gloo" else default_device()


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over all ranks, differentiable in both modes: the adjoint and the tangent are all-reduced sums too.

    Args:
        x: Tensor of the same shape on every rank.

    Returns:
        A new tensor, equal on every rank.
    """
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def all_reduce_mean_(x: Tensor) -> Tensor:
    """Mean over all ranks, in place, outside autograd."""
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank; equal on every rank."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=communication_device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather_objects(value: T, group: "dist.ProcessGroup | None" = None) -> list[T]:
    """Plain values of all ranks, in order, on every rank; over a group of all of them, or the default one."""
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, value, group=group)
    return everyone


def check_same_on_all_ranks(lines: Sequence[str]) -> None:
    """Compare what every rank is about to run; ranks that differ would wait for each other for ever.

    Args:
        lines: A description, one fact a line.

    Raises:
        ValueError: On all ranks, naming the first fact that differs.
    """
    if world_size() == 1:
        return
    everyone = gather_objects(list(lines))
    for other, theirs in enumerate(everyone):
        if list(theirs) != list(everyone[0]):
            pairs = zip_longest(everyone[0], theirs, fillvalue="nothing")
            first, second = next((a, b) for a, b in pairs if a != b)
            raise ValueError(
                f"the ranks run different programs: rank 0 has {first}, rank {other} has {second}. Build the program "
                "the same way everywhere; let ranks differ in data order or device only."
            )


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _AllReduceSum.apply(grad)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return _AllReduceSum.apply(tangent)


def _backend(device: torch.device) -> str:
    return "gloo" if device.type == "cpu" else dist.get_default_backend_for_device(device)
