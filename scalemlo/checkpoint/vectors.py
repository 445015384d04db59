"""Vectors on the disk: flattened tensors in pieces, in the format of torch.distributed.checkpoint (DCP).

Every rank writes the pieces it holds, cut into chunks, and reads the entries it needs, whoever wrote them.
"""

import io
import math
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from ..distributed.group import is_main_process, rank
from ..distributed.ranks import Ranks
from .files import Summed
from .safe_reader import read_metadata
from .state import Piece

CHUNK_BYTES = 1 << 26
"""A chunk is read whole: more than this is never in memory beside the tensor that is filled."""


# ---- writing -------------------------------------------------------------------------------------------------------
def write_vectors(folder: Path, pieces: Mapping[str, Piece], ranks: Ranks) -> dict[str, dict[str, int]]:
    """Write the pieces of all ranks; those that several ranks hold are written by one of them. Collective.

    Args:
        folder: There already.
        pieces: Of this rank, by name.
        ranks: Who writes.

    Returns:
        Entries of the manifest for the files that this rank wrote.
    """
    writer, planner = _Writer(folder), _Planner(pieces)
    writer.set_up_storage_writer(is_main_process(), rank=rank(), use_collectives=True)
    plans = ranks.gather(ranks.together(planner.create_local_plan))

    def divide() -> tuple[list[SavePlan], Any]:
        divided, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(divided), metadata

    divided, metadata = ranks.on_main(divide) or (None, None)
    plan = planner.finish_plan(ranks.scatter(divided))
    results = ranks.gather(ranks.together(lambda: writer.write_data(plan, planner).wait()))
    ranks.on_main(lambda: writer.finish(metadata, results))  # ty: ignore[invalid-argument-type]  # rank 0 has it
    return writer.entries()


class _Planner(dcp.DefaultSavePlanner):
    """Divides chunks of flattened tensors."""

    def __init__(self, pieces: Mapping[str, Piece]):
        super().__init__(flatten_state_dict=False)
        self.set_up_planner({}, is_coordinator=is_main_process())
        self._pieces = pieces

    def create_local_plan(self) -> SavePlan:
        """All chunks of this rank."""
        self.plan = SavePlan([item for name, piece in self._pieces.items() for item in _chunks(name, piece)])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The entries of a chunk."""
        piece, data = self._pieces[write_item.index.fqn], write_item.tensor_data
        assert data is not None, "every chunk has some"
        return piece.flat.narrow(0, data.chunk.offsets[0] - piece.start, data.chunk.sizes[0])


def _chunks(name: str, piece: Piece) -> Iterator[WriteItem]:
    flat = piece.flat
    at_most = CHUNK_BYTES // flat.element_size()
    properties = TensorProperties(dtype=flat.dtype)
    for begin in range(0, flat.numel(), at_most):
        offsets, sizes = torch.Size([piece.start + begin]), torch.Size([min(at_most, flat.numel() - begin)])
        chunk = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, torch.Size([piece.numel]))
        yield WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=chunk)


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, summing what it writes."""

    fs: "_SummingFileSystem"

    def __init__(self, folder: Path):
        super().__init__(folder, sync_files=True)
        self.fs = _SummingFileSystem()

    def write_data(self, *args: Any) -> Any:
        """Write the chunks; where a file cannot be written to, raise its error: torch.save hides it behind its own."""
        try:
            return super().write_data(*args)
        except RuntimeError as error:
            raise next((s.error for s in self.fs.written.values() if s.error is not None), error) from error

    def entries(self) -> dict[str, dict[str, int]]:
        """Entries of the manifest."""
        return {name.removesuffix(".tmp"): summed.entry() for name, summed in self.fs.written.items()}


class _SummingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.written: dict[str, Summed] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Open a file."""
        with super().create_stream(path, mode) as stream:
            self.written[Path(path).name] = summed = Summed(stream)
            yield summed


# ---- reading -------------------------------------------------------------------------------------------------------
class VectorFiles:
    """The vectors of a checkpoint, read interval by interval; needs no process group.

    Reads format version 1 too: there a chunk is a whole tensor, some of its rows or some of its flattened entries,
    padded, and all of these are intervals of the flattened tensor.

    Args:
        folder: The checkpoint.

    Raises:
        ValueError: If the list of its vectors is damaged.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        try:
            self._metadata = read_metadata(folder)
        except Exception as error:  # a damaged pickle fails in many ways
            raise ValueError(f"{folder / '.metadata'} is damaged ({error}).") from error

    def names(self) -> list[str]:
        """What there is, as :func:`scalemlo.checkpoint.state.vectors` names it."""
        return list(self._metadata.state_dict_metadata)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a vector."""
        return self._entry(name).properties.dtype

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill a tensor ``[n]`` with the entries from ``start`` on of a flattened vector.

        Args:
            name: The vector.
            start: The first entry.
            out: Filled in place; on any device.

        Raises:
            ValueError: If the vector, or some of these entries, are not there.
        """
        if not out.numel():
            return  # no chunk, and of an empty vector no entry, was written
        stop, num_read = start + out.numel(), 0
        entry = self._entry(name)
        row_numel = math.prod(entry.size[1:])
        for chunk in entry.chunks:
            first = chunk.offsets[0] * row_numel if chunk.offsets else 0
            begin, end = max(start, first), min(stop, first + chunk.sizes.numel())
            if begin < end:
                content = self._content(MetadataIndex(name, chunk.offsets))
                out[begin - start : end - start].copy_(content[begin - first : end - first])
                num_read += end - begin
        if num_read != out.numel():
            raise ValueError(f"{self._folder} has {num_read} of the {out.numel()} wanted entries of {name!r}.")

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self._metadata.state_dict_metadata:
            raise ValueError(f"{self._folder} has no {name!r}.")
        entry = self._metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata), "read_metadata lets nothing else pass"
        return entry

    def _content(self, index: MetadataIndex) -> Tensor:
        place = self._metadata.storage_data[index]
        if Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"{self._folder / '.metadata'} names a file elsewhere: {place.relative_path!r}.")
        file = self._folder / place.relative_path
        try:
            with open(file, "rb") as f:
                f.seek(place.offset)
                content = io.BytesIO(f.read(place.length))
            return torch.load(content, map_location="cpu", weights_only=True).reshape(-1)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise ValueError(f"{file} is damaged ({str(error).splitlines()[0]}).") from error
