"""Whether rows of data fit a model: its vocabulary, its positions, its classes."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..losses.next_token import IGNORE_INDEX
from .prepared import PreparedDataset


def check_fits(model: nn.Module, data: PreparedDataset) -> None:
    """Refuse rows that the model has no embedding, no position or no class for.

    Such rows end in an ``IndexError`` at a random step, in an assertion of the device, or (positions) in no error at
    all. What a model does not say of itself is not checked.

    Args:
        model: Before an engine takes it.
        data: The rows.

    Raises:
        ValueError: Naming the data set, the first row that does not fit, the values and the way out.
    """
    vocabulary, positions = vocabulary_size(model), num_positions(model)
    for column in data.sequence_columns:
        for position, row in enumerate(data.sequences(column)):
            if not len(row):
                continue
            largest, smallest = max(row), min(row)
            is_label = column.endswith("labels")
            lowest = IGNORE_INDEX if is_label else 0
            if vocabulary is not None and (largest >= vocabulary or smallest < lowest):
                wrong = largest if largest >= vocabulary else smallest
                raise ValueError(
                    f"{data.name}, row {position}: {column} has the token id {wrong}, and {_name(model)} has "
                    f"{vocabulary} embeddings. Is processing_class the model's own tokenizer? For added tokens call "
                    "model.resize_token_embeddings(len(tokenizer))."
                )
            if positions is not None and not is_label and len(row) > positions:
                raise ValueError(
                    f"{data.name}, row {position}: {column} has {len(row)} tokens, and {_name(model)} was made for "
                    f"{positions} positions (max_position_embeddings). Set max_length={positions}."
                )
    _check_classes(model, data)


def _check_classes(model: nn.Module, data: PreparedDataset) -> None:
    num_classes = getattr(getattr(model, "config", None), "num_labels", None)
    if data.kind != "classification" or not isinstance(num_classes, int):
        return
    for position, label in enumerate(data.labels):
        if not 0 <= label < num_classes:
            raise ValueError(
                f"{data.name}, row {position}: the label {label} is none of the {num_classes} classes of "
                f"{_name(model)}, which are numbered 0 to {num_classes - 1}. Number the labels so, or load the "
                "model with num_labels=."
            )


def vocabulary_size(model: nn.Module) -> int | None:
    """Rows of the table that token ids are looked up in; None if the model does not say."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        found: Any = get() if get is not None else None
    except NotImplementedError:
        return None
    return found.num_embeddings if isinstance(found, nn.Embedding) else None


def num_positions(model: nn.Module) -> int | None:
    """Tokens of the longest sequence that a model was made for; None if it does not say."""
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    for name, m in model.named_modules():  # RoBERTa's begin after the one of padding
        if name.endswith("position_embeddings") and isinstance(m, nn.Embedding) and m.padding_idx is not None:
            return positions - m.padding_idx - 1
    return positions


def _name(model: nn.Module) -> str:
    return type(model).__name__
