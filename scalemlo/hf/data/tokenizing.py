"""From one row to token ids and labels, as TRL's trainers make them.

Plain text gets the end-of-sequence token at its end if it has none; conversations are rendered by the chat template.
Prompt and completion are tokenised together, and the completion begins where the prompt's own tokens end or differ.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..losses.next_token import IGNORE_INDEX
from .collate import has_target
from .columns import Format, is_conversational

logger = logging.getLogger(__name__)


class TokenSequence(NamedTuple):
    """Token ids and labels of one sequence, T each; labels are None where the sequence has a class instead."""

    ids: list[int]
    labels: list[int] | None

    def beginning(self, length: int | None) -> TokenSequence:
        """The first ``length`` tokens; None: all."""
        return TokenSequence(self.ids[:length], None if self.labels is None else self.labels[:length])

    @property
    def is_usable(self) -> bool:
        """Whether there is something to predict."""
        return bool(self.ids) if self.labels is None else has_target(self.labels)


class Encoded(NamedTuple):
    """One row: its sequences by the prefix of their columns, and what else it has."""

    sequences: dict[str, TokenSequence]
    scalars: dict[str, int]


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, pad_token: str | None = None) -> int:
    """Give a tokenizer a pad token if it has none: the end-of-sequence token, as TRL does.

    That is safe here: labels and attention masks come from lengths, never from comparing ids with the pad id.

    Args:
        tokenizer: Changed in place.
        pad_token: One of its tokens to use instead.

    Returns:
        The id of the pad token.

    Raises:
        ValueError: If the tokenizer has neither a pad nor an end-of-sequence token, or does not know ``pad_token``.
    """
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ValueError(f"pad_token={pad_token!r} is not in the vocabulary; choose one that is, or add it first")
        tokenizer.pad_token = pad_token
    elif tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has neither pad_token nor eos_token, so that batches "
                "cannot be padded; set one in its tokenizer_config.json, or pass pad_token"
            )
        logger.info("the tokenizer has no pad token; its eos_token (%s) is used", tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return int(tokenizer.pad_token_id)


@dataclass
class RowTokenizer:
    """Tokenises rows of one format.

    Args:
        tokenizer: Of the model; of a processor, its tokenizer is taken.
        format: The rows' format.
        is_chat: Whether they hold messages.
        completion_only_loss: Whether the prompt has no labels; None: it has none where there is a completion.
        assistant_only_loss: Whether only the assistant's messages have labels.
        chat_template: In the place of the tokenizer's.

    Raises:
        ValueError: If an option does not fit the format, or the chat template is missing or has no
            ``{% generation %}`` where it must.
    """

    tokenizer: PreTrainedTokenizerBase
    format: Format
    is_chat: bool
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    chat_template: str | None = None
    _has_warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.tokenizer = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        name, has_completion = self.format.name, self.format.name == "prompt_completion"
        may_mask = has_completion or name == "tokenized"
        if self.completion_only_loss and not may_mask:
            raise ValueError(
                f"completion_only_loss=True needs prompt + completion, and the format is {name}; leave it at None, or "
                "use assistant_only_loss=True for conversations"
            )
        if self.assistant_only_loss and not self.is_chat and name != "tokenized":
            raise ValueError(f"assistant_only_loss=True needs conversations, and the {name} rows hold plain text")
        if self.assistant_only_loss and self.format.kind != "language_modeling":
            raise ValueError(f"assistant_only_loss=True has no meaning for the format {name}; leave it out")
        if self.completion_only_loss is None:
            self.completion_only_loss = may_mask
        if self.is_chat:
            self._check_template()

    def _check_template(self) -> None:
        template: Any = self.chat_template or self.tokenizer.chat_template
        if template is None:
            raise ValueError(
                "the rows are conversations and the tokenizer has no chat_template (a base model?); pass "
                "chat_template, or load the tokenizer of the instruction-tuned model"
            )
        if isinstance(template, dict):
            template = template.get("default", "")
        if self.assistant_only_loss and re.search(r"\{%-?\s*generation\s*-?%\}", template) is None:
            raise ValueError(
                "assistant_only_loss=True needs a chat_template that marks what the assistant says with "
                "{% generation %} ... {% endgeneration %}; pass such a chat_template, or give prompt + completion"
            )

    def __call__(self, row: Mapping[str, Any], where: str) -> Encoded:
        """Tokenise a row.

        Args:
            row: Its columns, named as the format names them.
            where: Names the row in messages.

        Returns:
            Its sequences, of any length.

        Raises:
            ValueError: If a column is missing or of a wrong type.
        """
        for column in self.format.required:
            if row.get(column) is None or row[column] != row[column]:  # NaN: how pandas says missing
                raise ValueError(
                    f"{where} has no {column!r}; its columns are {list(row)}. Fill it, or filter such rows."
                )
        return _ENCODERS[self.format.name](self, row, where)

    # ---- by format -------------------------------------------------------------------------------------------------
    def _tokenized(self, row: Mapping[str, Any], where: str) -> Encoded:
        ids, columns = list(row["input_ids"]), {}
        for column in self.format.optional:
            if row.get(column) is not None:
                columns[column] = list(row[column])
                if len(columns[column]) != len(ids):
                    raise ValueError(f"{where}: {column} has {len(columns[column])} entries for {len(ids)} input_ids.")
        keep = columns.pop("attention_mask", [1] * len(ids))
        labels = columns.pop("labels", None)
        if not self.completion_only_loss:
            columns.pop("completion_mask", None)
        if labels is None:
            labels = [i if all(bits) else IGNORE_INDEX for i, *bits in zip(ids, *columns.values(), strict=True)]
        seen = [i for i, bit in enumerate(keep) if bit]  # padding, on whichever side, is the collator's
        return _one([ids[i] for i in seen], [labels[i] for i in seen])

    def _text(self, row: Mapping[str, Any], where: str) -> Encoded:
        ids = self._ids(_ended(_text_of(row, "text", where), self.tokenizer))
        return _one(ids, list(ids))

    def _messages(self, row: Mapping[str, Any], where: str) -> Encoded:
        messages = _chatml(row[self.format.required[0]], where)
        ids, mask = self._rendered(messages, row)
        return _one(ids, _masked(ids, mask))

    def _prompt_completion(self, row: Mapping[str, Any], where: str) -> Encoded:
        prompt, completion = self._side(row, "prompt", where), self._side(row, "completion", where)
        start, ids, mask = self._completed(prompt, completion, row)
        if self.completion_only_loss:
            mask = [0] * start + mask[start:]
        return _one(ids, _masked(ids, mask))

    def _preference(self, row: Mapping[str, Any], where: str) -> Encoded:
        sides = {side: self._side(row, side, where) for side in ("chosen", "rejected")}
        if row.get("prompt") is not None:
            prompt = self._side(row, "prompt", where)
        else:  # implicit: what both begin with
            length = common_prefix_length(sides["chosen"], sides["rejected"])
            prompt = sides["chosen"][:length]
            sides = {side: value[length:] for side, value in sides.items()}
        sequences = {}
        for side, completion in sides.items():
            start, ids, mask = self._completed(prompt, completion, row)
            sequences[f"{side}_"] = TokenSequence(ids, _masked(ids, [0] * start + mask[start:]))
        return Encoded(sequences, {})

    def _classification(self, row: Mapping[str, Any], where: str) -> Encoded:
        label = row["label"]
        if not isinstance(label, int) or label < 0:
            raise ValueError(
                f"{where}: label is {label!r} and must be a class from 0 on; map names to numbers, or use "
                "format='text' to train a language model on the text"
            )
        pair = None if row.get("text_pair") is None else _text_of(row, "text_pair", where)
        ids = list(self.tokenizer(_text_of(row, "text", where), pair)["input_ids"])
        return Encoded({"": TokenSequence(ids, None)}, {"label": int(label)})

    # ---- parts -----------------------------------------------------------------------------------------------------
    def _side(self, row: Mapping[str, Any], column: str, where: str) -> Any:
        """Text, or messages, as the first row has them."""
        if is_conversational(row[column]) != self.is_chat and row[column] not in ("", []):
            raise ValueError(
                f"{where}: {column} must be {'messages' if self.is_chat else 'text'}, as in the first row."
            )
        return _chatml(row[column], where) if self.is_chat else _text_of(row, column, where)

    def _completed(self, prompt: Any, completion: Any, row: Mapping[str, Any]) -> tuple[int, list[int], list[int]]:
        """Where the completion starts, the ids of both together, and which of them may have labels."""
        if self.is_chat:
            before, _ = self._rendered(prompt, row, add_generation_prompt=True) if prompt else ([], [])
            ids, mask = self._rendered([*prompt, *completion], row)
        else:
            before = self._ids(prompt)
            ids = self._ids(prompt + _ended(completion, self.tokenizer))
            mask = [1] * len(ids)
        start = common_prefix_length(before, ids)
        if start < len(before) and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the prompt's tokens are not the first of prompt and completion together (the chat template renders it "
                "differently, or tokens merge across the border); the completion starts where they differ, here at %r",
                self.tokenizer.decode(before[start:]),
            )
        return start, ids, mask

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any], **options: Any
    ) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and which of them may have labels."""
        tools = row.get("tools")
        result: Any = self.tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            chat_template=self.chat_template,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=self.assistant_only_loss,
            **(row.get("chat_template_kwargs") or {}),
            **options,
        )
        ids = list(result["input_ids"])
        return ids, list(result["assistant_masks"]) if self.assistant_only_loss else [1] * len(ids)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])


