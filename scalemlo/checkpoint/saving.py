"""Writing a checkpoint: at once, or in a thread while the run goes on.

Both take the same two steps: :class:`Snapshot` collects the state, :func:`_write` writes it. In between the state may
be copied, and the second step left to threads that talk over a process group of their own.
"""

import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..distributed.group import is_main_process, world_size
from ..distributed.ranks import Ranks
from ..versions import __version__
from . import state
from .files import FORMAT_VERSION, write_file, write_manifest
from .folders import complete, complete_checkpoints, folder_of_step, keep_latest, make_room, older, partial_of, step_of
from .saved import Saved
from .vectors import write_vectors
from .writable import check_writable

SHARED, HISTORY, EXTRA = "shared.pt", "history.json", "extra.json"


@dataclass(frozen=True)
class Checkpointing:
    """When a run writes checkpoints; give it to :meth:`scalemlo.Program.run`.

    One is also written at the end of the run, and where Ctrl-C ends it.

    Args:
        folder: Where; on a file system that all ranks share. One folder per run.
        every: Outer iterations between two.
        save_total_limit: How many to keep; older ones are removed once a new one is complete. None keeps all.
        asynchronous: Whether the run goes on while a checkpoint is written: it waits only for a copy of the state in
            host memory, and for the checkpoint before. A failure is raised at the next one, or at the end of the run.

    Raises:
        ValueError: If a number is not an integer of at least 1.
    """

    folder: str | Path
    every: int = 100
    save_total_limit: int | None = 3
    asynchronous: bool = False

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
            check_writable(self.folder, "folder")
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            later = [path.name for path in complete_checkpoints(Path(self.folder)) if step_of(path) > num_steps]
            if later:
                raise ValueError(
                    f"folder {str(self.folder)!r} has checkpoints up to {later[-1]}, but the program is at step "
                    f"{num_steps}. Give resume=True to go on from there, or another folder; to go back to an earlier "
                    "one, remove those after it."
                )

        Ranks().together(check)


def save_checkpoint(program: Saved, folder: str | Path, save_total_limit: int | None = None) -> Path:
    """Write a checkpoint between two outer iterations. Collective.

    A ``ValueError`` on all ranks where there is one of this step already, something cannot be stored, or writing fails;
    the checkpoints before are then as they were.

    Args:
        program: The program.
        folder: Its checkpoints stand side by side here; the same on every rank.
        save_total_limit: How many to keep; None keeps all.

    Returns:
        The folder of this one.
    """
    snapshot = Snapshot.of(program, Path(folder))
    _write(snapshot, save_total_limit, Ranks())
    return snapshot.final


@contextmanager
def saving(checkpoint: Checkpointing | None) -> Iterator[Callable[[Saved], Any]]:
    """Save checkpoints of one run; when it ends all of them are written, or an error says which one is not.

    Args:
        checkpoint: How; None is for runs without.

    Yields:
        What to call with the program where one is due. Collective, as is the end of the context.
    """
    if checkpoint is None:
        yield lambda program: None
        return
    if not checkpoint.asynchronous:
        yield lambda program: save_checkpoint(program, checkpoint.folder, checkpoint.save_total_limit)
        return
    background = _Background(checkpoint)
    try:
        yield background.save
        background.wait()
    finally:
        background.close()


