"""Speed and memory of one size: a stage of the kit, in a process of its own.

    python benchmarks/gpu/speed.py --size 135M --device cuda [--variants plain,ghost] [--seconds 60]

``plain_gradient`` and ``plain_step`` are plain PyTorch: forward and backward of the losses under autocast, and AdamW.
A program's time is that of an outer iteration; ``over_plain`` is it over the plain steps that it contains, K lower
steps and the gradient of the upper loss. Of a Hessian-vector product it is in plain gradients. MFU counts 6 N FLOPs per
token that is read, no matter what is done with it, so that it falls where derivatives take more. Peaks are the
allocator's, after the first two iterations: weights, moments and the workspaces of libraries included.

A batch that does not fit is halved; ratios are per token.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import psutil
import torch
from device import choose, memory_bytes, peak_flops, seconds_of
from models import PROGRAMS, SIZES, Size, batch_of, model_of, program_of
from results import say

import scalemlo as mlo
from scalemlo.derivatives.hessian import RetainedHessian, hessian
from scalemlo.hf.losses.next_token import example_losses
from scalemlo.history import give_back_free_memory, peak_bytes, reset_peak_bytes

PLAIN = ("plain_step", "plain_gradient")
PRODUCTS = ("hvp_remat", "hvp_retain", "hvp_retain_further")
VARIANTS = (
    *PLAIN,
    "ghost",
    "sama",
    "forward",
    "hvp_remat",
    "neumann_3",
    "hvp_retain",
    "hvp_retain_further",
    "unrolled_8",
)


@dataclass
class Measured:
    """One variant."""

    seconds: float
    peak_bytes: int
    num_batches: int  # read in that time


class Stopwatch:
    """Measures calls on a device.

    Args:
        device: That computes.
        allowance_seconds: For the timed calls of one variant.
    """

    def __init__(self, device: torch.device, allowance_seconds: float):
        self.device, self.allowance_seconds = device, allowance_seconds
        self._before = 0
        if device.type == "cpu":  # of the process: what it has already does not count
            give_back_free_memory(device)
            self._before = psutil.Process().memory_info().rss

    def measure(self, function: Callable[[], object], num_batches: int, history: mlo.History | None = None) -> Measured:
        """Two calls to warm up (one where they are slow), then the median of some; the peak is that of the latter.

        Args:
            function: To call.
            num_batches: That a call reads.
            history: Of a program, whose phases each start the account of the peak anew.
        """
        start = time.monotonic()
        function()
        if time.monotonic() - start < 2 * self.allowance_seconds:
            function()
        if history is not None:
            history.phases.clear()
        give_back_free_memory(self.device)
        reset_peak_bytes(self.device)
        seconds = seconds_of(function, self.device, allowance_seconds=self.allowance_seconds)
        peaks = [peak_bytes(self.device)] if history is None or self.device.type != "cpu" else []
        peaks += [stats.peak_bytes for stats in history.phases.values()] if history is not None else []
        return Measured(statistics.median(seconds), max(max(peaks) - self._before, 0), num_batches)


def plain(watch: Stopwatch, size: Size, batch: int, *, steps: bool) -> Measured:
    """By plain PyTorch."""
    model, device = model_of(size, watch.device), watch.device
    data = {name: t.to(device) for name, t in batch_of(size, batch, 2).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def gradient() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            losses = example_losses(model, data)
        losses.mean().backward()
        if steps:
            optimizer.step()
        optimizer.zero_grad()

    return watch.measure(gradient, 1)


def program(watch: Stopwatch, size: Size, batch: int, *, name: str, **options) -> Measured:
    """Outer iterations of a program."""
    variant = PROGRAMS[name]
    found = program_of(size, variant, batch, watch.device, **options)
    return watch.measure(found.step, variant.unroll_steps + 1, found.history)


def product(watch: Stopwatch, size: Size, batch: int, *, name: str) -> Measured:
    """One Hessian-vector product of the lower loss."""
    built = program_of(size, PROGRAMS["forward"], batch, watch.device, verify="off")
    built.iteration.ticks.fetch(list(built.trainers.values()))
    lower = built.trainers["finetune"]
    loss, v = lower.loss_at(), lower.weights().map(torch.randn_like)
    if name == "hvp_retain_further":
        kept = RetainedHessian(loss, lower.block)
        found = watch.measure(partial(kept, v), 1)
        kept.free()
        return found

    def once() -> None:
        with hessian(loss, lower.block, name.removeprefix("hvp_")) as operator:
            operator(v)

    return watch.measure(once, 1)


def one(watch: Stopwatch, size: Size, batch: int, name: str) -> Measured:
    """One variant at one batch size."""
    if name in PLAIN:
        return plain(watch, size, batch, steps=name == "plain_step")
    if name in PRODUCTS:
        return product(watch, size, batch, name=name)
    try:
        return program(watch, size, batch, name=name)
    except mlo.DerivativeError as error:  # derivatives are compared with the live modules in the first iteration
        say(failed=[f"verification of {name}, {size.shape['hidden_size']} wide", str(error)])
    return program(watch, size, batch, name=name, verify="off")


def host_obstacle(size: Size, name: str) -> str | None:
    """Why a variant does not fit the host's memory, where unrolling keeps states of the lower level."""
    steps = PROGRAMS[name].unroll_steps if name in PROGRAMS else 1
    kept = 2 * math.ceil(math.sqrt(steps)) * 12 * size.num_parameters()  # fp32 weights and moments
    free = psutil.virtual_memory().available
    if steps == 1 or kept < 0.75 * free:
        return None
    return f"it keeps up to {kept / 2**30:.0f} GiB of states in the host's memory, and {free / 2**30:.0f} GiB are free"


