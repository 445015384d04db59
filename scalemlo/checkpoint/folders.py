"""Folders of checkpoints: which are complete, which are left over, how one becomes complete."""

import os
import re
import shutil
from pathlib import Path

from .files import MANIFEST, flush_folder

_COMPLETE = re.compile(r"step-\d{6,}")
_LEFT_OVER = re.compile(r"step-\d{6,}\.(tmp|old)")


def folder_of_step(folder: Path, num_steps: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return folder / f"step-{num_steps:06d}"


def partial_of(final: Path) -> Path:
    """Where it is written before it is complete."""
    return final.with_name(f"{final.name}.tmp")


def step_of(path: Path) -> int:
    """The inverse of :func:`folder_of_step`."""
    return int(path.name.removeprefix("step-"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder that were written to the end, oldest first; none where there is no folder."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _COMPLETE.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at a path: itself, or the latest complete one in it.

    Args:
        path: A checkpoint, or a folder of them.

    Returns:
        Its folder.

    Raises:
        ValueError: If there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint: {str(path)!r} is no folder. Leave resume out to start a run.")
    if (path / MANIFEST).is_file() and not _LEFT_OVER.fullmatch(path.name):
        return path
    found = complete_checkpoints(path)
    if not found:
        unfinished = sorted(p.name for p in path.iterdir() if _LEFT_OVER.fullmatch(p.name))
        rest = f" ({', '.join(unfinished)}: not finished)" if unfinished else ""
        raise ValueError(f"there is no complete checkpoint in {str(path)!r}{rest}. Leave resume out to start a run.")
    return found[-1]


def older(path: Path) -> str:
    """What else could be loaded, for messages."""
    found = complete_checkpoints(path.parent)
    before = [p for p in found if not _COMPLETE.fullmatch(path.name) or step_of(p) < step_of(path)]
    if not before:
        return "There is no older checkpoint beside it."
    return f"There is an older checkpoint: {before[-1]}; give its path to resume or load."


def make_room(final: Path) -> None:
    """Remove what killed runs left, and make the folder that a checkpoint is written to first.

    Args:
        final: The checkpoint's folder in the end.

    Raises:
        ValueError: If it is there already.
    """
    if final.exists():
        raise ValueError(f"{final} exists already: this step was saved. Give another folder, or remove it.")
    final.parent.mkdir(parents=True, exist_ok=True)
    for path in final.parent.iterdir():
        if _LEFT_OVER.fullmatch(path.name):  # of a run that was killed while it wrote or removed
            shutil.rmtree(path)
    partial_of(final).mkdir()


def complete(final: Path) -> None:
    """Give a checkpoint, written and flushed, its final name."""
    partial = partial_of(final)
    flush_folder(partial)
    os.rename(partial, final)
    flush_folder(final.parent)


def keep_latest(folder: Path, limit: int | None) -> None:
    """Remove all complete checkpoints but the latest ones."""
    for path in complete_checkpoints(folder)[: -limit if limit is not None else 0]:
        doomed = path.with_name(f"{path.name}.old")
        os.rename(path, doomed)  # half removed it must not look complete
        shutil.rmtree(doomed)