class _Background:
    """One thread at a time, and the process group that its ranks talk over."""

    def __init__(self, checkpoint: Checkpointing):
        self._checkpoint = checkpoint
        self._ranks = Ranks(dist.new_group(backend="gloo") if world_size() > 1 else None)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, program: Saved) -> None:
        """Copy the state and start to write it, once what was started before is written. Collective."""
        self.wait()
        snapshot = Snapshot.of(program, Path(self._checkpoint.folder)).copied()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name=f"saving {snapshot.final.name}")
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was started is written; its failure is raised here. Collective."""
        self._join()
        error, self._error = self._error, None
        if error is not None:  # on all ranks, see `_write`
            raise error

    def close(self) -> None:
        """Leave no thread and no group behind."""
        self._join()
        if self._ranks.group is not None:
            dist.destroy_process_group(self._ranks.group)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: "Snapshot") -> None:
        try:
            _write(snapshot, self._checkpoint.save_total_limit, self._ranks)
        except Exception as error:
            self._error = error


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes. All that could be impossible to store is bytes already."""

    final: Path
    files: dict[str, bytes]
    vectors: dict[str, state.Piece]
    manifest: dict[str, Any]

    @classmethod
    def of(cls, program: Saved, folder: Path) -> "Snapshot":
        """Collect the state of a program, and make room for it; vectors alias the live ones. Collective."""
        final, ranks = folder_of_step(folder, program.num_steps), Ranks()
        files, manifest = ranks.together(lambda: _content(program))
        ranks.on_main(lambda: make_room(final))
        return cls(final, files, state.vectors(program), manifest)

    def copied(self) -> "Snapshot":
        """The same with copies of the vectors in host memory."""
        return replace(self, vectors={name: piece.copied() for name, piece in self.vectors.items()})

    @property
    def num_bytes(self) -> int:
        """Size of this rank's part."""
        vectors = sum(piece.flat.numel() * piece.flat.element_size() for piece in self.vectors.values())
        return vectors + sum(map(len, self.files.values()))


def _content(program: Saved) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All files but those of the vectors, and the manifest but for its list of files."""
    files = {state.rank_file(): _packed(state.own(program), "a rank's own state")}
    if is_main_process():
        files[SHARED] = _packed(state.shared(program), "optimizer, scheduler and estimator states")
        files[HISTORY] = json.dumps(state.history_to_json(program.history)).encode()
        files[EXTRA] = _extra_to_json(program.extra_state)
    manifest = {
        "format_version": FORMAT_VERSION,
        "scalemlo": __version__,
        "torch": torch.__version__,
        "world_size": world_size(),
        "num_steps": program.num_steps,
        "levels": state.describe_program(program),
    }
    return files, manifest


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


def _extra_to_json(extra: dict[str, Any]) -> bytes:
    try:
        return json.dumps(extra).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"extra_state cannot be stored: {error}. Its values must be those of JSON: numbers, strings, lists, dicts."
        ) from error


def _write(snapshot: Snapshot, save_total_limit: int | None, ranks: Ranks) -> None:
    """Write everything and give the folder its final name; on failure, remove what was written. Collective."""
    final, partial = snapshot.final, partial_of(snapshot.final)
    try:
        entries = write_vectors(partial, snapshot.vectors, ranks)
        rest = ranks.together(lambda: {n: write_file(partial / n, content) for n, content in snapshot.files.items()})
        listed = ranks.gather(entries | rest)
        ranks.on_main(lambda: _write_manifest(partial, snapshot.manifest, listed))
        ranks.on_main(lambda: complete(final))
    except Exception as error:
        # Raised on all ranks after the same action, so that none is still writing.
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        free = shutil.disk_usage(final.parent).free
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(
            f"writing {final} failed: {reason}. This rank's part is {snapshot.num_bytes} bytes, {free} are free on the "
            f"disk; what was written of it is removed. {older(final)}"
        ) from error
    ranks.on_main(lambda: keep_latest(final.parent, save_total_limit))


def _write_manifest(folder: Path, manifest: dict[str, Any], listed: list[dict[str, dict[str, int]]]) -> None:
    there = {path.name for path in folder.iterdir()}
    missing = [name for entries in listed for name in entries if name not in there]
    if missing:
        raise ValueError(
            f"{folder} lacks {missing[:3]}, which other ranks wrote: the folder is not the same on all ranks. Give "
            "one on a file system that they share."
        )
    files = {name: entry for entries in listed for name, entry in entries.items()}
    write_manifest(folder, manifest | {"files": files})
