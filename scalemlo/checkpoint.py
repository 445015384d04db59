"""Checkpoints: written whole or not at all, read on any number of ranks and by any engine.

A checkpoint is a folder ``step-000123``::

    __<rank>_0.distcp, .metadata   vectors, by torch.distributed.checkpoint: each rank writes the shards it holds
    shared.pt                      values that every rank has
    rank-00000.pt, ...             values of one rank: random states, positions in the data, buffers
    history.json                   the record of the run
    manifest.json                  what program it is of, and the size of every file; written last

It is written as ``step-000123.tmp``, flushed to the disk, and renamed. Nothing that is read can run code: the ``.pt``
files are read with ``weights_only=True``, and DCP's metadata, a pickle, by a reader that knows its classes alone.
"""

import io
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from . import state
from .distributed import is_main_process, rank, world_size
from .safe_reader import SafeReader

if TYPE_CHECKING:
    from .program import Program

FORMAT_VERSION = 1
_COMPLETE = re.compile(r"step-\d{6,}")
_LEFT_OVER = re.compile(r"step-\d{6,}\.(tmp|old)")
_MANIFEST, _SHARED, _HISTORY = "manifest.json", "shared.pt", "history.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpointing:
    """When a run writes checkpoints; give it to :meth:`scalemlo.Program.run`.

    One is also written at the end of the run, and where Ctrl-C ends it.

    Args:
        folder: Where; on a file system that all ranks share. One folder per run.
        every: Outer iterations between two.
        save_total_limit: How many to keep; older ones are removed once a new one is complete. None keeps all.

    Raises:
        ValueError: If a number is not an integer of at least 1.
    """

    folder: str | Path
    every: int = 100
    save_total_limit: int | None = 3

    def __post_init__(self) -> None:
        for field in ("every", "save_total_limit"):
            value = getattr(self, field)
            if field == "save_total_limit" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                way_out = "; None keeps all" if field == "save_total_limit" else ""
                raise ValueError(f"Checkpointing: {field}={value!r} must be an integer of at least 1{way_out}.")

    def check_folder(self, num_steps: int) -> None:
        """Create the folder; a ``ValueError`` where it has a checkpoint of a later step. Collective.

        Args:
            num_steps: Of the program, before the run.
        """

        def check() -> None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)  # what cannot be written to is found out now
            later = [path.name for path in complete_checkpoints(Path(self.folder)) if _step_of(path) > num_steps]
            if later:
                raise ValueError(
                    f"folder {str(self.folder)!r} has checkpoints up to {later[-1]}, but the program is at step "
                    f"{num_steps}. Give resume=True to go on from there, or another folder; to go back to an earlier "
                    "one, remove those after it."
                )

        _together(check)


# ---- writing -------------------------------------------------------------------------------------------------------
def save_checkpoint(program: "Program", folder: str | Path, save_total_limit: int | None = None) -> Path:
    """Write a checkpoint between two outer iterations. Collective.

    A ``ValueError`` on all ranks where there is one of this step already, or something cannot be stored.

    Args:
        program: The program.
        folder: Its checkpoints stand side by side here; the same on every rank.
        save_total_limit: How many to keep; None keeps all.

    Returns:
        The folder of this one.
    """
    folder = Path(folder)
    final = folder / f"step-{program.num_steps:06d}"
    partial = final.with_name(f"{final.name}.tmp")
    content = _together(lambda: _Content.of(program))
    _together(lambda: _make_room(folder, final, partial) if is_main_process() else None)
    with _one_process_is_fine(), _failures_of(partial, "writing"):
        dcp.save(
            state.vectors(program),
            storage_writer=dcp.FileSystemWriter(partial, sync_files=True),
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
            no_dist=not dist.is_initialized(),
        )
    _together(lambda: content.write(partial))  # all ranks have written when it returns
    _together(lambda: _complete(partial, final, content.manifest) if is_main_process() else None)
    _together(lambda: _keep_latest(folder, save_total_limit) if is_main_process() else None)
    return final


