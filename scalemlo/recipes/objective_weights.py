"""Go on pretraining a text encoder with several objectives, learning how much each counts from few labels.

Three levels: an encoder W is pretrained on sentences without labels with K objectives, weighted by p = softmax(theta);
a classifier V is fine-tuned near it; and the weights are trained so that V does well on labels that it has not seen:

    min_theta  mean_j l_j(V*(theta))                            over one half of the labels
    s.t.       V*(theta) = argmin_V  mean_k l_k(V) + c/2 |V - W*(theta)|^2     over the other half
               W*(theta) = argmin_W  sum_k p_k(theta) L_k(W)

The objectives: hidden words are to be found among all words; two views of a sentence, each with a third of its words
hidden, to be told from those of other sentences; and shuffled sentences to be told from others. The word vectors are
MiniLM's, frozen; the transformer above them is small and begins at random.

Baselines with as many steps, fine-tuned in the same way on all labels: no such pretraining; all objectives alike; each
one alone.

Reference: Zhang, Somayajula and Xie 2024, "TapWeight: Reweighting Pretraining Objectives for Task-Adaptive Pretraining"
(arXiv:2410.10006). There the encoder is a large pretrained model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import scalemlo as mlo

from ..distributed.ranks import Ranks
from ..runs import config as cfg
from ..runs.assets import fetch
from .data.images import accuracy
from .data.reviews import load_reviews, split_by_movie
from .models.text_objectives import OBJECTIVES, PAD, UNKNOWN, Pretrainer, TextClassifier, TextEncoder
from .study.classification import Fit, losses
from .study.picture import BASELINE, METHOD
from .study.recipe import Recipe
from .study.study import Cell, ComparisonConfig, Outcome, compared

TAPWEIGHT = "TapWeight"


@dataclass(kw_only=True)
class ObjectiveWeightsConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        num_unlabelled: Sentences for pretraining.
        num_labelled: Sentences with labels; one half trains the classifier in the middle, the other the weights.
        score_on: ``test`` sentences count, or for the choice of settings, those of other movies.
        num_words: The most frequent word pieces, of which the others are one more.
        length: Word pieces of a sentence; what is longer is cut.
        dim: Width of the encoder.
        depth: Blocks of the encoder.
        steps: Steps of every level.
        finetune_steps: Steps of fine-tuning at last.
        batch_size: Sentences per step.
        proximity: c.
        encoder: The optimizer of the encoder, and of the classifier in the middle.
        finetune: The optimizer of fine-tuning at last.
        weights: The optimizer of the weights.
        hypergradient: How encoder and classifier are differentiated through.
    """

    num_unlabelled: int = 4000
    num_labelled: int = 400
    score_on: Literal["test", "validation"] = "test"
    num_words: int = 2000
    length: int = 24
    dim: int = 32
    depth: int = 1
    steps: int = 300
    finetune_steps: int = 100
    batch_size: int = 32
    proximity: float = 0.1
    encoder: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    finetune: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    weights: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["identity"])