_ENCODERS = {
    "tokenized": RowTokenizer._tokenized,
    "text": RowTokenizer._text,
    "messages": RowTokenizer._messages,
    "conversations": RowTokenizer._messages,
    "prompt_completion": RowTokenizer._prompt_completion,
    "preference": RowTokenizer._preference,
    "classification": RowTokenizer._classification,
}


def common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Number of items at the beginning that two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _one(ids: list[int], labels: list[int]) -> Encoded:
    return Encoded({"": TokenSequence(ids, labels)}, {})


def _masked(ids: Sequence[int], mask: Sequence[int]) -> list[int]:
    return [i if bit else IGNORE_INDEX for i, bit in zip(ids, mask, strict=True)]


def _ended(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    end = tokenizer.eos_token
    return text if end is None or text.endswith(end) else text + end


def _text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"{where}: {column} is a {type(row[column]).__name__} and must be text.")
    return row[column]


def _chatml(messages: Any, where: str) -> list[dict[str, Any]]:
    """Messages with ``role`` and ``content``, where ``from`` and ``value`` may stand for them."""
    if not isinstance(messages, (list, tuple)) or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(f"{where} must hold a list of messages, each a dict with role and content.")
    names = {"from": "role", "value": "content"}
    # Arrow fills the keys that other messages have (tool_calls, say) with None.
    return [{names.get(key, key): value for key, value in m.items() if value is not None} for m in messages]