@dataclass(frozen=True)
class _Content:
    """All files but DCP's: as bytes, made before anything is written, so that what cannot be stored is known first."""

    files: dict[str, bytes]
    manifest: dict[str, Any]

    @classmethod
    def of(cls, program: "Program") -> "_Content":
        from . import __version__

        files = {state.rank_file(): _packed(state.own(program), "a rank's own state")}
        if is_main_process():
            files[_SHARED] = _packed(state.shared(program), "optimizer, scheduler and estimator states")
            files[_HISTORY] = json.dumps(state.history_to_json(program.history)).encode()
        manifest = {
            "format_version": FORMAT_VERSION,
            "scalemlo": __version__,
            "torch": torch.__version__,
            "world_size": world_size(),
            "num_steps": program.num_steps,
            "levels": state.describe_program(program),
        }
        return cls(files, manifest)

    def write(self, folder: Path) -> None:
        """Write this rank's files."""
        for name, content in self.files.items():
            _write(folder / name, content)


def _packed(values: dict[str, Any], what: str) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(values, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True, map_location="cpu")
    except Exception as error:  # objects that do not pickle fail in many ways
        raise ValueError(
            f"{what} cannot be stored: only numbers, strings, tensors and containers of them can be read back without "
            f"running code ({str(error).splitlines()[0]}). A LambdaLR with a callable object is the usual reason: give "
            "it a function."
        ) from error
    return buffer.getvalue()


