"""Rows out of the containers that users have them in."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Source:
    """An opened data set.

    Attributes:
        rows: Iterated once where all rows are kept in memory, for every pass where not.
        first: The first row.
        is_stream: Whether the number of rows is unknown.
    """

    rows: Iterable[Any]
    first: Mapping[str, Any]
    is_stream: bool


def open_source(dataset: Any, *, split: str | None = None, name: str = "dataset") -> Source:
    """Open a data set.

    ``datasets`` and ``pandas`` are not imported: whoever has such an object has imported them.

    Args:
        dataset: ``datasets.Dataset``, ``IterableDataset``, ``DatasetDict`` or ``IterableDatasetDict``, any dict of data
            sets by split, a sequence of dicts, a pandas ``DataFrame``, or a torch dataset whose items are dicts.
        split: Which part of a dict.
        name: For messages.

    Returns:
        Its rows.

    Raises:
        ValueError: If the split is missing or does not exist, the container is none of these or can be read only once,
            or it is empty.
    """
    if isinstance(dataset, Mapping):
        dataset = _part(dataset, split, name)
    elif split is not None:
        raise ValueError(
            f"split={split!r} is for a DatasetDict, and {name} is a {type(dataset).__name__}; leave it out."
        )
    if isinstance(dataset, str):
        raise ValueError(f"{name} is the string {dataset!r}; load it first: datasets.load_dataset({dataset!r}).")
    if isinstance(dataset, Iterator):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}, which can be read only once, and training passes over its data "
            "many times. Give list(...) of it, or datasets.IterableDataset.from_generator(...)."
        )
    rows = _plain(dataset, name)
    has_length = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    if not has_length and not isinstance(rows, Iterable):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}; give a data set of the datasets library, a list of dicts, a pandas "
            "DataFrame, or a torch dataset whose items are dicts."
        )
    first = next(iter(_Indexed(rows) if has_length else rows), None)
    if first is None:
        raise ValueError(f"{name} has no rows.")
    if not isinstance(first, Mapping):
        raise ValueError(f"the rows of {name} are {type(first).__name__}s and must be dicts of columns.")
    return Source(_Indexed(rows) if has_length else rows, plain_row(first), not has_length)


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with arrays and tensors as lists and their scalars as Python's."""
    return {column: value.tolist() if hasattr(value, "tolist") else value for column, value in row.items()}


def _part(parts: Mapping[str, Any], split: str | None, name: str) -> Any:
    if any(isinstance(part, (str, int, float)) for part in parts.values()):
        raise ValueError(f"{name} is a single dict; give a list of dicts, one per row.")
    if split is None and len(parts) != 1:
        raise ValueError(f"{name} has the splits {sorted(parts)}; choose one with split=.")
    chosen = next(iter(parts)) if split is None else split
    if chosen not in parts:
        raise ValueError(f"split={split!r} does not exist; {name} has the splits {sorted(parts)}.")
    part = parts[chosen]
    if isinstance(part, (list, tuple)) and part and not isinstance(part[0], Mapping):
        raise ValueError(f"{name} is a dict of columns; give datasets.Dataset.from_dict(...) of it.")
    return part


def _plain(dataset: Any, name: str) -> Any:
    """The data set without what would turn its values into tensors or records into something else."""
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(dataset, pandas.DataFrame):
        return dataset.to_dict("records")
    if type(dataset).__module__.split(".")[0] == "datasets" and hasattr(dataset, "format"):
        if dataset.format["type"] == "custom":
            raise ValueError(
                f"{name} has a transform (with_transform), of which one draw would be kept for all epochs; apply it "
                "with map() if it is deterministic, or give an iterable data set."
            )
        return dataset.with_format(None)
    return dataset


def keeps_position(rows: Any) -> bool:
    """Whether a stream can go on exactly where its ``state_dict`` says.

    Those of ``datasets`` can, unless they are shuffled: what stood in the buffer is lost with them. Which ones hold a
    buffer is known by private attributes alone; without these the answer is no.
    """
    if not all(callable(getattr(rows, method, None)) for method in ("state_dict", "load_state_dict")):
        return False
    if type(rows).__module__.split(".")[0] != "datasets":
        return True
    found = [getattr(rows, "_ex_iterable", None)]
    for part in found:  # grows
        if part is None or "BufferShuffled" in type(part).__name__:
            return False
        found += [part.ex_iterable] if hasattr(part, "ex_iterable") else getattr(part, "ex_iterables", [])
    return True


class _Indexed:
    """The rows of what has a length and items, which torch datasets need not be able to iterate."""

    def __init__(self, rows: Any):
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        return (self._rows[index] for index in range(len(self._rows)))