class Weights(nn.Module):
    """Weights of the objectives, which sum to one, all alike at the start."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(OBJECTIVES)))

    def forward(self) -> Tensor:
        """The weights ``[K]``."""
        return self.logits.softmax(0)


# ---- levels ----------------------------------------------------------------------------------------------------------
class Weigh(mlo.Level):
    """Upper level: the fine-tuned classifier should do well on labels that it has not seen."""

    def loss(self, batch, classifier):
        """Mean loss."""
        return mlo.mean(losses(classifier, batch))


class Pretrain(mlo.Level):
    """Middle level: every objective counts as much as its weight says."""

    def loss(self, batch, weights):
        """``sum_k p_k L_k``."""
        found = self.module(batch[0])
        return mlo.weighted_mean(found.flatten(), found.shape[1] * weights().repeat(len(found)), normalize=False)


class Finetune(mlo.Level):
    """Lower level: labels, near the pretrained encoder."""

    proximity: float

    def loss(self, batch, encoder: mlo.Upper):
        """Mean loss and distance."""
        distance = (self.module.encoder_vector() - encoder.encoder_vector()).square().sum() / 2
        return mlo.mean(losses(self.module, batch)) + self.proximity * distance


class PretrainFixed(mlo.Level):
    """A baseline: pretraining with weights ``[K]`` that stay as they are."""

    weights: Tensor

    def loss(self, batch):
        """``sum_k p_k L_k``."""
        return mlo.mean(self.module(batch[0]) @ self.weights.to(batch[0].device))


# ---- data ------------------------------------------------------------------------------------------------------------
@dataclass
class Split:
    """Sentences; all parts but ``unlabelled`` with labels. ``labelled`` is made of ``first`` and ``second``."""

    words: Tensor
    unlabelled: TensorDataset
    labelled: TensorDataset
    first: TensorDataset
    second: TensorDataset
    scored: TensorDataset


def split(config: ObjectiveWeightsConfig, seed: int) -> Split:
    """Draw the parts; no movie is in two of training, validation and test."""
    frame, pieces = _reviews(config.length)
    movies = split_by_movie(frame.movie.to_numpy(), seed=0)
    order = torch.from_numpy(movies.train)[torch.randperm(len(movies.train), generator=_generator(seed))]
    rows = order[: config.num_labelled]
    unlabelled = order[config.num_labelled :][: config.num_unlabelled]
    ids, words = frequent_words(pieces, order, config.num_words)
    labels = torch.tensor(frame.label.to_numpy())
    half = len(rows) // 2

    def labelled(rows: Tensor) -> TensorDataset:
        return TensorDataset(ids[rows], labels[rows])

    scored = movies.test if config.score_on == "test" else movies.dev
    parts = map(labelled, (rows, rows[:half], rows[half:], torch.from_numpy(scored)))
    return Split(words, TensorDataset(ids[torch.cat([unlabelled, rows])]), *parts)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def _reviews(length: int) -> tuple[pd.DataFrame, Tensor]:
    """The sentences, and their word pieces ``[N, length]`` or shorter, padded with :data:`PAD`."""
    from tokenizers import Tokenizer

    frame = load_reviews(fetch("rotten_tomatoes"))
    tokenizer = Tokenizer.from_file(str(fetch("minilm-l6-v2") / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    found = tokenizer.encode_batch(frame.text.tolist(), add_special_tokens=False)
    return frame, nn.utils.rnn.pad_sequence(
        [torch.tensor(e.ids) for e in found], batch_first=True, padding_value=PAD
    )  # fmt: skip


def frequent_words(pieces: Tensor, train: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
    """Number the most frequent word pieces, and take their vectors.

    Args:
        pieces: Sentences ``[N, T]`` of MiniLM's word pieces.
        train: Rows by which the most frequent ones are chosen.
        num_words: How many.

    Returns:
        Numbers ``[N, T]``, all others :data:`UNKNOWN`, and vectors ``[1 + num_words, E]`` of mean square 1.
    """
    from safetensors import safe_open

    seen = pieces[train]
    frequent = torch.bincount(seen[seen != PAD]).argsort(descending=True, stable=True)[:num_words]
    with safe_open(fetch("minilm-l6-v2") / "model.safetensors", "pt") as file:
        name = next(n for n in file.keys() if n.endswith("word_embeddings.weight"))  # noqa: SIM118
        table = file.get_tensor(name).float()
    number = torch.full((len(table) + 1,), UNKNOWN)  # of a word piece; the last one stands for PAD
    number[frequent] = torch.arange(1, len(frequent) + 1)
    number[PAD] = PAD
    vectors = torch.cat([table[frequent].mean(0, keepdim=True), table[frequent]])
    return number[pieces], vectors / vectors.square().mean().sqrt()


# ---- arms ------------------------------------------------------------------------------------------------------------
def tapweight(cell: Cell[ObjectiveWeightsConfig]) -> Outcome:
    """The three levels, then fine-tuning of the encoder."""
    data = split(cell.config, cell.seed)
    program = three_levels(cell, data)
    cell.train(program, cell.config.steps)
    with program.inference("weights") as weights:
        found = weights().cpu().numpy()
    return Outcome(_finetuned(cell, data, _trained(cell, data, program)), {"weights": found})


def three_levels(cell: Cell[ObjectiveWeightsConfig], data: Split) -> mlo.Program:
    """The program; V begins where W does."""
    config = cell.config
    encoder, copy = _encoder(config, data), _encoder(config, data)
    copy.load_state_dict(encoder.state_dict())
    upper = Weigh("weights", Weights(), data=_loader(config, data.second), optimizer=config.weights.optimizer())
    middle = Pretrain(
        "encoder", hypergradient=config.hypergradient.build(), **_options(config, Pretrainer(encoder), data)
    )
    lower = Finetune(
        "classifier",
        TextClassifier(copy),
        data=_loader(config, data.first),
        optimizer=config.encoder.optimizer(),
        scheduler=config.encoder.scheduler(config.steps),
        hypergradient=config.hypergradient.build(),
    )
    lower.proximity = config.proximity
    return cell.program([upper, middle, lower])


def fixed(cell: Cell[ObjectiveWeightsConfig], *, weights: tuple[float, ...] | None) -> Outcome:
    """A baseline.

    Args:
        cell: The arm and its seed.
        weights: Of the objectives; None leaves pretraining out.

    Returns:
        What it found.
    """
    data, config = split(cell.config, cell.seed), cell.config
    if weights is None:
        return Outcome(_finetuned(cell, data, _encoder(config, data)))
    level = PretrainFixed("encoder", allow_unused=True, **_options(config, Pretrainer(_encoder(config, data)), data))
    level.weights = torch.tensor(weights)
    program = cell.program([level])
    cell.train(program, config.steps)
    return Outcome(_finetuned(cell, data, _trained(cell, data, program)))


def _trained(cell: Cell[ObjectiveWeightsConfig], data: Split, program: mlo.Program) -> TextEncoder:
    pretrainer = Pretrainer(_encoder(cell.config, data))
    pretrainer.load_state_dict(Ranks().from_main(program.state_dict("encoder")))
    return pretrainer.encoder


def _encoder(config: ObjectiveWeightsConfig, data: Split) -> TextEncoder:
    return TextEncoder(data.words, config.length, config.dim, config.depth)


def _loader(config: ObjectiveWeightsConfig, data: TensorDataset) -> DataLoader:
    return DataLoader(data, min(config.batch_size, len(data)), shuffle=True, drop_last=True)


def _options(config: ObjectiveWeightsConfig, module: Pretrainer, data: Split) -> dict:
    return dict(
        module=module,
        data=_loader(config, data.unlabelled),
        optimizer=config.encoder.optimizer(),
        scheduler=config.encoder.scheduler(config.steps),
    )


def _finetuned(cell: Cell[ObjectiveWeightsConfig], data: Split, encoder: TextEncoder) -> dict[str, float]:
    config = cell.config
    level = Fit(
        "classifier",
        TextClassifier(encoder),
        data=_loader(config, data.labelled),
        optimizer=config.finetune.optimizer(),
        scheduler=config.finetune.scheduler(config.finetune_steps),
    )
    program = cell.program([level])

    def evaluate() -> Mapping[str, float]:
        with program.inference("classifier") as module:
            return {"accuracy, %": 100 * accuracy(module, *(t.to(program.device) for t in data.scored.tensors))}

    return cell.train(program, config.finetune_steps, evaluate)


def draw(axes, outcomes) -> None:
    """The learned weight of every objective, a dot a seed."""
    for outcome in outcomes.get(TAPWEIGHT, ()):
        axes.scatter(range(len(OBJECTIVES)), outcome.arrays["weights"], color=METHOD, alpha=0.6, s=42, zorder=3)
    axes.axhline(1 / len(OBJECTIVES), color=BASELINE, linewidth=1, linestyle="--")
    axes.annotate("at first", (len(OBJECTIVES) - 0.5, 1 / len(OBJECTIVES)), ha="right", va="bottom", fontsize=8)
    axes.set_title("Weight of an objective, a dot a seed", fontsize=10, loc="left")
    axes.set_xticks(range(len(OBJECTIVES)), list(OBJECTIVES))
    axes.set_xlim(-0.5, len(OBJECTIVES) - 0.5)
    axes.set_ylim(0, 1)
    axes.grid(axis="y", color="#e3e5e8", zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


ALIKE = (1 / len(OBJECTIVES),) * len(OBJECTIVES)
ARMS = {
    "no pretraining": partial(fixed, weights=None),
    "objectives alike": partial(fixed, weights=ALIKE),
    **{
        f"{name} alone": partial(fixed, weights=tuple(np.eye(len(OBJECTIVES))[k].tolist()))
        for k, name in enumerate(OBJECTIVES)
    },
    TAPWEIGHT: tapweight,
}


def build(config: ObjectiveWeightsConfig) -> mlo.Program:
    """The three levels, untrained."""
    torch.manual_seed(config.seed)
    return three_levels(Cell(config, TAPWEIGHT, config.seed), split(config, config.seed))


RECIPE = Recipe(
    ObjectiveWeightsConfig,
    build,
    compared(ARMS, draw),
    "go on pretraining a text encoder, learning from few labels how much each objective counts; three levels",
    "Zhang, Somayajula and Xie 2024, TapWeight: Reweighting Pretraining Objectives for Task-Adaptive Pretraining "
    "(arXiv:2410.10006)",
)
