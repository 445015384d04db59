"""What the benchmarks share: arguments, fresh processes for clean measurements, figures."""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# An allocator that gives memory back at once, so that resident bytes are bytes in use; it costs time.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# An allocator that keeps freed memory, so that time is not spent in the kernel's page faults.
STEADY_TIME = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def arguments(description: str | None) -> argparse.Namespace:
    """``--quick``, ``--json PATH`` and, for processes the script starts itself, ``--worker JSON``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 45 seconds on two cores, noisier")
    parser.add_argument("--json", type=Path, help="write the figures to this file, one flat object")
    parser.add_argument(
        "--peers-python",
        default=os.environ.get("SCALEMLO_PEERS_PYTHON", sys.executable),
        help="interpreter that has requirements-peers.txt; by default $SCALEMLO_PEERS_PYTHON, else this one",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_fresh_process(
    script: str, environment: Mapping[str, str], *, python: str = sys.executable, **options
) -> list[dict]:
    """Run ``script --worker <options>`` on one thread and return the JSON list on its last line."""
    command = [python, "-W", "ignore", script, "--worker", json.dumps(options)]
    result = subprocess.run(command, env={**os.environ, **ONE_THREAD, **environment}, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in forked processes that form one gloo group (none where ``world_size`` is 1).

    Each call starts from the memory of this process, with everything imported. This process must not have computed
    anything with torch before: threads do not survive a fork.

    Returns:
        What the first rank returned.

    Raises:
        RuntimeError: If a rank failed.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        arguments = (world_size, os.path.join(folder, "store"), sender, function, args)
        ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(world_size)]
        for process in ranks:
            process.start()
        sender.close()
        try:
            result = receiver.recv()
        except EOFError:  # every rank has ended
            result = None
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"exit codes of the ranks: {[process.exitcode for process in ranks]}")
    return result


def _rank(rank: int, world_size: int, store: str, sender: Any, function: Callable[..., Any], args: tuple) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    result = function(*args)
    if rank == 0:
        sender.send(result)
    if dist.is_initialized():
        dist.destroy_process_group()


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU-seconds of this process, all threads, that a call takes."""
    start = time.process_time()
    function()
    return time.process_time() - start


def resident_bytes() -> int:
    """Of this process now (Linux)."""
    gc.collect()
    return _status_bytes("VmRSS")


def peak_growth_bytes(function: Callable[[], Any], over: int | None = None) -> int:
    """The most resident bytes during a call over those before it, or over others (Linux); wants ``EXACT_MEMORY``.

    Where scalemlo runs in it and is imported already, its phases do not start the kernel's account anew meanwhile.
    """
    gc.collect()
    tracking = sys.modules.get("scalemlo.history")
    held = nullcontext() if tracking is None else mock.patch.object(tracking, "reset_peak_bytes", lambda device: None)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets VmHWM; see proc(5)
    before = _status_bytes("VmRSS") if over is None else over
    with held:
        function()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field + ":"))


def machine() -> str:
    """One line about the machine."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            model = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def write_figures(path: Path | None, figures: Mapping[str, float]) -> None:
    """Write one flat JSON object."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")
