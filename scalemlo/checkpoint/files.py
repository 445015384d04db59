"""Files of a checkpoint: flushed to the disk, summed while they are written, and checked against their sums.

The sum is CRC-32: it finds every flipped bit and every burst of up to 32; what it does not stop is forgery.
"""

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
_BLOCK_BYTES = 1 << 22


@dataclass
class Summed:
    """A binary file that sums what goes through it.

    Args:
        file: Open for writing.
    """

    file: Any
    size: int = 0
    crc32: int = 0
    error: OSError | None = None

    def write(self, content: Any) -> int:
        """Write bytes."""
        self.size += memoryview(content).nbytes
        self.crc32 = zlib.crc32(content, self.crc32)
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def entry(self) -> dict[str, int]:
        """Size and sum, as the manifest lists them."""
        return {"size": self.size, "crc32": self.crc32}


def write_file(path: Path, content: bytes) -> dict[str, int]:
    """Write a file and flush it to the disk.

    Args:
        path: Where.
        content: What.

    Returns:
        Its entry for the manifest.
    """
    with open(path, "wb") as f:
        summed = Summed(f)
        summed.write(content)
        f.flush()
        os.fsync(f.fileno())
    return summed.entry()


def flush_folder(path: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest, with a sum of its own."""
    write_file(folder / MANIFEST, json.dumps({**content, "crc32": _sum_of(content)}, indent=1).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest; the other files are left to :func:`check_sizes` and :func:`check_sums`.

    Args:
        folder: A checkpoint.

    Returns:
        Its content.

    Raises:
        ValueError: If it is damaged, or of a newer format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version = manifest["format_version"]
        if not isinstance(version, int):
            raise ValueError(f"format_version={version!r}")
        if 2 <= version <= FORMAT_VERSION and manifest.pop("crc32") != _sum_of(manifest):
            raise ValueError("its checksum differs from that of its content")
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}).") from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version}, of scalemlo {manifest.get('scalemlo')}; this scalemlo reads up to "
            f"{FORMAT_VERSION}. Upgrade scalemlo."
        )
    if version == 1:
        manifest["files"] = {name: {"size": size} for name, size in manifest["files"].items()}
    return manifest


def check_sizes(folder: Path, files: Mapping[str, Mapping[str, int]]) -> None:
    """Compare the sizes of files with the manifest.

    Args:
        folder: A checkpoint.
        files: Entries of its manifest.

    Raises:
        ValueError: If a file is missing or has another size.
    """
    for name, entry in files.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != entry["size"]:
            now = "it is missing" if found is None else f"it has {found} bytes of {entry['size']}"
            raise ValueError(f"{file} is damaged: {now}.")


def check_sums(folder: Path, files: Mapping[str, Mapping[str, int]], names: Iterable[str]) -> None:
    """Read files and compare their sums with the manifest.

    Args:
        folder: A checkpoint.
        files: Entries of its manifest; those of format version 1 have no sum.
        names: Which to check.

    Raises:
        ValueError: If the content of a file is not what was written.
    """
    for name in names:
        if "crc32" in files[name] and _sum_of_file(folder / name) != files[name]["crc32"]:
            raise ValueError(f"{folder / name} is damaged: its checksum is not that of what was written.")


def share_of(files: Mapping[str, Mapping[str, int]], part: int, num_parts: int) -> list[str]:
    """Split files into parts of similar sizes.

    Args:
        files: Entries of a manifest.
        part: Which part.
        num_parts: Of how many.

    Returns:
        Names of the part.
    """
    loads, mine = [0] * num_parts, []
    for name in sorted(files, key=lambda name: (-files[name]["size"], name)):
        lightest = loads.index(min(loads))
        loads[lightest] += files[name]["size"]
        if lightest == part:
            mine.append(name)
    return mine


def _sum_of_file(path: Path) -> int:
    total = 0
    with open(path, "rb") as f:
        while block := f.read(_BLOCK_BYTES):
            total = zlib.crc32(block, total)
    return total


def _sum_of(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
