"""Reading torch.distributed.checkpoint's files without trusting them.

DCP reads tensors with ``weights_only=True``, but its metadata, and what is no tensor, with plain ``pickle``.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata


class SafeReader(dcp.FileSystemReader):
    """Reads a checkpoint of tensors without running what a forged one could hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata; tensors only, since DCP unpickles other entries without a check."""
        with open(self.path / ".metadata", "rb") as f:  # type: ignore[operator]
            metadata = _MetadataUnpickler(f).load()
        others = [n for n, m in metadata.state_dict_metadata.items() if not isinstance(m, TensorStorageMetadata)]
        if others:
            raise pickle.UnpicklingError(f"entries {others[:3]} are no tensors")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Classes of DCP's metadata, and torch's data types."""
        if (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout)):
            return getattr(torch, name)
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath", "Path"):
            return Path  # where the checkpoint was written
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's metadata")


_DCP = "torch.distributed.checkpoint"
_METADATA_CLASSES = {
    (f"{_DCP}.metadata", name)
    for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata")
    + ("BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")
} | {(f"{_DCP}.filesystem", "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
