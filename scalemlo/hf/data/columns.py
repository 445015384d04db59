"""Which format a data set has, read from its columns, as TRL reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["language_modeling", "preference", "classification"]
"""What prepared rows are: one sequence with next-token labels, two of them to compare, or one with a class."""


@dataclass(frozen=True)
class Format:
    """Columns that belong together.

    Attributes:
        name: As in TRL's "dataset formats and types".
        kind: What its rows are prepared as.
        required: Columns that make a data set one of this format.
        optional: Columns that are read where they exist.
    """

    name: str
    kind: Kind
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def is_chat(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of this format holds messages, as all others then do."""
        return any(is_conversational(row[column]) for column in self.required)

    def __str__(self) -> str:
        optional = f" (optional: {', '.join(self.optional)})" if self.optional else ""
        return f"{self.name}: {' + '.join(self.required)}{optional}"


_CHAT = ("tools", "chat_template_kwargs")

FORMATS = (
    Format(
        "tokenized",
        "language_modeling",
        ("input_ids",),
        ("labels", "attention_mask", "completion_mask", "assistant_masks"),
    ),
    Format("preference", "preference", ("chosen", "rejected"), ("prompt", *_CHAT)),
    Format("prompt_completion", "language_modeling", ("prompt", "completion"), _CHAT),
    Format("messages", "language_modeling", ("messages",), _CHAT),
    Format("conversations", "language_modeling", ("conversations",), _CHAT),
    Format("classification", "classification", ("text", "label"), ("text_pair",)),
    Format("text", "language_modeling", ("text",)),
)
"""All formats; the first one whose required columns exist is the data set's."""


def detect_format(columns: Iterable[str], *, format: str = "auto", name: str = "dataset") -> Format:
    """Find the format of a data set.

    Args:
        columns: Its columns, renamed already.
        format: The name of a format to insist on, where several fit; ``"auto"`` takes the first that fits.
        name: Of the data set, for messages.

    Returns:
        The format.

    Raises:
        ValueError: If the format is unknown, or the columns lack what it requires.
    """
    found = list(columns)
    if format != "auto" and format not in {f.name for f in FORMATS}:
        raise ValueError(f"format={format!r} is unknown; choose 'auto' or one of {[f.name for f in FORMATS]}.")
    wanted = [f for f in FORMATS if format in ("auto", f.name)]
    for candidate in wanted:
        if set(candidate.required) <= set(found):
            return candidate
    raise ValueError(
        f"{name} has the columns {found}, which fit no format ("
        + "; ".join(map(str, wanted))
        + f"). Say which column is which with column_names={{{wanted[0].required[0]!r}: {(found or ['...'])[0]!r}, "
        "...}, or rename the columns."
    )


def check_names(column_names: Mapping[str, str], columns: Iterable[str], name: str) -> None:
    """Check a renaming against the columns that exist.

    Args:
        column_names: From the names of the formats to the data set's own.
        columns: The data set's own.
        name: Of the data set, for messages.

    Raises:
        ValueError: If a name on either side does not exist.
    """
    known = sorted({column for f in FORMATS for column in (*f.required, *f.optional)} | {"example_id"})
    for standard, own in column_names.items():
        if standard not in known:
            raise ValueError(f"column_names has the key {standard!r}; the columns that formats have are {known}.")
        if own not in columns:
            raise ValueError(
                f"column_names says that {standard!r} is {own!r}, but {name} has the columns {list(columns)}."
            )


def renamed(row: Mapping[str, Any], column_names: Mapping[str, str]) -> dict[str, Any]:
    """A row with its columns named as formats name them; a column of that name that was there before is gone."""
    if not column_names:
        return dict(row)
    own = set(column_names.values())
    kept = {column: value for column, value in row.items() if column not in own}
    return kept | {standard: row[column] for standard, column in column_names.items()}


def is_conversational(value: Any) -> bool:
    """Whether a value is a list of messages (``role`` and ``content``, or ``from`` and ``value``)."""
    first = value[0] if isinstance(value, (list, tuple)) and value else None
    return isinstance(first, Mapping) and ("role" in first or "from" in first)
