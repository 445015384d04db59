"""Left-over locks of torch's extension builder, on which a later build waits for ever and says nothing.

torch compiles an extension (DeepSpeed's CPU optimizers are some) in a folder of its own and holds a file ``lock`` in it
meanwhile. A build that is killed leaves the file. Nothing in the file names its holder, but a build runs ``ninja`` and
compilers inside the folder and writes objects there: a lock is taken for a left-over one if no process of this machine
works in its folder and nothing in it has changed for a while (another machine may build in a shared home directory).
"""

import os
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import psutil
import torch

MINUTES = 10.0
"""For how long nothing may change in the folder of a build that runs; a single file compiles in less."""


def extensions_folder() -> Path:
    """Where torch builds extensions: ``TORCH_EXTENSIONS_DIR``, or the folder for this Python and device."""
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    from torch.utils.cpp_extension import get_default_build_root  # needs setuptools and speaks of CUDA when imported

    rocm, cuda = torch.version.hip, torch.version.cuda
    device = f"rocm{rocm.replace('.', '')}" if rocm else f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    return Path(get_default_build_root()) / f"py{sys.version_info[0]}{sys.version_info[1]}{sys.abiflags}_{device}"


def stale_locks(folder: Path, *, minutes: float = MINUTES) -> list[Path]:
    """Locks that no running build holds, as far as can be known.

    Args:
        folder: With a folder per extension.
        minutes: See :data:`MINUTES`.

    Returns:
        The lock files.
    """
    quiet = [lock for lock in sorted(folder.glob("*/lock")) if _minutes_unchanged(lock.parent) > minutes]
    busy = _working_folders() if quiet else []
    return [lock for lock in quiet if not any(cwd.is_relative_to(lock.parent.resolve()) for cwd in busy)]


def warn_of_stale_locks() -> None:
    """Warn of each lock, once per machine. They do no harm unless this run builds the same extension."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    for lock in stale_locks(extensions_folder()):
        warnings.warn(
            f"{lock} is left from a build that was killed ({_minutes_unchanged(lock.parent):.0f} minutes without a "
            f"change, no process works there). If this run needs {lock.parent.name!r}, it will hang. The way out: "
            f"rm {lock}",
            RuntimeWarning,
            stacklevel=2,
        )


def _minutes_unchanged(folder: Path) -> float:
    changed = 0.0
    for path in (folder, *folder.iterdir()):
        with suppress(FileNotFoundError):  # a build that has just finished
            changed = max(changed, path.stat().st_mtime)
    return (time.time() - changed) / 60


def _working_folders() -> list[Path]:
    """Working directories of the processes that we may look at."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found.append(Path(process.cwd()))
    return found
