"""Folders that runs write into, looked at before they take hours."""

import tempfile
from pathlib import Path


def check_writable(folder: str | Path, field: str) -> None:
    """Find out now whether a folder can be written to; what is made for that is removed again.

    Args:
        folder: It need not exist.
        field: What the user knows it as.

    Raises:
        ValueError: With the system's reason, if a file cannot be written there.
    """
    path = Path(folder)
    missing = [p for p in (path, *path.parents) if not p.exists()]  # deepest first
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"{field}={str(folder)!r} cannot be written to ({error.strerror or error}). Choose a folder that can, "
            "before hours of training end in it."
        ) from error
    finally:
        for made in missing:
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()
