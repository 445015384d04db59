"""Instruction data: load, split, corrupt and tokenize, with every example traceable by its `example_id`."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ...hf.data.collate import has_target
from ...hf.losses.next_token import IGNORE_INDEX
from ...runs.assets import fetch, known_assets

logger = logging.getLogger(__name__)

_FILE_SUFFIXES = (".json", ".jsonl")


class Row(TypedDict):
    """One instruction with its answer. `example_id` is its position in the source and survives every later step."""

    example_id: int
    prompt: str
    completion: str


class TokenizedRow(TypedDict):
    """A row as lists of T integers; `labels` is -100 on the prompt."""

    example_id: int
    input_ids: list[int]
    labels: list[int]


class Split(NamedTuple):
    """Disjoint parts of a data set: `train` (to reweight or corrupt), `meta` (clean, upper level) and `heldout`."""

    train: list[Row]
    meta: list[Row]
    heldout: list[Row]


def load_instructions(name_or_path: str, *, split: str = "train") -> list[Row]:
    """Load instructions from an asset, a json or jsonl file, or a data set of the hub.

    Records have the columns `instruction`, optionally `input`, and `output` (Alpaca), or `prompt` and `completion`.
    Rows with an empty answer are left out and their number is logged. A missing file or column is a `ValueError`.

    Args:
        name_or_path: Asset name, path ending in `.json` or `.jsonl`, or hub name.
        split: Split of the hub data set; unused for files.

    Returns:
        Rows in the order of the source.
    """
    rows = [_to_row(index, record) for index, record in enumerate(_read_records(name_or_path, split))]
    answered = [row for row in rows if row["completion"].strip()]
    if len(answered) < len(rows):
        logger.warning("%s: left out %d of %d rows: empty answer", name_or_path, len(rows) - len(answered), len(rows))
    return answered


def _read_records(name_or_path: str, split: str) -> Iterable[Mapping[str, Any]]:
    path = fetch(name_or_path) if name_or_path in known_assets() else Path(name_or_path)
    if path.suffix in _FILE_SUFFIXES:
        if not path.is_file():
            raise ValueError(f"data file ({name_or_path!r}) does not exist; give an existing path or a hub name")
        text = path.read_text(encoding="utf-8")
        # Not str.splitlines: JSON strings may hold U+2028 and its like, which it takes for line ends.
        return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line]
    if path.is_file():
        raise ValueError(f"data file ({name_or_path!r}) must end in {' or '.join(_FILE_SUFFIXES)}; convert it first")
    from datasets import load_dataset  # heavy, and not needed for files

    return load_dataset(name_or_path, split=split)


def _to_row(index: int, record: Mapping[str, Any]) -> Row:
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
    elif "instruction" in record and "output" in record:
        prompt, completion = record["instruction"], record["output"]
        if record.get("input"):
            prompt = f"{prompt}\n\n{record['input']}"
    else:
        raise ValueError(
            f"record {index} has the columns {sorted(record)} and must have instruction and output (input optional), "
            "or prompt and completion; rename them first"
        )
    return Row(example_id=index, prompt=prompt, completion=completion)


def split_rows(rows: Sequence[Row], *, num_train: int, num_meta: int, num_heldout: int, seed: int) -> Split:
    """Draw three disjoint parts at random.

    Args:
        rows: Rows to draw from; those left over are not used.
        num_train: Size of the training part.
        num_meta: Size of the clean part that the upper level learns from.
        num_heldout: Size of the part for evaluation.
        seed: Same seed and rows, same parts.

    Returns:
        The parts.

    Raises:
        ValueError: If a size is negative or the rows are too few.
    """
    sizes = {"num_train": num_train, "num_meta": num_meta, "num_heldout": num_heldout}
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name} ({size}) must not be negative")
    if sum(sizes.values()) > len(rows):
        terms = " + ".join(f"{name} ({size})" for name, size in sizes.items())
        raise ValueError(f"{terms} must be at most the number of rows ({len(rows)}); ask for fewer or raise max_length")
    order = random.Random(seed).sample(range(len(rows)), sum(sizes.values()))
    drawn = [rows[index] for index in order]
    return Split(drawn[:num_train], drawn[num_train : num_train + num_meta], drawn[num_train + num_meta :])


def corrupt(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[bool]]:
    """Shuffle the answers among a random subset of the rows, so that none of these keeps its own.

    Prompts, answers and ids stay what they were as sets; only the pairing becomes wrong. Equal answers in different
    rows count as the same answer, so an exchange between them is not taken for a corruption.

    Args:
        rows: Clean rows.
        fraction: Of the rows to corrupt, in [0, 1]; rounded to a number of rows.
        seed: Same seed and rows, same corruption.

    Returns:
        The rows in their order, and for each whether its answer was replaced.

    Raises:
        ValueError: If the fraction is outside [0, 1], selects a single row, or one answer is that of more than half
            of the selected rows.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction ({fraction}) must be in [0, 1]")
    generator = random.Random(seed)
    chosen = generator.sample(range(len(rows)), round(fraction * len(rows)))
    corrupted, mask = list(rows), [False] * len(rows)
    for receiver, giver in _exchange(chosen, rows, fraction, generator):
        # A new row: the caller's clean rows must stay clean.
        corrupted[receiver] = Row(
            example_id=rows[receiver]["example_id"],
            prompt=rows[receiver]["prompt"],
            completion=rows[giver]["completion"],
        )
        mask[receiver] = True
    return corrupted, mask


