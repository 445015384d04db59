"""Reading the metadata of torch.distributed.checkpoint without trusting it: DCP would use plain ``pickle``."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


def read_metadata(folder: Path) -> Metadata:
    """Which tensors a checkpoint has, and where, without running what a forged file could hold.

    Args:
        folder: The checkpoint.

    Returns:
        DCP's metadata; tensors only.

    Raises:
        pickle.UnpicklingError: If it holds anything else.
    """
    with open(folder / ".metadata", "rb") as f:
        metadata = _MetadataUnpickler(f).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError("it is no metadata")
    others = [n for n, m in metadata.state_dict_metadata.items() if not isinstance(m, TensorStorageMetadata)]
    if others:
        raise pickle.UnpicklingError(f"entries {others[:3]} are no tensors")
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
