"""What is done to every row of a data set: rename, tokenise, cut to length, number, count."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .columns import renamed
from .sources import plain_row
from .tokenizing import Encoded, RowTokenizer

logger = logging.getLogger(__name__)

Overflow = Literal["truncate", "drop"]
OVERFLOWS: tuple[Overflow, ...] = ("truncate", "drop")


@dataclass
class Counts:
    """What became of the rows of a source.

    Attributes:
        num_read: Rows seen.
        num_truncated: Rows kept without their end.
        num_too_long: Rows left out because of their length.
        num_without_label: Rows left out because nothing in them, or in what was kept of them, is to be predicted.
    """

    num_read: int = 0
    num_truncated: int = 0
    num_too_long: int = 0
    num_without_label: int = 0

    @property
    def num_kept(self) -> int:
        """Rows that are trained on."""
        return self.num_read - self.num_too_long - self.num_without_label

    def log(self, name: str, max_length: int | None) -> None:
        """Say it, if anything was changed."""
        if self.num_truncated or self.num_kept < self.num_read:
            logger.warning(
                "%s, max_length %s: of %d rows, %d truncated, %d left out as too long, %d as without a label",
                name,
                max_length,
                self.num_read,
                self.num_truncated,
                self.num_too_long,
                self.num_without_label,
            )


class Domains:
    """Ids of the values of a column.

    Args:
        column: The column.
        values: Its values in the order of their ids; None: they are found, and numbered by :meth:`close`.

    Raises:
        ValueError: If a value stands twice.
    """

    def __init__(self, column: str, values: Sequence[Any] | None):
        if values is not None and len(set(values)) < len(values):
            raise ValueError(f"domains={list(values)} has a value twice; give each domain once.")
        self.column, self.is_open = column, values is None
        self.values: list[Any] = list(values or ())
        self._ids = {value: i for i, value in enumerate(self.values)}

    def id_of(self, value: Any, where: str) -> int:
        """The id of a value; a ``ValueError`` where it is unknown and the values were given."""
        if value not in self._ids:
            if not self.is_open:
                raise ValueError(
                    f"{where}: column {self.column!r} is {value!r}, which is not among domains={self.values}; add it."
                )
            self._ids[value] = len(self.values)
            self.values.append(value)
        return self._ids[value]

    def close(self) -> list[int]:
        """Number the values found in sorted order; gives the new id of each old one."""
        in_order = sorted(self.values, key=lambda value: (str(type(value)), value)) if self.is_open else self.values
        renumbered = [in_order.index(value) for value in self.values]
        self.values, self._ids, self.is_open = in_order, {value: i for i, value in enumerate(in_order)}, False
        return renumbered


@dataclass
class Preparation:
    """What is done to every row.

    Attributes:
        name: Of the data set, for messages.
        tokenizer: For rows of its format.
        column_names: From the names of the format to the data set's own.
        max_length: Tokens of a sequence, or None.
        on_overflow: What to do with longer rows.
        domains: Ids of domains, or None.
        counts: Of the rows seen so far.

    Raises:
        ValueError: If ``max_length`` or ``on_overflow`` is out of range.
    """

    name: str
    tokenizer: RowTokenizer
    column_names: Mapping[str, str]
    max_length: int | None
    on_overflow: Overflow
    domains: Domains | None
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        if self.on_overflow not in OVERFLOWS:
            raise ValueError(f"on_overflow={self.on_overflow!r} is unknown; choose one of {list(OVERFLOWS)}.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length ({self.max_length}) must be at least 2: the first token is not predicted.")

    def row(self, position: int, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """A prepared row, or None where it is left out; counted either way."""
        where = f"row {position} of {self.name}"
        if not isinstance(record, Mapping):
            raise ValueError(f"{where} is a {type(record).__name__} and must be a dict of columns.")
        record = plain_row(record)
        self.counts.num_read += 1
        encoded = self._fitted(self.tokenizer(renamed(record, self.column_names), where))
        if encoded is None:
            return None
        row: dict[str, Any] = {"example_id": _example_id(record, self.column_names, position, where)}
        if self.domains is not None:
            row["domain_id"] = self.domains.id_of(record.get(self.domains.column), where)
        for prefix, (ids, labels) in encoded.sequences.items():
            row[f"{prefix}input_ids"] = ids
            if labels is not None:
                row[f"{prefix}labels"] = labels
        return row | encoded.scalars

    def _fitted(self, encoded: Encoded) -> Encoded | None:
        longest = max(len(sequence.ids) for sequence in encoded.sequences.values())
        is_long = self.max_length is not None and longest > self.max_length
        if is_long and self.on_overflow == "drop":
            self.counts.num_too_long += 1
            return None
        cut = {prefix: sequence.beginning(self.max_length) for prefix, sequence in encoded.sequences.items()}
        if not all(sequence.is_usable for sequence in cut.values()):
            self.counts.num_without_label += 1
            return None
        self.counts.num_truncated += is_long
        return Encoded(cut, encoded.scalars)


def _example_id(record: Mapping[str, Any], names: Mapping[str, str], position: int, where: str) -> int:
    value = record.get(names.get("example_id", "example_id"), position)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(
            f"{where}: example_id is {value!r} and must be an integer from 0 on; rename or remove the column."
        )
    return value
