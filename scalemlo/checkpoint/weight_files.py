"""Safetensors files of a bounded size, as ``from_pretrained`` reads them."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 5 * 10**9
"""Size of a file, unless told otherwise."""


class WeightFiles:
    """Writes tensors as they come; only those of one file are held.

    ``<stem>.safetensors``, or ``<stem>-00001-of-00003.safetensors`` and so on with ``<stem>.safetensors.index.json``;
    files of an earlier export are removed.

    Args:
        folder: Created if needed.
        stem: How the names of the files begin.
        max_bytes: Of one file; a larger tensor gets a file of its own.

    Raises:
        ValueError: If ``max_bytes`` is less than 1.
    """

    def __init__(self, folder: str | Path, stem: str, max_bytes: int = SHARD_BYTES):
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} must be at least 1: it is the size of a file.")
        self._folder, self._stem, self._max_bytes = Path(folder), stem, max_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = self._total_bytes = 0
        self._written: list[list[str]] = []  # names in each file
        self._folder.mkdir(parents=True, exist_ok=True)
        for pattern in (".safetensors", "-?????-of-?????.safetensors", ".safetensors.index.json"):
            for path in self._folder.glob(stem + pattern):
                path.unlink()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, which must not change until it is written."""
        if self._held and self._held_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        self._held[name] = tensor.contiguous()
        self._held_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is held, and the index where there are several files."""
        self._flush()
        num_files = len(self._written)
        if num_files == 1:
            self._temporary(0).rename(self._folder / f"{self._stem}.safetensors")
            return
        places = {}
        for i, names in enumerate(self._written):
            file = f"{self._stem}-{i + 1:05d}-of-{num_files:05d}.safetensors"
            self._temporary(i).rename(self._folder / file)
            places |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": places}
        (self._folder / f"{self._stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _temporary(self, number: int) -> Path:
        return self._folder / f"{self._stem}-{number + 1:05d}.safetensors.tmp"

    def _flush(self) -> None:
        save_file(self._held, self._temporary(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._held))
        self._held, self._held_bytes = {}, 0
