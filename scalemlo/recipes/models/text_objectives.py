"""A small text encoder on frozen word vectors, and three objectives that it is pretrained with.

References: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"
(arXiv:1810.04805), for hidden words; Gao, Yao and Chen 2021, "SimCSE: Simple Contrastive Learning of Sentence
Embeddings" (arXiv:2104.08821), for the contrast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scalemlo as mlo

from .vision_transformer import Block, draw_order, vector

OBJECTIVES = ("hidden words", "contrast", "order")
UNKNOWN, PAD = 0, -1
"""Numbers of what is no frequent word, and of what is none."""


class TextEncoder(nn.Module):
    """A transformer on frozen word vectors.

    Args:
        words: The vectors ``[W, E]``.
        length: T, at most.
        dim: Width D.
        depth: Blocks.
    """

    words: Tensor

    def __init__(self, words: Tensor, length: int, dim: int, depth: int):
        super().__init__()
        self.register_buffer("words", words)
        self.hidden = nn.Parameter(torch.zeros(words.shape[1]))  # stands for a hidden word
        self.embed = nn.Linear(words.shape[1], dim)
        self.positions = nn.Parameter(0.1 * torch.randn(length, dim))
        self.blocks = nn.ModuleList(Block(dim, 4) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor, is_hidden: Tensor | None = None) -> Tensor:
        """States ``[B, T, D]`` of words ``ids [B, T]``, those with ``is_hidden [B, T]`` not shown."""
        vectors = F.embedding(ids.clamp(min=0), self.words)
        if is_hidden is not None:
            vectors = torch.where(is_hidden.unsqueeze(2), self.hidden, vectors)
        states = self.embed(vectors) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            states = block(states, ids != PAD)
        return self.norm(states)

    def features(self, ids: Tensor, is_hidden: Tensor | None = None) -> Tensor:
        """Mean state ``[B, D]`` of the words."""
        is_word = (ids != PAD).unsqueeze(2)
        return (self(ids, is_hidden) * is_word).sum(1) / is_word.sum(1)


class Pretrainer(nn.Module):
    """An encoder and a head for each objective.

    Args:
        encoder: What is pretrained.
    """

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.encoder = encoder
        self.to_words = nn.Linear(encoder.embed.out_features, encoder.words.shape[1])
        self.is_shuffled = nn.Linear(encoder.embed.out_features, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Losses ``[B, K]`` of sentences ``[B, T]`` by objective."""
        return torch.stack([self._hidden_words(ids), self._contrast(ids), self._order(ids)], 1)

    def _hidden_words(self, ids: Tensor, num_hidden: int = 3) -> Tensor:
        places = _shuffle(ids)[:, :num_hidden]
        is_hidden = torch.zeros_like(ids, dtype=torch.bool).scatter(1, places, True)
        states = self.encoder(ids, is_hidden)
        found = states.gather(1, places.unsqueeze(2).expand(-1, -1, states.shape[2]))
        words = self.encoder.words
        logits = self.to_words(found) @ words.T / words.shape[1] ** 0.5  # [B, M, W]
        target = ids.gather(1, places)
        each = F.cross_entropy(logits.flatten(0, 1), target.clamp(min=0).flatten(), reduction="none").view_as(target)
        is_word = target != PAD
        return (each * is_word).sum(1) / is_word.sum(1)

    def _contrast(self, ids: Tensor, temperature: float = 0.1) -> Tensor:
        views = []
        for _ in range(2):
            is_hidden = mlo.sample(torch.distributions.Bernoulli(torch.full(ids.shape, 1 / 3, device=ids.device)))
            views.append(F.normalize(self.encoder.features(ids, is_hidden.bool()), dim=1))
        return F.cross_entropy(
            views[0] @ views[1].T / temperature, torch.arange(len(ids), device=ids.device), reduction="none"
        )

    def _order(self, ids: Tensor) -> Tensor:
        is_shuffled = mlo.sample(torch.distributions.Bernoulli(torch.full((len(ids), 1), 0.5, device=ids.device)))
        shown = torch.where(is_shuffled.bool(), ids.gather(1, _shuffle(ids)), ids)
        logits = self.is_shuffled(self.encoder.features(shown))
        return F.binary_cross_entropy_with_logits(logits, is_shuffled.to(logits.dtype), reduction="none").squeeze(1)

    def encoder_vector(self) -> Tensor:
        """The encoder's parameters as one vector."""
        return vector(self.encoder)


def _shuffle(ids: Tensor) -> Tensor:
    """Numbers ``[B, T]`` of the words of every sentence in random order, padding last."""
    return draw_order(torch.where(ids == PAD, -1e4, 0.0))


class TextClassifier(nn.Module):
    """An encoder and a linear layer for two classes.

    Args:
        encoder: Gives features.
    """

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.encoder = encoder
        self.encoder.hidden.requires_grad_(False)  # classifiers see every word
        self.head = nn.Linear(encoder.embed.out_features, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[B, 2]`` of sentences ``[B, T]``."""
        return self.head(self.encoder.features(ids))

    def encoder_vector(self) -> Tensor:
        """The encoder's parameters as one vector."""
        return vector(self.encoder)
