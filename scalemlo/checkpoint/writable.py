"""Folders that runs write into, looked at before they take hours."""

import os
import tempfile
from pathlib import Path


def check_writable(folder: str | Path, field: str) -> None:
    """Find out now whether a folder can be written to, and leave everything as it was.

    Every rank of a run asks at once, so the folder itself is never made and removed: what would have to be made is
    tried under a name of this process's own, in the deepest folder that exists.

    Args:
        folder: It need not exist.
        field: What the user knows it as.

    Raises:
        ValueError: With the system's reason, if a file cannot be written there.
    """
    path = Path(folder).absolute()
    existing = next(p for p in (path, *path.parents) if os.path.lexists(p))
    try:
        if existing == path:
            with tempfile.TemporaryFile(dir=path):
                return
        with tempfile.TemporaryDirectory(dir=existing) as own:
            (Path(own) / path.relative_to(existing)).mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"{field}={str(folder)!r} cannot be written to ({error.strerror or error}). Choose a folder that can, "
            "before hours of training end in it."
        ) from error
