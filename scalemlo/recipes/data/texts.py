"""Texts as bytes, and a language model of them that trains on a CPU in seconds."""

import json
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runs.assets import fetch

TextSource = Literal["code", "wiki", "web", "instructions", "noise"]
"""``code``: the standard library of Python; ``wiki``, ``web`` and ``instructions``: demos of ``scalemlo assets``;
``noise``: printable characters drawn at random."""

NUM_WORDS = 128  # ASCII


def load_text(source: TextSource, num_characters: int) -> str:
    """The beginning of a text, in ASCII; what is no ASCII becomes a question mark.

    Args:
        source: Which text; the same on every call.
        num_characters: Its length.

    Returns:
        The text.

    Raises:
        ValueError: If the source is shorter.
    """
    text = _LOADERS[source](num_characters)[:num_characters]
    if len(text) < num_characters:
        raise ValueError(f"{source} has {len(text)} characters, {num_characters} were asked for; ask for fewer")
    return text.encode("ascii", "replace").decode()


def _code(num_characters: int) -> str:
    parts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        if sum(map(len, parts)) >= num_characters:
            break
    return "".join(parts)


def _web(num_characters: int) -> str:
    return "\n".join(json.loads(line)["text"] for line in fetch("c4_demo").read_text().splitlines())


def _instructions(num_characters: int) -> str:
    rows = json.loads(fetch("alpaca_en_demo").read_text())
    return "\n".join(f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows)


def _noise(num_characters: int) -> str:
    return noise(num_characters, np.random.default_rng(0)).tobytes().decode()


_LOADERS: Mapping[str, Callable[[int], str]] = {
    "code": _code,
    "wiki": lambda num_characters: fetch("wiki_demo").read_text(),
    "web": _web,
    "instructions": _instructions,
    "noise": _noise,
}


def noise(size: int, generator: np.random.Generator) -> np.ndarray:
    """Printable characters drawn at random, as bytes ``[size]``."""
    return generator.integers(32, 127, size).astype(np.uint8)


def windows(text: str, length: int) -> Tensor:
    """Cut a text into pieces ``[N, length]`` that do not overlap."""
    codes = np.frombuffer(text.encode(), np.uint8)
    count = len(codes) // length
    return torch.from_numpy(codes[: count * length].astype(np.int64)).view(count, length)


class CharacterModel(nn.Module):
    """Predicts a character from those before it: embeddings side by side, one hidden layer.

    On two cores it learns more in a minute than a transformer of its size. Reference: Bengio et al. 2003, "A Neural
    Probabilistic Language Model".

    Args:
        num_context: How many characters it sees.
        embedding_size: Of a character.
        hidden_size: Of the layer.
    """

    def __init__(self, num_context: int = 8, embedding_size: int = 16, hidden_size: int = 128):
        super().__init__()
        self.num_context = num_context
        self.embed = nn.Embedding(NUM_WORDS, embedding_size)
        self.hidden = nn.Linear(num_context * embedding_size, hidden_size)
        self.out = nn.Linear(hidden_size, NUM_WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[B, T, NUM_WORDS]`` of the character after each of ``ids [B, T]``."""
        before = F.pad(self.embed(ids), (0, 0, self.num_context - 1, 0))
        seen = before.unfold(1, self.num_context, 1).flatten(2)  # [B, T, E * num_context]
        return self.out(F.gelu(self.hidden(seen)))


def text_losses(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Mean loss ``[B]`` of every text ``ids [B, T]``, in nats per character."""
    logits = model(ids)[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


@torch.no_grad()
def all_losses(model: Callable[[Tensor], Tensor], ids: Tensor, batch_size: int = 256) -> Tensor:
    """Losses of texts ``ids [N, T]``, some at a time."""
    return torch.cat([text_losses(model, part) for part in ids.split(batch_size)])


def split_off(ids: Tensor, counts: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """Draw disjoint parts of some sizes from the rows of ``ids``, and last what is left."""
    order = torch.randperm(len(ids), generator=generator)
    return [ids[rows] for rows in order.split([*counts, len(ids) - sum(counts)])]
