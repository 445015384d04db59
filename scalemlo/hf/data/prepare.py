"""From a data set as users have it to tokenised rows, each with the `example_id` that its weight is found by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .columns import check_names, detect_format, renamed
from .preparation import Domains, Overflow, Preparation
from .prepared import PreparedDataset, PreparedStream
from .sources import open_source
from .tokenizing import RowTokenizer


def prepare_dataset(
    dataset: Any,
    processing_class: PreTrainedTokenizerBase,
    *,
    name: str = "dataset",
    split: str | None = None,
    format: str = "auto",
    column_names: Mapping[str, str] | None = None,
    max_length: int | None = 1024,
    on_overflow: Overflow = "truncate",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    chat_template: str | None = None,
    domain_column: str | None = None,
    domains: Sequence[Any] | None = None,
) -> PreparedDataset | PreparedStream:
    """Tokenise a data set of any supported format and container.

    Formats are those of :data:`scalemlo.hf.data.columns.FORMATS`, found from the columns. Containers are
    ``datasets.Dataset`` and ``IterableDataset``, a ``DatasetDict`` with ``split``, a list of dicts, a pandas
    ``DataFrame``, and torch datasets whose items are dicts. What has a length is tokenised now and kept in memory,
    eight bytes per token; what has none is tokenised as it is read.

    ``example_id`` of a row is its position in the source, unless the source has a column of that name: rows that are
    left out leave a gap, and a table of weights by example has ``num_examples`` entries.

    Args:
        dataset: The data set; one that is prepared already is returned as it is.
        processing_class: The tokenizer.
        name: Of the data set, for messages.
        split: Which part of a ``DatasetDict``; None where it has one part only.
        format: As in :func:`~scalemlo.hf.data.columns.detect_format`.
        column_names: From the names of the formats to the data set's own, where these differ.
        max_length: Tokens of a sequence, or None.
        on_overflow: What to do with longer rows: ``"truncate"`` keeps their beginning, ``"drop"`` leaves them out. Rows
            that keep no label are left out either way. All are counted and logged.
        completion_only_loss: Whether the prompt has no labels; None: it has none where there is a completion.
        assistant_only_loss: Whether only the assistant's messages have labels; needs a chat template with
            ``{% generation %}``.
        chat_template: In the place of the tokenizer's.
        domain_column: Column that says which domain a row is of; rows get a ``domain_id``.
        domains: The column's values in the order of their ids. None: those found, sorted. Needed for streams.

    Returns:
        A map-style dataset, or a stream where the source is one.

    Raises:
        ValueError: If an option is unknown or does not fit the format, the columns fit no format, a value is missing or
            of a wrong type, or no row is left.
    """
    if isinstance(dataset, (PreparedDataset, PreparedStream)):
        return dataset
    source = open_source(dataset, split=split, name=name)
    names = dict(column_names or {})
    check_names(names, list(source.first), name)
    if domain_column is not None and domain_column not in source.first:
        raise ValueError(f"domain_column={domain_column!r} is not among the columns {list(source.first)} of {name}.")
    found = detect_format(renamed(source.first, names), format=format, name=name)
    preparation = Preparation(
        name=name,
        column_names=names,
        tokenizer=RowTokenizer(
            processing_class,
            found,
            is_chat=found.is_chat(renamed(source.first, names)),
            completion_only_loss=completion_only_loss,
            assistant_only_loss=assistant_only_loss,
            chat_template=chat_template,
        ),
        max_length=max_length,
        on_overflow=on_overflow,
        domains=Domains(domain_column, domains) if domain_column is not None else None,
    )
    return (PreparedStream if source.is_stream else PreparedDataset)(source.rows, preparation)
