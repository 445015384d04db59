"""Where a run came from: what ``run.yaml`` keeps beside the configuration, and how a replay differs."""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import psutil

from ..distributed.group import default_device, world_size

PACKAGES = ("scalemlo", "torch", "transformers", "accelerate", "peft", "deepspeed", "datasets", "safetensors", "numpy")
"""Whose versions may change a run's numbers."""


@dataclass(kw_only=True)
class Provenance:
    """Written by a run, ignored by a replay but for a warning where versions or the number of processes differ.

    Args:
        date: When it began, UTC.
        command: The command line.
        git_sha: Commit of the repository the run was started in, with ``-dirty`` after it where tracked files had
            changes; null outside of one.
        world_size: Number of processes.
        device: Of rank 0.
        versions: Version by package, and ``python``.
    """

    __pydantic_config__ = {"extra": "forbid"}
    date: str
    command: str
    world_size: int
    device: str
    git_sha: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def here(cls) -> "Provenance":
        """Of the process that runs."""
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=" ".join(sys.orig_argv),
            git_sha=git_sha(),
            world_size=world_size(),
            device=device_name(),
            versions=versions(PACKAGES),
        )

    def differences(self) -> list[str]:
        """How this process differs from the one that is described, one line each."""
        now = versions(PACKAGES)
        names = [n for n in {**self.versions, **now} if self.versions.get(n) != now.get(n)]
        lines = [f"{n}: {self.versions.get(n, 'not installed')} then, {now.get(n, 'not installed')} now" for n in names]
        # Before the process group exists, the launcher's variable is what counts.
        processes = max(world_size(), int(os.environ.get("WORLD_SIZE", "1")))
        if processes != self.world_size:
            lines.append(f"processes: {self.world_size} then, {processes} now")
        return lines


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of the packages that are installed, and of Python."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """The accelerator's name, or the CPU's architecture and number of cores."""
    import torch

    device = default_device()
    if device.type == "cpu":
        return f"cpu ({platform.machine()}, {psutil.cpu_count()} cores)"
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else str(device)


def git_sha() -> str | None:
    """Commit of the repository around the working directory, ``-dirty`` with changes; None without one."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return None
    return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
