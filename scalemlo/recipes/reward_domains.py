"""Train a process reward model on domains whose step labels are more or less wrong, learning how much each counts.

A process reward model gives every step t of a chain the probability p_t that it is right. Its training chains come from
K domains; in domain k each step label is flipped with probability f_k, which nobody is told. A few chains whose
outcome r (right or not) is known, but not their steps, decide about the weights a_k of the domains. Since a chain is
right where all its steps are, the aggregate of a chain is ``A = prod_t p_t``:

    min_a  mean_j (A_j(w*(a)) - r_j)^2
    s.t.   w*(a) = argmin_w  sum_k a_k mean_{i in k, t} crossentropy(p_it(w), label_it)

Chains are arithmetic modulo 10, some with planted wrong steps. Scores: how often the best of several candidates, by A,
is right, on problems each with one right candidate at least; and how well p tells right from wrong steps. Baselines
with as many steps: all domains alike, without and with the chains of known outcome among them, by the upper loss. The
last arm is told the domain without flips. More chains of known outcome pick every arm's best moment.

The paper adds up the log odds of the steps where A is a product here, and its domains are data sets of images and
questions with step labels by sampled completions.

Reference: Cao et al. 2025, "DreamPRM: Domain-Reweighted Process Reward Model for Multimodal Reasoning"
(arXiv:2505.20241).
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import scalemlo as mlo

from ..hf.trainer.reweighting import DomainWeights
from ..reporting.tables import auroc
from ..runs import config as cfg
from .data.chains import Chains, draw_chains
from .study.picture import BASELINE, METHOD
from .study.recipe import Recipe
from .study.study import VALIDATION, Cell, ComparisonConfig, Outcome, compared


@dataclass(kw_only=True)
class RewardDomainsConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        flips: Of every domain, how often a step label is flipped.
        num_per_domain: Chains of every domain.
        num_meta: Chains of known outcome that weights are learned from.
        num_validation: Chains of known outcome that pick the best moment.
        num_problems: Problems of the test.
        num_candidates: Chains for each of them.
        chain_length: Steps of a chain.
        steps: Training steps; weights take as many.
        batch_size: Chains per step, below and above.
        evaluate_every: Steps between two evaluations.
        hidden_size: Of the reward model.
        model: The optimizer of the reward model.
        weights: The optimizer of the weights.
        hypergradient: How weights are differentiated through the reward model.
    """

    flips: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.4, 0.5, 0.6])
    num_per_domain: int = 500
    num_meta: int = 200
    num_validation: int = 200
    num_problems: int = 500
    num_candidates: int = 8
    chain_length: int = 4
    steps: int = 1000
    batch_size: int = 100
    evaluate_every: int = 100
    hidden_size: int = 128
    model: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    weights: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["identity"])


class RewardModel(nn.Module):
    """Log odds that a step is right, from its digits and operation."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.body = nn.Sequential(
            nn.Linear(64, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size), nn.GELU(),
            nn.Linear(hidden_size, 1),
        )  # fmt: skip

    def forward(self, steps: Tensor) -> Tensor:
        """Log odds ``[B, S]`` of steps ``[B, S, 4]``."""
        return self.body(self.embed(steps).flatten(2)).squeeze(-1)


def log_aggregate(log_odds: Tensor) -> Tensor:
    """``log A = sum_t log p_t`` of chains ``[B, S]``."""
    return F.logsigmoid(log_odds).sum(1)


def outcome_losses(log_odds: Tensor, outcome: Tensor) -> Tensor:
    """``(A - r)^2`` of every chain."""
    return (log_aggregate(log_odds).exp() - outcome).square()


def step_losses(log_odds: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the steps of every chain."""
    return F.binary_cross_entropy_with_logits(log_odds, labels, reduction="none").mean(1)


class WeighDomains(mlo.Level):
    """Upper level: aggregates should be near the outcomes."""

    def loss(self, batch, model):
        """Mean squared error of the aggregate."""
        steps, outcome = batch
        return mlo.mean(outcome_losses(model(steps), outcome))


class TrainRewards(mlo.Level):
    """Lower level: a chain counts as much as its domain."""

    def loss(self, batch, weights):
        """Weighted mean of the step losses."""
        steps, labels, domain = batch
        return mlo.weighted_mean(step_losses(self.module(steps), labels), weights(domain), normalize=False)


class TrainPlain(mlo.Level):
    """A baseline: every chain counts the same; where only the outcome is known, that has the upper loss."""

    def loss(self, batch):
        """Mean of the losses."""
        steps, labels, domain = batch
        log_odds = self.module(steps)
        by_outcome = outcome_losses(log_odds, labels[:, 0])
        return mlo.mean(torch.where(domain < 0, by_outcome, step_losses(log_odds, labels)))


@dataclass
class Parts:
    """Chains of one cell."""

    train: list[Tensor]  # steps [N, S, 4], flipped labels [N, S], domains [N]
    meta: Chains
    validation: Chains
    test: Chains


def parts(config: RewardDomainsConfig, seed: int) -> Parts:
    """Draw all chains, and flip the labels."""
    generator = torch.Generator().manual_seed(seed)
    chains = partial(draw_chains, num_steps=config.chain_length, generator=generator)
    domain = torch.arange(len(config.flips)).repeat_interleave(config.num_per_domain)
    train = chains(len(domain), right=0.5)
    is_flipped = torch.rand(train.is_right.shape, generator=generator) < torch.tensor(config.flips)[domain].unsqueeze(1)
    return Parts(
        [train.steps, (train.is_right ^ is_flipped).float(), domain],
        meta=chains(config.num_meta, right=0.5),
        validation=chains(config.num_validation, right=0.5),
        test=chains(config.num_problems, right=0.1, num_candidates=config.num_candidates),
    )


