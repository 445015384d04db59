"""What a run measures: losses per step, seconds and bytes per phase."""

import csv
import ctypes
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

FIRST_CALLS, EVERY_CALL = 3, 16
"""On the CPU the peak is measured in the first calls of each phase and in every so many-th: to measure takes up to a
millisecond, and pages that were given back have to be fetched again."""


@dataclass
class PhaseStats:
    """Time and memory of one phase of one level, summed over a run.

    Attributes:
        num_calls: How often it ran.
        wall_seconds: In all.
        cpu_seconds: In all, of every thread of the process.
        peak_bytes: The most in any call that was measured: all on accelerators, see :data:`EVERY_CALL` for the CPU.
        moved_bytes: Onto the device and off it, for the phase and before it.
        moved_seconds: Waited for that.
    """

    num_calls: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    moved_bytes: int = 0
    moved_seconds: float = 0.0

    def as_row(self) -> dict[str, float]:
        """Plain numbers."""
        return {
            "num_calls": self.num_calls,
            "wall_seconds": round(self.wall_seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "peak_bytes": self.peak_bytes,
            "moved_bytes": self.moved_bytes,
            "moved_seconds": round(self.moved_seconds, 3),
        }


@dataclass(repr=False)
class History:
    """Record of a run, on every rank.

    Attributes:
        steps: One dict per outer iteration: ``step``, and per level ``loss/<name>``, ``gradient_norm/<name>`` (before
            clipping) and ``lr/<name>``, means over the iteration; where its Hessian was asked for also ``hvps/<name>``,
            ``iterations/<name>`` and ``residual/<name>``; where the
            way of its mixed partial was open, ``ghost/<name>``: 1 for ghost products, 0 for the forward derivative.
        phases: Statistics by ``"<level>/<phase>"``.
        skipped: Number of skipped updates by ``"<level>/<phase>"`` where a value was not finite.
        solves: Number of solves by ``"<level>/<status>"`` that did not end as asked for.
        interrupted: Whether Ctrl-C ended the run early.
        resident_at_start: On the CPU, resident bytes of the process when its first phase began; 0 on accelerators,
            whose peaks are those of the allocator alone.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    phases: dict[str, PhaseStats] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    solves: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False
    resident_at_start: int | None = None

    def column(self, key: str) -> list[float]:
        """One value per outer iteration, for those that have it."""
        return [row[key] for row in self.steps if key in row]

    def to_pandas(self) -> Any:
        """The steps as a ``pandas.DataFrame``: one row per outer iteration, with its number as index.

        Raises:
            ImportError: Without pandas, with the command that installs it.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("History.to_pandas() needs pandas: pip install pandas") from error
        return pd.DataFrame(self.steps).set_index("step") if self.steps else pd.DataFrame()

    def __repr__(self) -> str:
        last = self.steps[-1] if self.steps else {}
        losses = ", ".join(f"{key} {value:.4g}" for key, value in last.items() if key.startswith("loss/"))
        return f"History of {len(self.steps)} outer iterations{': ' if losses else ''}{losses}"

    @contextmanager
    def phase(self, level: str, name: str, device: torch.device) -> Iterator[None]:
        """Time a phase and note its peak memory (allocated on the device; resident of the process on CPU).

        On the CPU, what the C allocator keeps for later is given back before, so that it is not part of the peak.
        """
        stats = self.phases.setdefault(f"{level}/{name}", PhaseStats())
        is_measured = device.type != "cpu" or stats.num_calls < FIRST_CALLS or stats.num_calls % EVERY_CALL == 0
        if is_measured:
            give_back_free_memory(device)
            reset_peak_bytes(device)
        if self.resident_at_start is None:
            self.resident_at_start = psutil.Process().memory_info().rss if device.type == "cpu" else 0
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            stats.num_calls += 1
            stats.wall_seconds += time.perf_counter() - wall
            stats.cpu_seconds += time.process_time() - cpu
            if is_measured:
                stats.peak_bytes = max(stats.peak_bytes, peak_bytes(device))

    def note_moves(self, level: str, name: str, num_bytes: int, seconds: float) -> None:
        """Add what was moved onto the device and off it for a phase that has run."""
        stats = self.phases[f"{level}/{name}"]
        stats.moved_bytes += num_bytes
        stats.moved_seconds += seconds

    def save(self, folder: str | Path) -> None:
        """Write ``history.csv`` (one row per step) and ``phases.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        keys = list(dict.fromkeys(key for row in self.steps for key in row))
        with open(folder / "history.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, keys)
            writer.writeheader()
            writer.writerows(self.steps)
        summary: dict[str, Any] = {name: stats.as_row() for name, stats in self.phases.items()}
        content: dict[str, Any] = {"phases": summary, "skipped": self.skipped, "solves": self.solves}
        content["resident_at_start"] = self.resident_at_start
        (folder / "phases.json").write_text(json.dumps(content, indent=2))


def give_back_free_memory(device: torch.device) -> None:
    """Have the C allocator return what is free to the system; accelerators count what is allocated, and need none."""
    if device.type == "cpu" and os.name == "posix":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
        if trim is not None:
            trim(0)


def reset_peak_bytes(device: torch.device) -> None:
    """Start a new measurement of peak memory, where the system allows it."""
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # resets VmHWM; see proc(5)


def peak_bytes(device: torch.device) -> int:
    """Peak since :func:`reset_peak_bytes`: allocated on a device, resident on the CPU.

    Where the peak of a process cannot be read (not Linux), the bytes resident now.
    """
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_allocated(device)
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return psutil.Process().memory_info().rss