def _exchange(
    chosen: list[int], rows: Sequence[Row], fraction: float, generator: random.Random
) -> list[tuple[int, int]]:
    """Pairs (receiver, giver). Rotating groups of equal answers by the largest group's size separates all of them."""
    if not chosen:
        return []
    by_answer = sorted(chosen, key=lambda index: rows[index]["completion"])
    groups = [list(group) for _, group in groupby(by_answer, key=lambda index: rows[index]["completion"])]
    largest = max(len(group) for group in groups)
    if 2 * largest > len(chosen):
        raise ValueError(
            f"fraction ({fraction}) of {len(rows)} rows selects {len(chosen)}, of which {largest} have the same "
            "answer; at most half may, else some row would keep its own: change the fraction or remove duplicates"
        )
    for group in groups:
        generator.shuffle(group)
    generator.shuffle(groups)
    receivers = [index for group in groups for index in group]
    return list(zip(receivers, receivers[largest:] + receivers[:largest], strict=True))


def tokenize(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, chat_template: str | None = None
) -> TokenizedRow:
    """Render a row with the chat template and tokenize it; only the completion has labels.

    Prompt and completion are tokenized apart, so that the border between them is the one at generation.

    Args:
        row: The row.
        tokenizer: With a chat template, unless one is given.
        system: System message; `None` leaves it to the template, which may insert one of its own.
        chat_template: Jinja template in place of the tokenizer's.

    Returns:
        T token ids, of any length T.

    Raises:
        ValueError: If there is no template, or it renders the prompt differently once the answer is known.
    """
    if chat_template is None and tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat_template (a base model?); pass chat_template")
    messages = [{"role": "user", "content": row["prompt"]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    answered = [*messages, {"role": "assistant", "content": row["completion"]}]
    prompt = str(
        tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False, add_generation_prompt=True)
    )
    whole = str(tokenizer.apply_chat_template(answered, chat_template=chat_template, tokenize=False))
    if not whole.startswith(prompt):
        raise ValueError(
            f"chat_template renders the prompt of example {row['example_id']} differently with and without its answer "
            f"({prompt[-40:]!r} does not begin it), so that the labels' start is unknown; pass another chat_template"
        )
    # Templates end in a newline after the end-of-turn token; it is never generated, so it deserves no label.
    completion_ids = tokenizer(whole[len(prompt) :].rstrip(), add_special_tokens=False)["input_ids"]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return TokenizedRow(
        example_id=row["example_id"],
        input_ids=prompt_ids + completion_ids,
        labels=[IGNORE_INDEX] * len(prompt_ids) + completion_ids,
    )


def keep_short(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    system: str | None = None,
    chat_template: str | None = None,
) -> list[Row]:
    """Keep the rows of at most `max_length` tokens, so that demonstrations run on a CPU and nothing is truncated.

    Filter before `split_rows`. After `corrupt` a row holds another answer and may be longer than `max_length` again.

    Args:
        rows: Rows to filter.
        tokenizer: As in `tokenize`.
        max_length: Tokens, prompt and template included.
        system: As in `tokenize`.
        chat_template: As in `tokenize`.

    Returns:
        The rows that fit, in their order.
    """

    def num_tokens(row: Row) -> int:
        return len(tokenize(row, tokenizer, system=system, chat_template=chat_template)["input_ids"])

    return [row for row in rows if num_tokens(row) <= max_length]


class InstructionDataset(Dataset[TokenizedRow]):
    """Tokenized rows, truncated on the right.

    Rows whose prompt alone fills `max_length` would keep no label; they are dropped, counted and logged.

    Attributes:
        num_dropped: Rows dropped.
        num_truncated: Rows kept without the end of their answer.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 512,
        system: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Tokenize everything at once (half a millisecond a row).

        Args:
            rows: Rows.
            tokenizer: As in `tokenize`.
            max_length: Tokens kept of each row.
            system: As in `tokenize`.
            chat_template: As in `tokenize`.

        Raises:
            ValueError: If no row keeps a label.
        """
        whole = [tokenize(row, tokenizer, system=system, chat_template=chat_template) for row in rows]
        cut = [_truncate(row, max_length) for row in whole]
        self._rows = [row for row in cut if has_target(row["labels"])]
        self.num_dropped = len(rows) - len(self._rows)
        kept = {row["example_id"] for row in self._rows}
        self.num_truncated = sum(row["example_id"] in kept and len(row["input_ids"]) > max_length for row in whole)
        if not self._rows:
            raise ValueError(
                f"max_length ({max_length}) leaves no answer token in any of {len(rows)} rows, whose prompts must be "
                "shorter than it; raise it"
            )
        if self.num_dropped or self.num_truncated:
            logger.warning(
                "max_length %d: dropped %d of %d rows (prompt too long), truncated the answers of %d",
                max_length,
                self.num_dropped,
                len(rows),
                self.num_truncated,
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TokenizedRow:
        return self._rows[index]


def _truncate(row: TokenizedRow, max_length: int) -> TokenizedRow:
    return TokenizedRow(
        example_id=row["example_id"],
        input_ids=row["input_ids"][:max_length],
        labels=row["labels"][:max_length],
    )