def largest(watch: Stopwatch, size: Size, name: str) -> tuple[int, Measured] | str:
    """A variant at the largest batch that fits, or why there is none."""
    batch = size.batch
    while batch:
        try:
            return batch, one(watch, size, batch, name)
        except torch.OutOfMemoryError as error:
            why = str(error).split(". ")[0]
        free(watch.device)  # after the except clause, which holds the frames
        batch //= 2
    return f"out of memory with one sequence: {why}"


def free(device: torch.device) -> None:
    """Give memory back, to start the next variant from none."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def report(label: str, size: Size, name: str, batch: int, found: Measured, per_token: dict[str, float]) -> None:
    """Say the figures of one variant; plain seconds per token are kept for the ratios of those that follow."""
    tokens = batch * size.length * found.num_batches
    figures = {
        "batch": batch,
        "milliseconds": found.seconds * 1e3,
        "tokens_per_second": tokens / found.seconds,
        "peak_gib": found.peak_bytes / 2**30,
    }
    per_token[name] = found.seconds / (batch * size.length)
    speed = peak_flops(choose_device())
    if speed is not None:
        figures["mfu"] = 6 * size.num_parameters(in_products=True) * tokens / found.seconds / speed
    step, gradient = (per_token.get(n) for n in PLAIN)
    if name not in PLAIN and step is not None and gradient is not None:
        contained = gradient if name in PRODUCTS else (found.num_batches - 1) * step + gradient
        figures["over_plain"] = per_token[name] / contained
    say(figures={f"speed/{label}/{name}/{key}": value for key, value in figures.items()})


def choose_device() -> torch.device:
    """The one that this process was told to use; the end where there is none."""
    device = choose(OPTIONS.device)
    if isinstance(device, str):
        sys.exit(f"speed.py: {device}")
    return device


def main() -> None:
    """Measure one variant after the other while time is left."""
    device = choose_device()
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    size = SIZES[OPTIONS.size].fitted(OPTIONS.free_bytes or memory_bytes(device))
    if isinstance(size, str):
        say(skipped=[f"Llama {OPTIONS.size}", size])
        return
    facts = {"parameters": size.num_parameters(), "layers": size.shape["num_hidden_layers"], "length": size.length}
    say(figures={f"speed/{OPTIONS.size}/{key}": value for key, value in facts.items()})
    end, slowest, per_token = time.monotonic() + OPTIONS.seconds, 0.0, {}
    for name in OPTIONS.variants.split(","):
        left, start = end - time.monotonic(), time.monotonic()
        if left < slowest:
            why = f"{left:.0f} s are left, and the slowest before it took {slowest:.0f} s"
            say(skipped=[f"Llama {OPTIONS.size}, {name}", why])
            continue
        print(f"{name}: {left:.0f} s left", flush=True)
        found = host_obstacle(size, name) or largest(Stopwatch(device, min(OPTIONS.seconds / 12, 8.0)), size, name)
        if isinstance(found, str):
            say(skipped=[f"Llama {OPTIONS.size}, {name}", found])
        else:
            report(OPTIONS.size, size, name, *found, per_token)
            slowest = max(slowest, time.monotonic() - start)
        free(device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", required=True, choices=SIZES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="one after the other")
    parser.add_argument("--seconds", type=float, default=120.0, help="after these no further variant is begun")
    parser.add_argument("--free-bytes", type=int, help="of the device, which says how many layers fit; else those now")
    OPTIONS = parser.parse_args()
    main()
