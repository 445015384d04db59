"""Train a language model on texts of which some are damaged, with a net that rates every text by its characters.

A part of the training texts has a share of its characters, drawn from 0 to 1, replaced by random ones. Above, a net R
that gives every text a weight from its characters phi; below, a language model w on weighted losses; a few intact
texts j, unseen below:

    min_theta  mean_j l_j(w*(theta))
    s.t.       w*(theta) = argmin_w  sum_i R(phi_i; theta) l_i(w) / sum_i R(phi_i; theta)

A table with one weight per text learns only from visits to that text, and says nothing of others; the net learns from
all, and rates texts that nobody trained on. Baselines with as many steps: all texts alike, without and with the intact
ones among them. The last arm is told which texts are intact.

Here the rater and one model train side by side; the paper trains the rater above a population of models that start
anew, filters with it, and trains the final model afterwards.

Reference: Calian et al. 2025, "DataRater: Meta-Learned Dataset Curation" (arXiv:2505.17895).
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import scalemlo as mlo

from ..hf.trainer.reweighting import ExampleWeights, ScoreNet
from ..runs import config as cfg
from .data.texts import (
    NUM_WORDS,
    CharacterModel,
    TextSource,
    all_losses,
    load_text,
    noise,
    split_off,
    text_losses,
    windows,
)
from .study.picture import BASELINE, METHOD
from .study.recipe import Recipe
from .study.study import Cell, ComparisonConfig, Outcome, compared

LOSS, RANKS, NEW = "held-out loss, nats", "rank correlation of weight and damage", "the same on new texts"


@dataclass(kw_only=True)
class DataRaterConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        source: Where the texts are from.
        length: Characters of a text.
        num_train: Texts to train on.
        num_meta: Intact texts that weights are learned from.
        num_heldout: Intact texts that count, and as many new ones, damaged alike, for the net to rate.
        damaged: Part of the training texts that is damaged.
        steps: Steps of the language model; weights take as many.
        batch_size: Texts per step, below and above.
        hidden_size: Of the net.
        model: The optimizer of the language model.
        rater: The optimizer of the net.
        table: The optimizer of the table.
        hypergradient: How weights are differentiated through the language model.
    """

    source: TextSource = "web"
    length: int = 64
    num_train: int = 4000
    num_meta: int = 200
    num_heldout: int = 500
    damaged: float = 0.7
    steps: int = 300
    batch_size: int = 40
    hidden_size: int = 32
    model: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    rater: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    table: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["identity"])


class Rater(ScoreNet):
    """Weights in (0, 1) of texts, from how often each character is in them; 1/2 at the start."""

    def __init__(self, hidden_size: int):
        super().__init__(NUM_WORDS, hidden_size)

    def forward(self, ids: Tensor, index: Tensor) -> Tensor:
        """Weights ``[B]`` of texts ``ids [B, T]``, whose numbers ``index`` make no difference."""
        return super().forward(torch.log1p(F.one_hot(ids, NUM_WORDS).sum(1).float()))


class Table(ExampleWeights):
    """One weight in (0, 1) for every training text, 1/2 at the start."""

    def forward(self, ids: Tensor, index: Tensor) -> Tensor:
        """Weights ``[B]`` of the texts with the numbers ``index [B]``."""
        return super().forward(index)


class Rate(mlo.Level):
    """Upper level: the model should do well on intact texts."""

    def loss(self, batch, model):
        """Mean loss over intact texts."""
        return mlo.mean(text_losses(model, batch[0]))


class Train(mlo.Level):
    """Lower level: the loss of a text counts as much as its weight says."""

    def loss(self, batch, rater):
        """Weighted mean of the losses."""
        ids, index = batch
        return mlo.weighted_mean(text_losses(self.module, ids), rater(ids, index))


class TrainPlain(mlo.Level):
    """A baseline: every text counts the same."""

    def loss(self, batch):
        """Mean of the losses."""
        return mlo.mean(text_losses(self.module, batch[0]))


@dataclass
class Texts:
    """Texts of one cell, and the share of their characters that was replaced."""

    train: Tensor  # [N, T]
    damage: np.ndarray  # [N]
    meta: Tensor  # [M, T]
    heldout: Tensor  # [H, T]
    new: Tensor  # [H, T]
    new_damage: np.ndarray  # [H]


def texts(config: DataRaterConfig, seed: int) -> Texts:
    """Draw the parts, and damage those that are to be."""
    generator, damages = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    counts = [config.num_train, config.num_meta, config.num_heldout, config.num_heldout]
    ids = windows(load_text(config.source, (sum(counts) + 1) * config.length), config.length)
    train, meta, heldout, new, _ = split_off(ids, counts, generator)
    train, damage = damaged(train, config.damaged, damages)
    new, new_damage = damaged(new, config.damaged, damages)
    return Texts(train, damage, meta, heldout, new, new_damage)


