"""Prepared rows, in memory or made as they are read."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .columns import Format, Kind
from .preparation import Preparation
from .sources import keeps_position


class _Prepared:
    """What prepared data of both styles says of itself.

    Attributes:
        name: Of the data set.
        format: Of its source.
        counts: What became of the source's rows.
    """

    def __init__(self, preparation: Preparation):
        self._preparation = preparation
        self.name, self.counts = preparation.name, preparation.counts
        self.format: Format = preparation.tokenizer.format

    @property
    def kind(self) -> Kind:
        """Key of :data:`scalemlo.hf.data.tasks.TASKS`."""
        return self.format.kind

    @property
    def domains(self) -> list[Any]:
        """Values of the domain column in the order of their ids; empty without one."""
        domains = self._preparation.domains
        return list(domains.values) if domains is not None else []


class PreparedDataset(_Prepared, Dataset):
    """Prepared rows in memory.

    A row is a dict of ``example_id``, ``domain_id`` where there are domains, and by ``kind``: ``input_ids`` and
    ``labels``; ``chosen_`` and ``rejected_`` of both; or ``input_ids`` and ``label``.

    Args:
        rows: The source.
        preparation: What is done to its rows.

    Attributes:
        num_examples: Entries that a table by ``example_id`` needs: the number of rows read, or the largest id plus one.

    Raises:
        ValueError: If no row is left, or two rows have the same ``example_id``.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], preparation: Preparation):
        super().__init__(preparation)
        self._sequences: dict[str, _Ragged] = {}
        self._scalars: dict[str, list] = {}
        for position, record in enumerate(rows):
            for column, value in (preparation.row(position, record) or {}).items():
                if isinstance(value, list):
                    self._sequences.setdefault(column, _Ragged()).append(value)
                else:
                    self._scalars.setdefault(column, []).append(value)
        if preparation.domains is not None:
            renumbered = preparation.domains.close()
            self._scalars["domain_id"] = [renumbered[i] for i in self.domain_ids]
        ids = self._scalars.get("example_id", [])
        counts = self.counts
        if not ids:
            raise ValueError(
                f"{self.name} has no row to train on: of {counts.num_read} read, {counts.num_too_long} are longer than "
                f"max_length ({preparation.max_length}) and {counts.num_without_label} have no label in that length; "
                "raise max_length, or look at completion_only_loss and assistant_only_loss."
            )
        if len(set(ids)) < len(ids):
            raise ValueError(f"{self.name} has rows with the same example_id; number them, or remove the column.")
        self.num_examples = max(counts.num_read, max(ids) + 1)
        counts.log(self.name, preparation.max_length)

    def __len__(self) -> int:
        return len(self._scalars["example_id"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows, not one at {index}")
        columns: dict[str, Any] = {**self._scalars, **self._sequences}
        return {column: values[index] for column, values in columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @property
    def example_ids(self) -> list[int]:
        """Of every row."""
        return list(self._scalars["example_id"])

    @property
    def domain_ids(self) -> list[int]:
        """Of every row; empty without a domain column."""
        return list(self._scalars.get("domain_id", ()))

    @property
    def labels(self) -> list[int]:
        """Classes of every row; empty where rows have none."""
        return list(self._scalars.get("label", ()))

    @property
    def sequence_columns(self) -> list[str]:
        """Columns with one sequence per row."""
        return list(self._sequences)

    def sequences(self, column: str) -> Iterator[Sequence[int]]:
        """A column, row by row."""
        return (self._sequences[column][index] for index in range(len(self)))

    def add_column(self, column: str, values: Sequence[float]) -> None:
        """Give every row one more number, such as a reference model's log-probability.

        Args:
            column: Name.
            values: One per row.

        Raises:
            ValueError: If their number differs from that of the rows.
        """
        if len(values) != len(self):
            raise ValueError(f"{column} has {len(values)} values and {self.name} has {len(self)} rows; give one each.")
        self._scalars[column] = list(values)


class PreparedStream(_Prepared, IterableDataset):
    """Rows that are prepared as they are read, numbered by their position in the stream.

    Its position can be saved and found again (:meth:`state_dict`): by the source's own, where that is exact
    (:func:`~scalemlo.hf.data.sources.keeps_position`), else by reading and dropping as many rows.

    Args:
        rows: The source, iterated anew for every pass.
        preparation: What is done to its rows.

    Raises:
        ValueError: If there is a domain column without ``domains``.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], preparation: Preparation):
        super().__init__(preparation)
        if preparation.domains is not None and preparation.domains.is_open:
            raise ValueError(
                f"{self.name} is a stream, whose domains are not known before its end; give domains=[...], the values "
                f"of {preparation.domains.column!r}."
            )
        self._rows: Any = rows
        self._keeps_position = keeps_position(rows)
        self._position = self._start = 0
        self._has_logged = False

    def set_epoch(self, epoch: int) -> None:
        """Reshuffle a source that shuffles by epoch."""
        if callable(getattr(self._rows, "set_epoch", None)):
            self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if get_worker_info() is not None:
            raise ValueError(f"{self.name} is a stream and would be read whole by every worker; use num_workers=0.")
        self._position, self._start = self._start, 0
        rows = iter(self._rows)
        if not self._keeps_position:
            rows = islice(rows, self._position, None)
        for record in rows:
            row = self._preparation.row(self._position, record)
            self._position += 1
            if row is not None:
                yield row
        if not self._has_logged:
            self._has_logged = True
            self.counts.log(self.name, self._preparation.max_length)

    def state_dict(self) -> dict[str, Any]:
        """The position: behind the last row that was taken."""
        return {
            "position": self._position,
            "source": self._rows.state_dict() if self._keeps_position else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass begin at a position."""
        self._position = self._start = state["position"]
        if self._keeps_position:
            self._rows.load_state_dict(state["source"])


class _Ragged:
    """Lists of integers end to end: four bytes each, where Python's own take up to forty."""

    def __init__(self) -> None:
        self._values, self._ends = array("i"), array("q", [0])

    def append(self, items: Sequence[int]) -> None:
        self._values.extend(items)
        self._ends.append(len(self._values))

    def __getitem__(self, index: int) -> list[int]:
        index = index if index >= 0 else index + len(self._ends) - 1
        return self._values[self._ends[index] : self._ends[index + 1]].tolist()