def reweighted(cell: Cell[RewardDomainsConfig]) -> Outcome:
    """The two levels."""
    data = parts(cell.config, cell.seed)
    program = two_levels(cell, data)
    scores = _train(cell, program, data)
    with program.inference("weights") as weights:
        found = weights(torch.arange(len(cell.config.flips)).to(program.device)).cpu().numpy()
    return Outcome(scores, {"weight": found / found.sum(), "flips": np.array(cell.config.flips)})


def two_levels(cell: Cell[RewardDomainsConfig], data: Parts) -> mlo.Program:
    """The program."""
    config, num_domains = cell.config, len(cell.config.flips)
    return cell.program(
        [
            WeighDomains(
                "weights",
                DomainWeights(torch.full([num_domains], 1 / num_domains)),
                data=_loader(config, data.meta.steps, data.meta.outcome),
                optimizer=config.weights.optimizer(),
            ),
            TrainRewards("model", hypergradient=config.hypergradient.build(), **_options(config, *data.train)),
        ]
    )


def plain(cell: Cell[RewardDomainsConfig], *, with_meta: bool = False, told: bool = False) -> Outcome:
    """A baseline.

    Args:
        cell: The arm and its seed.
        with_meta: Whether to train on the chains of known outcome too.
        told: Whether to train on the domain with the fewest flips alone.

    Returns:
        What it found.
    """
    data = parts(cell.config, cell.seed)
    train = data.train
    if told:
        best = train[2] == int(np.argmin(cell.config.flips))
        train = [part[best] for part in train]
    if with_meta:
        outcome = data.meta.outcome.unsqueeze(1).expand(-1, cell.config.chain_length)
        unknown = torch.full([len(outcome)], -1)
        train = [torch.cat(pair) for pair in zip(train, (data.meta.steps, outcome, unknown), strict=True)]
    return Outcome(_train(cell, cell.program([TrainPlain("model", **_options(cell.config, *train))]), data))


def _options(config: RewardDomainsConfig, *train: Tensor) -> dict:
    return dict(
        module=RewardModel(config.hidden_size),
        data=_loader(config, *train),
        optimizer=config.model.optimizer(),
        scheduler=config.model.scheduler(config.steps),
    )


def _loader(config: RewardDomainsConfig, *tensors: Tensor) -> DataLoader:
    size = min(config.batch_size, len(tensors[0]))
    return DataLoader(TensorDataset(*tensors), size, shuffle=True, drop_last=True)


def _train(cell: Cell[RewardDomainsConfig], program: mlo.Program, data: Parts) -> dict[str, float]:
    config = cell.config

    def evaluate() -> dict[str, float]:
        with program.inference("model") as model:
            test, validation = (model(part.steps.to(program.device)).cpu() for part in (data.test, data.validation))
        best = log_aggregate(test).view(-1, config.num_candidates).argmax(1, keepdim=True)
        is_right = data.test.outcome.view(-1, config.num_candidates).gather(1, best).mean()
        return {
            f"best of {config.num_candidates} is right, %": 100 * float(is_right),
            "AUROC of steps": auroc(test.flatten().numpy(), data.test.is_right.flatten().numpy()),
            VALIDATION: -float(outcome_losses(validation, data.validation.outcome).mean()),
        }

    return cell.train(program, config.steps, evaluate, every=config.evaluate_every)


def draw(axes, outcomes) -> None:
    """Learned weight of every domain against its flips, a dot for each seed."""
    found = outcomes.get("DreamPRM", ())
    if found:
        flips, weights = found[0].arrays["flips"], np.stack([o.arrays["weight"] for o in found])
        axes.plot(flips, weights.mean(0), color=METHOD, marker="_", markersize=16, markeredgewidth=2.5, linewidth=1.2)
        for one in weights:
            axes.scatter(flips, one, color=METHOD, alpha=0.55, s=36, linewidths=0, zorder=3)
        axes.axhline(1 / len(flips), color=BASELINE, linewidth=1, linestyle="--")
        axes.annotate("all alike", (flips.max(), 1 / len(flips)), ha="right", va="bottom", fontsize=9, color=BASELINE)
    axes.set_title("Learned weight of a domain: seeds and their mean", fontsize=10, loc="left")
    axes.set(xlabel="how often its step labels are flipped", ylabel="weight")
    axes.set_ylim(bottom=0)
    axes.grid(color="#e3e5e8")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


ARMS = {
    "all domains alike": plain,
    "all alike, with known outcomes": partial(plain, with_meta=True),
    "DreamPRM": reweighted,
    "told the domain without flips": partial(plain, with_meta=True, told=True),
}


def build(config: RewardDomainsConfig) -> mlo.Program:
    """The two levels, untrained."""
    torch.manual_seed(config.seed)
    return two_levels(Cell(config, "DreamPRM", config.seed), parts(config, config.seed))


RECIPE = Recipe(
    RewardDomainsConfig,
    build,
    compared(ARMS, draw),
    "train a process reward model on domains with more or less wrong step labels, learning the weight of each",
    "Cao et al. 2025, DreamPRM: Domain-Reweighted Process Reward Model for Multimodal Reasoning (arXiv:2505.20241)",
)
