"""Putting a program in the state that a checkpoint holds."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from ..distributed.group import is_main_process, rank, world_size
from ..distributed.ranks import Ranks
from . import state
from .files import check_sizes, check_sums, read_manifest, share_of
from .folders import find_checkpoint, older
from .saved import Saved
from .saving import EXTRA, HISTORY, SHARED
from .vectors import VectorFiles


def load_checkpoint(program: Saved, path: str | Path) -> Path:
    """Put a program in the state that a checkpoint holds. Collective.

    Everything is checked before anything is changed, the content of all files included: a ``ValueError`` on all ranks
    where there is no checkpoint, or it is damaged, of a newer format, or of another program.

    Args:
        program: Built as the one that was saved; engines and world size may differ.
        path: A checkpoint, or a folder of them: then the latest complete one.

    Returns:
        The checkpoint that was read.
    """
    ranks = Ranks()
    path = ranks.together(lambda: find_checkpoint(path))
    ranks.check_agreed(str(path), "checkpoints")
    manifest = ranks.together(lambda: _checked(path))
    there, here = manifest["levels"], state.describe_program(program, as_held=manifest["format_version"] == 1)
    keeps_memory = ranks.together(lambda: state.check_same_program(there, here, str(path)))
    saved_by = manifest["world_size"]
    of_rank = rank() if rank() < saved_by else 0
    shared = ranks.together(lambda: _unpacked(path / SHARED, program.device))
    own = ranks.together(lambda: _unpacked(path / state.rank_file(of_rank), torch.device("cpu")))
    history = ranks.together(lambda: _parsed(path / HISTORY))
    has_extra = EXTRA in manifest["files"]  # format 1 had none
    extra = ranks.together(lambda: _parsed(path / EXTRA)) if has_extra else dict(program.extra_state)
    files = ranks.together(lambda: VectorFiles(path))
    ranks.together(lambda: state.check_same_groups(program, shared, str(path)))
    if saved_by != world_size() and is_main_process():
        warnings.warn(
            f"{path} was written by {saved_by} rank(s), {world_size()} are running: random states, of dropout masks "
            "and whatever else draws, are those of this run. Positions in the data are kept.",
            stacklevel=2,
        )
    state.restore_shared(program, shared, keeps_memory)
    ranks.together(lambda: _read_vectors(program, files))
    state.restore_history(program.history, history)
    program.extra_state.clear()
    program.extra_state.update(extra)
    ranks.together(lambda: state.restore_own(program, own, random_states=saved_by == world_size()))
    return path


def _checked(path: Path) -> dict[str, Any]:
    """The manifest, once every file is found to be what it says; ranks share the reading."""
    try:
        manifest = read_manifest(path)
        check_sizes(path, manifest["files"])
        check_sums(path, manifest["files"], share_of(manifest["files"], rank(), world_size()))
    except ValueError as error:
        raise ValueError(f"{error} {older(path)}") from error
    return manifest


def _read_vectors(program: Saved, files: VectorFiles) -> None:
    try:
        for name, piece in state.vectors(program).items():
            flat = piece.flat
            files.read(name, piece.start, flat)
            piece.put(flat)
    except ValueError as error:
        raise ValueError(f"{error} The program is half loaded and must not run.") from error


def _unpacked(file: Path, device: torch.device) -> dict[str, Any]:
    """Values that were on a device come to this rank's; those on the CPU stay there."""
    try:
        return torch.load(
            file,
            weights_only=True,
            map_location=lambda storage, where: storage if where == "cpu" else storage.to(device=device),  # ty: ignore[missing-attribute]
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(f"{file} is damaged ({str(error).splitlines()[0]}). {older(file.parent)}") from error


def _parsed(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}). {older(file.parent)}") from error