def _make_room(folder: Path, final: Path, partial: Path) -> None:
    if final.exists():
        raise ValueError(f"{final} exists already: this step was saved. Give another folder, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if _LEFT_OVER.fullmatch(path.name):  # of a run that was killed while it wrote or removed
            shutil.rmtree(path)
    partial.mkdir()


def _complete(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    missing = [name for name in map(state.rank_file, range(world_size())) if name not in files]
    if missing:
        raise ValueError(
            f"{partial} lacks {missing[:3]}, which other ranks wrote: the folder is not the same on all ranks. Give "
            "one on a file system that they share."
        )
    _write(partial / _MANIFEST, json.dumps(manifest | {"files": files}, indent=1).encode())
    _flush_folder(partial)
    os.rename(partial, final)
    _flush_folder(final.parent)


def _keep_latest(folder: Path, limit: int | None) -> None:
    for path in complete_checkpoints(folder)[: -limit if limit is not None else 0]:
        doomed = path.with_name(f"{path.name}.old")
        os.rename(path, doomed)  # half removed it must not look complete
        shutil.rmtree(doomed)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- finding -------------------------------------------------------------------------------------------------------
def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder that were written to the end, oldest first; none where there is no folder."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _COMPLETE.fullmatch(path.name) and (path / _MANIFEST).is_file()]
    return sorted(found, key=_step_of)


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
    if (path / _MANIFEST).is_file() and not _LEFT_OVER.fullmatch(path.name):
        return path
    found = complete_checkpoints(path)
    if not found:
        unfinished = sorted(p.name for p in path.iterdir() if _LEFT_OVER.fullmatch(p.name))
        rest = f" ({', '.join(unfinished)}: not finished)" if unfinished else ""
        raise ValueError(f"there is no complete checkpoint in {str(path)!r}{rest}. Leave resume out to start a run.")
    return found[-1]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


# ---- reading -------------------------------------------------------------------------------------------------------
def load_checkpoint(program: "Program", path: str | Path) -> Path:
    """Put a program in the state that a checkpoint holds. Collective.

    Everything is checked before anything is changed, except for the content of the vectors' files: a ``ValueError`` on
    all ranks where there is no checkpoint, or it is damaged, of a newer format, or of another program.

    Args:
        program: Built as the one that was saved; engines and world size may differ.
        path: A checkpoint, or a folder of them: then the latest complete one.

    Returns:
        The checkpoint that was read.
    """
    path = _together(lambda: find_checkpoint(path))
    _check_agreed(path)
    manifest = _together(lambda: _read_manifest(path))
    there, here = manifest["levels"], state.describe_program(program)
    keeps_memory = _together(lambda: state.check_same_program(there, here, str(path)))
    saved_by = manifest["world_size"]
    of_rank = rank() if rank() < saved_by else 0
    shared = _together(lambda: _unpacked(path / _SHARED, program.device))
    own = _together(lambda: _unpacked(path / state.rank_file(of_rank), torch.device("cpu")))
    history = _together(lambda: json.loads((path / _HISTORY).read_text()))
    _together(lambda: state.check_same_groups(program, shared, str(path)))
    if saved_by != world_size() and is_main_process():
        warnings.warn(
            f"{path} was written by {saved_by} rank(s), {world_size()} are running: random states, of dropout masks "
            "and whatever else draws, are those of this run. Positions in the data are kept.",
            stacklevel=2,
        )
    state.restore_shared(program, shared, keeps_memory)
    with _one_process_is_fine(), _failures_of(path, "reading"):
        dcp.load(
            state.vectors(program),
            storage_reader=SafeReader(path),
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
            no_dist=not dist.is_initialized(),
        )
    state.restore_history(program.history, history)
    _together(lambda: state.restore_own(program, own, random_states=saved_by == world_size()))
    return path


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        version = manifest["format_version"]
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path / _MANIFEST} is damaged ({error}). {_older(path)}") from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, of scalemlo {manifest.get('scalemlo')}; this scalemlo reads up to "
            f"{FORMAT_VERSION}. Upgrade scalemlo."
        )
    for name, size in manifest["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            now = "it is missing" if found is None else f"it has {found} bytes of {size}"
            raise ValueError(f"{file} is damaged: {now}. {_older(path)}")
    return manifest


def _older(path: Path) -> str:
    """What else could be loaded, for messages."""
    found = complete_checkpoints(path.parent)
    older = [p for p in found if not _COMPLETE.fullmatch(path.name) or _step_of(p) < _step_of(path)]
    if not older:
        return "There is no older checkpoint beside it."
    return f"There is an older checkpoint: {older[-1]}; give its path to resume or load."


def _unpacked(file: Path, device: torch.device) -> dict[str, Any]:
    """Values that were on a device come to this rank's; those on the CPU stay there."""
    try:
        return torch.load(
            file,
            weights_only=True,
            map_location=lambda storage, where: storage if where == "cpu" else storage.to(device=device),
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(f"{file} is damaged ({str(error).splitlines()[0]}). {_older(file.parent)}") from error


# ---- ranks ---------------------------------------------------------------------------------------------------------
def _together(action: Callable[[], T]) -> T:
    """Do something that may fail on some ranks, and fail on all where it does; a barrier. Collective."""
    error, value = None, None
    try:
        value = action()
    except Exception as caught:
        if world_size() == 1:
            raise
        error = caught
    if world_size() > 1:
        everyone: list[str | None] = [None] * world_size()
        dist.all_gather_object(everyone, None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for other, message in enumerate(everyone):
            if message is not None:
                raise ValueError(f"on rank {other}: {message}")
    return value  # type: ignore[return-value]


def _check_agreed(path: Path) -> None:
    if world_size() > 1:
        everyone: list[Any] = [None] * world_size()
        dist.all_gather_object(everyone, str(path))
        if len(set(everyone)) > 1:
            raise ValueError(f"ranks found different checkpoints: {sorted(set(everyone))}. They must share the folder.")


@contextmanager
def _failures_of(path: Path, doing: str) -> Iterator[None]:
    """DCP's errors as one that names the checkpoint and the first rank's reason."""
    try:
        yield
    except CheckpointException as error:
        failures: Mapping[int, Any] = error.failures
        failed, (reason, _) = next(iter(failures.items()))
        after = f" The program is half loaded and must not run. {_older(path)}" if doing == "reading" else ""
        why = f"{type(reason).__name__}: {reason}"
        raise ValueError(f"{doing} {path} failed on rank {failed}: {why}.{after}") from error


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """DCP warns wherever there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