def damaged(ids: Tensor, part: float, generator: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """Replace characters of a part of the texts ``[N, T]``; return them and the shares replaced ``[N]``."""
    share = generator.random(len(ids)) * (generator.random(len(ids)) < part)
    hit = torch.from_numpy(generator.random(ids.shape) < share[:, None])
    other = torch.from_numpy(noise(ids.numel(), generator).astype(np.int64)).view_as(ids)
    return torch.where(hit, other, ids), hit.float().mean(1).numpy()


def weighted(cell: Cell[DataRaterConfig], *, by_table: bool) -> Outcome:
    """The two levels."""
    data = texts(cell.config, cell.seed)
    program = two_levels(cell, data, by_table=by_table)
    scores = _train(cell, program, data)
    none = torch.zeros(len(data.new), dtype=torch.long)
    with program.inference("rater") as rater:
        weights = rater(data.train.to(program.device), torch.arange(len(data.train)).to(program.device)).cpu().numpy()
        new = None if by_table else rater(data.new.to(program.device), none.to(program.device)).cpu().numpy()
    scores[RANKS] = rank_correlation(weights, data.damage)
    if new is not None:
        scores[NEW] = rank_correlation(new, data.new_damage)
    return Outcome(scores, {"damage": data.damage, "weight": weights})


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; equal values share their mean rank."""
    return float(pd.Series(a).rank().corr(pd.Series(b).rank()))


def two_levels(cell: Cell[DataRaterConfig], data: Texts, *, by_table: bool = False) -> mlo.Program:
    """The program."""
    config = cell.config
    module: nn.Module = Table(len(data.train)) if by_table else Rater(config.hidden_size)
    optimizer = (config.table if by_table else config.rater).optimizer()
    meta = DataLoader(TensorDataset(data.meta), min(config.batch_size, len(data.meta)), shuffle=True, drop_last=True)
    index = torch.arange(len(data.train))
    return cell.program(
        [
            Rate("rater", module, data=meta, optimizer=optimizer),
            Train("model", hypergradient=config.hypergradient.build(), **_options(config, data.train, index)),
        ]
    )


def plain(cell: Cell[DataRaterConfig], *, with_meta: bool = False, told: bool = False) -> Outcome:
    """A baseline.

    Args:
        cell: The arm and its seed.
        with_meta: Whether to train on the intact texts too.
        told: Whether to leave the damaged texts out.

    Returns:
        What it found.
    """
    data = texts(cell.config, cell.seed)
    train = data.train[torch.from_numpy(data.damage == 0)] if told else data.train
    train = torch.cat([train, data.meta]) if with_meta else train
    program = cell.program([TrainPlain("model", **_options(cell.config, train))])
    return Outcome(_train(cell, program, data))


def _options(config: DataRaterConfig, *train: Tensor) -> dict:
    return dict(
        module=CharacterModel(),
        data=DataLoader(TensorDataset(*train), config.batch_size, shuffle=True, drop_last=True),
        optimizer=config.model.optimizer(),
        scheduler=config.model.scheduler(config.steps),
    )


def _train(cell: Cell[DataRaterConfig], program: mlo.Program, data: Texts) -> dict[str, float]:
    def evaluate() -> dict[str, float]:
        with program.inference("model") as model:
            return {LOSS: float(all_losses(model, data.heldout.to(program.device)).mean())}

    return cell.train(program, cell.config.steps, evaluate)


def draw(axes, outcomes) -> None:
    """Weight against damage: the mean and the middle half in ten bins, all seeds together."""
    edges = np.linspace(0, 1, 11)
    for arm, color in (("per-example table", BASELINE), ("DataRater", METHOD)):
        found = outcomes.get(arm, ())
        if not found:
            continue
        damage, weight = (np.concatenate([o.arrays[key] for o in found]) for key in ("damage", "weight"))
        groups = [weight[damage == 0]] + [
            weight[(damage > low) & (damage <= high)] for low, high in zip(edges[:-1], edges[1:], strict=True)
        ]
        kept = [(x, g) for x, g in zip([0.0, *(edges[:-1] + 0.05)], groups, strict=True) if len(g)]
        places = [x for x, _ in kept]
        low, high = (np.array([np.quantile(g, q) for _, g in kept]) for q in (0.25, 0.75))
        axes.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(places, [g.mean() for _, g in kept], color=color, marker="o", markersize=4, label=arm)
    axes.set_title("Weight by damage: mean and middle half of the texts", fontsize=10, loc="left")
    axes.set(xlabel="share of characters replaced", ylabel="weight", ylim=(0, 1))
    axes.legend(fontsize=9, frameon=False)
    axes.grid(color="#e3e5e8")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


ARMS = {
    "all alike": plain,
    "all alike, with the intact texts": partial(plain, with_meta=True),
    "per-example table": partial(weighted, by_table=True),
    "DataRater": partial(weighted, by_table=False),
    "told which are intact": partial(plain, with_meta=True, told=True),
}


def build(config: DataRaterConfig) -> mlo.Program:
    """The two levels with the net, untrained."""
    torch.manual_seed(config.seed)
    return two_levels(Cell(config, "DataRater", config.seed), texts(config, config.seed))


RECIPE = Recipe(
    DataRaterConfig,
    build,
    compared(ARMS, draw, smaller_is_better=True),
    "train a language model on partly damaged texts, with a net that rates every text by its characters",
    "Calian et al. 2025, DataRater: Meta-Learned Dataset Curation (arXiv:2505.17895)",
)
