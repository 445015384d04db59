"""Checkpoints as files that others read, made without building the program and without a process group.

Tensors are read chunk by chunk; in memory are those of one output file, one tensor and one chunk.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import find_checkpoint
from .files import check_sizes, check_sums, read_manifest
from .vectors import VectorFiles
from .weight_files import SHARD_BYTES, WeightFiles


class CheckpointWeights:
    """The trained weights of a checkpoint.

    Args:
        path: A checkpoint, or a folder of them: then the latest complete one.

    Raises:
        ValueError: If there is none, it is damaged, or of format version 1.
    """

    def __init__(self, path: str | Path):
        self.path = find_checkpoint(path)
        self._manifest = read_manifest(self.path)
        if self._manifest["format_version"] < 2:
            raise ValueError(
                f"{self.path} has format version 1, which does not tell the shapes of all parameters. Load it with the "
                "program and save it again."
            )
        check_sizes(self.path, self._manifest["files"])
        check_sums(self.path, self._manifest["files"], self._manifest["files"])
        self._files = VectorFiles(self.path)

    @property
    def levels(self) -> list[str]:
        """Names of the levels, top to bottom."""
        return list(self._manifest["levels"])

    def shapes(self, level: str) -> dict[str, torch.Size]:
        """Shapes of a level's trained parameters, by their names in the module."""
        facts = self._manifest["levels"][level]["parameters"]
        return {name: torch.Size(json.loads(fact.rpartition(" ")[0])) for name, fact in facts.items()}

    def adapters(self, level: str) -> dict[str, Any]:
        """Configurations of a level's PEFT adapters by name; none for other modules."""
        return self._manifest["levels"][level]["adapters"]

    def tensor(self, level: str, name: str) -> Tensor:
        """One parameter."""
        key, shape = f"{level}/weights/{name}", self.shapes(level)[name]
        flat = torch.empty(shape.numel(), dtype=self.dtype(level, name))
        self._files.read(key, 0, flat)
        return flat.view(shape)

    def dtype(self, level: str, name: str) -> torch.dtype:
        """The dtype that a parameter is stored in."""
        return self._files.dtype(f"{level}/weights/{name}")

    def the_level(self, level: str | None) -> str:
        """Check the name of a level, or find the only one.

        Args:
            level: A name, or None.

        Returns:
            The name.

        Raises:
            ValueError: If there is no such level, or several to choose from.
        """
        if level is None and len(self.levels) == 1:
            return self.levels[0]
        if level not in self.levels:
            raise ValueError(f"level={level!r}: {self.path} has the levels {self.levels}; choose one of them.")
        return level


def to_full(checkpoint: str | Path, folder: str | Path, *, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write the trained weights of every level as whole tensors: ``<level>.safetensors``, or several with an index.

    Names are those in the level's module. Frozen weights are not in a checkpoint; they come from the model.

    Args:
        checkpoint: A checkpoint, or a folder of them: then the latest complete one.
        folder: Created if needed.
        max_shard_bytes: Size of a file.
    """
    weights = CheckpointWeights(checkpoint)
    for level in weights.levels:
        files = WeightFiles(folder, level, max_shard_bytes)
        for name in weights.shapes(level):
            files.add(name, weights.tensor(level, name))
        files.finish()
