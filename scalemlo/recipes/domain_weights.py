"""Train a language model on several sources, learning from a little text of the target how much of each to draw.

With K sources, L_k the mean loss over source k, p = softmax(theta) and F the loss over texts of the target:

    min_theta  F(w*(theta))        s.t.   w*(theta) = argmin_w  sum_k p_k(theta) L_k(w)

Every method searches weights with a model of its own; what is compared is a new model, trained on texts drawn with the
weights it found:

- ScaleBiO takes the hypergradient by the penalty method, first derivatives alone.
- DoGE takes ``-<dF/dw, dL_k/dw>``, which is the hypergradient by p with the inverse Hessian replaced by the identity,
  and moves p_k by its exponential: plain gradient steps of theta whose slope by theta is that by p.
- Excess over a reference, like DoReMi: the reference is trained on all sources alike; then w descends and p ascends
  ``sum_k p_k max(L_k(w) - L_k(reference), 0)``, theta as above. It knows nothing of the target.

All three hand over the mean of their weights over the search. Baselines: all sources alike, with as many steps as the
new model has, and with many more in place of the search; and so with the target's texts as one more source.

References: Pan et al. 2024, "ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting" (arXiv:2406.19976);
Fan, Pagliardini and Jaggi 2023, "DoGE: Domain Reweighting with Generalization Estimation" (arXiv:2310.15393); Xie et
al. 2023, "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining" (arXiv:2305.10429).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import scalemlo as mlo

from ..runs import config as cfg
from .data.texts import CharacterModel, TextSource, all_losses, load_text, split_off, text_losses, windows
from .study.picture import BASELINE, METHOD
from .study.recipe import Recipe
from .study.study import Cell, Comparison, ComparisonConfig, Outcome


@dataclass(kw_only=True)
class DomainWeightsConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        sources: What may be trained on.
        target: Those of them whose held-out texts count.
        num_characters: Of every source.
        length: Characters of a text.
        num_meta: Texts of each target that weights are learned from.
        num_heldout: Texts of each target that count.
        search_steps: Steps of the search.
        texts_per_source: Texts of each source in a step of the search.
        steps: Steps of the model that is trained with the weights found.
        longer_steps: Steps of the longer baselines, which search nothing.
        batch_size: Texts per step of these models.
        model: Their optimizer.
        search_model: The optimizer of the model in a search.
        mixture: The optimizer of ScaleBiO's weights.
        doge_learning_rate: Step of DoGE's weights.
        doremi_learning_rate: Step of the weights by excess over a reference.
        hypergradient: How ScaleBiO differentiates through the model.

    Raises:
        ValueError: If a target is no source.
    """

    sources: list[TextSource] = field(default_factory=lambda: ["code", "wiki", "web", "instructions", "noise"])
    target: list[TextSource] = field(default_factory=lambda: ["wiki", "instructions"])
    num_characters: int = 300_000
    length: int = 64
    num_meta: int = 100
    num_heldout: int = 500
    search_steps: int = 150
    texts_per_source: int = 4
    steps: int = 300
    longer_steps: int = 800
    batch_size: int = 32
    model: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    search_model: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    mixture: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    doge_learning_rate: float = 1.0
    doremi_learning_rate: float = 1.0
    hypergradient: cfg.HypergradientConfig = field(
        default_factory=lambda: cfg.ESTIMATOR_CONFIGS["penalty"](learning_rate=1.0)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.target if name not in self.sources]:
            raise ValueError(f"target: {unknown} must be among the sources, which are {self.sources}")


class Mixture(nn.Module):
    """Weights of K sources that sum to one, all alike at the start.

    Args:
        num_sources: K.
        is_exponentiated: Whether derivatives by theta are those by p: then plain gradient steps of theta multiply p
            with the exponential of the gradient by p.
    """

    def __init__(self, num_sources: int, *, is_exponentiated: bool = False):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_sources))
        self.is_exponentiated = is_exponentiated

    def forward(self) -> Tensor:
        """The weights ``[K]``."""
        weights = torch.softmax(self.logits, 0)
        return self.logits + mlo.constant(weights - self.logits) if self.is_exponentiated else weights


class ChooseMixture(mlo.Level):
    """Upper level: the model should do well on the target."""

    def loss(self, batch, model):
        """Mean loss over texts of the target."""
        return mlo.mean(text_losses(model, batch[0]))


class TrainOnMixture(mlo.Level):
    """Lower level: the loss of every source counts as much as its weight says."""

    def loss(self, batch, mixture):
        """``sum_k p_k L_k`` over texts ``[B, K, T]``."""
        (ids,) = batch
        weights = len(ids[0]) * mixture().repeat(len(ids))
        return mlo.weighted_mean(text_losses(self.module, ids.flatten(0, 1)), weights, normalize=False)


class Train(mlo.Level):
    """One level: plain training, of the reference and of the models that are compared."""

    def loss(self, batch):
        """Mean loss over texts ``[B, T]``, or ``[B, K, T]`` of all sources alike."""
        return mlo.mean(text_losses(self.module, batch[0].flatten(0, -2)))


class Proxy(nn.Module):
    """A model and weights, one playing against the other."""

    def __init__(self, num_sources: int):
        super().__init__()
        self.mixture, self.model = Mixture(num_sources, is_exponentiated=True), CharacterModel()

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Losses ``[B, K]`` of texts ``[B, K, T]``, and the weights ``[K]``."""
        return text_losses(self.model, ids.flatten(0, 1)).view(ids.shape[:2]), self.mixture()


class PlayAgainstReference(mlo.Level):
    """One level: the model descends, the weights ascend."""

    def loss(self, batch):
        """Weighted mean of the losses; its slope by the weights is minus the excess over the reference."""
        ids, reference = batch
        losses, weights = self.module(ids)
        ascent = (weights * mlo.constant((losses - reference).clamp(min=0))).sum(1)
        return mlo.mean((mlo.constant(weights) * losses).sum(1) - ascent + mlo.constant(ascent))


@dataclass
class Texts:
    """Texts of one cell."""

    train: Tensor  # [N, K, T]
    meta: Tensor  # [M, T] of the target
    heldout: Tensor  # [H, T] of the target


def texts(config: DomainWeightsConfig, seed: int) -> Texts:
    """Draw meta and held-out texts of the targets; the rest is for training, as many of every source."""
    generator = torch.Generator().manual_seed(seed)
    counts = [config.num_meta, config.num_heldout]
    train, meta, heldout = [], [], []
    for source in config.sources:
        ids = windows(load_text(source, config.num_characters), config.length)
        ours, theirs, left = split_off(ids, counts, generator)
        train.append(left)
        if source in config.target:
            meta.append(ours)
            heldout.append(theirs)
    return Texts(torch.stack(train, 1), torch.cat(meta), torch.cat(heldout))


# ---- searches --------------------------------------------------------------------------------------------------------
def two_levels(cell: Cell[DomainWeightsConfig], data: Texts, *, doge: bool = False) -> mlo.Program:
    """The program of ScaleBiO's search, or of DoGE's."""
    config = cell.config
    by_exponent = partial(torch.optim.SGD, lr=config.doge_learning_rate)
    return cell.program(
        [
            ChooseMixture(
                "mixture",
                Mixture(len(config.sources), is_exponentiated=doge),
                data=_loader(config.batch_size, data.meta),
                optimizer=by_exponent if doge else config.mixture.optimizer(),
            ),
            TrainOnMixture(
                "model",
                CharacterModel(),
                data=_loader(config.texts_per_source, data.train),
                optimizer=config.search_model.optimizer(),
                hypergradient=mlo.Identity() if doge else config.hypergradient.build(),
            ),
        ]
    )


def search(cell: Cell[DomainWeightsConfig], data: Texts, *, doge: bool) -> np.ndarray:
    """Weights after every few steps ``[M, K]``, by ScaleBiO or DoGE."""
    program, path = two_levels(cell, data, doge=doge), [_alike(cell.config)]

    def look() -> dict[str, float]:
        with program.inference("mixture") as mixture:
            path.append(mixture().cpu().numpy())
        return {}

    cell.train(program, cell.config.search_steps, look, every=_LOOK_EVERY)
    return np.stack(path)


def search_by_excess(cell: Cell[DomainWeightsConfig], data: Texts) -> np.ndarray:
    """The same by the excess over a reference."""
    config, path = cell.config, [_alike(cell.config)]
    loader = _loader(config.texts_per_source, data.train)
    level = Train("model", CharacterModel(), data=loader, optimizer=config.search_model.optimizer())
    program = cell.program([level])
    cell.train(program, config.search_steps)
    with program.inference("model") as model:
        reference = all_losses(model, data.train.flatten(0, 1).to(program.device)).view(data.train.shape[:2])

    def optimizer(parameters):
        mixture, *model = parameters
        of_mixture = {"params": [mixture], "lr": config.doremi_learning_rate, "momentum": 0.0, "weight_decay": 0.0}
        return config.search_model.optimizer()([{"params": model}, of_mixture])

    loader = _loader(config.texts_per_source, data.train, reference.cpu())
    proxy = PlayAgainstReference("proxy", Proxy(len(config.sources)), data=loader, optimizer=optimizer)
    program = cell.program([proxy])

    def look() -> dict[str, float]:
        with program.inference("proxy") as proxy:
            path.append(proxy(data.train[:1].to(program.device))[1].cpu().numpy())
        return {}

    cell.train(program, config.search_steps, look, every=_LOOK_EVERY)
    return np.stack(path)


_LOOK_EVERY = 10


def _alike(config: DomainWeightsConfig) -> np.ndarray:
    return np.full(len(config.sources), 1 / len(config.sources), np.float32)


def _loader(batch_size: int, *tensors: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), batch_size, shuffle=True, drop_last=True)


# ---- arms ------------------------------------------------------------------------------------------------------------
def found(cell: Cell[DomainWeightsConfig], method: str) -> Outcome:
    """A method: the search, then a model trained with its weights."""
    data = texts(cell.config, cell.seed)
    path = search_by_excess(cell, data) if method == "doremi" else search(cell, data, doge=method == "doge")
    weights = path.mean(0)
    scores = _train(cell, data, weights.tolist(), cell.config.steps)
    return Outcome(scores, {"path": path, "weights": weights})


def uniform(cell: Cell[DomainWeightsConfig], *, is_longer: bool = False, with_meta: bool = False) -> Outcome:
    """A baseline: all sources alike, and the meta texts as one more source if ``with_meta``."""
    data, config = texts(cell.config, cell.seed), cell.config
    weights = [1.0] * (len(config.sources) + with_meta)
    return Outcome(_train(cell, data, weights, config.longer_steps if is_longer else config.steps))


def _train(cell: Cell[DomainWeightsConfig], data: Texts, weights: Sequence[float], steps: int) -> dict[str, float]:
    """Train a model on texts drawn with weights of the sources, the meta texts the last one if there is one more."""
    config = cell.config
    parts = [*data.train.unbind(1), data.meta][: len(weights)]
    share = torch.cat([torch.full((len(ids),), float(p) / len(ids)) for p, ids in zip(weights, parts, strict=True)])
    sampler = WeightedRandomSampler(share, config.batch_size * steps)  # ty: ignore[invalid-argument-type]
    torch.manual_seed(cell.seed)
    level = Train(
        "model",
        CharacterModel(),
        data=DataLoader(TensorDataset(torch.cat(parts)), config.batch_size, sampler=sampler, drop_last=True),
        optimizer=config.model.optimizer(),
        scheduler=config.model.scheduler(steps),
    )
    program = cell.program([level])

    def evaluate() -> dict[str, float]:
        with program.inference("model") as model:
            return {"target's loss, nats": float(all_losses(model, data.heldout.to(program.device)).mean())}

    scores = cell.train(program, steps, evaluate)
    targets = [p for p, name in zip(weights, config.sources, strict=False) if name in config.target]
    return scores | {"target's weight": float(sum(targets) / sum(weights))}


def draw(axes, outcomes, config: DomainWeightsConfig) -> None:
    """Weights by source, mean over seeds, a group of bars for each source."""
    colors = {"like DoReMi": "#c9a227", "DoGE": "#4c78a8", "ScaleBiO": METHOD}
    methods = [arm for arm in colors if arm in outcomes]
    width, places = 0.8 / len(methods), np.arange(len(config.sources))
    for i, arm in enumerate(methods):
        weights = np.stack([outcome.arrays["weights"] for outcome in outcomes[arm]])
        at = places + (i - (len(methods) - 1) / 2) * width
        axes.bar(at, weights.mean(0), width, color=colors[arm], label=arm, zorder=2)
        for one in weights:
            axes.scatter(at, one, s=9, color="#333333", zorder=3, linewidths=0)
    axes.axhline(1 / len(places), color=BASELINE, linewidth=1, linestyle="--", label="uniform", zorder=1)
    names = [f"{name}\n(target)" if name in config.target else name for name in config.sources]
    axes.set_xticks(places, names)
    axes.set_title("Weight of every source: mean, and each seed", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(axis="y", color="#e3e5e8", zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


ARMS = {
    "uniform": uniform,
    "uniform, longer": partial(uniform, is_longer=True),
    "uniform, longer, with target's texts": partial(uniform, is_longer=True, with_meta=True),
    "like DoReMi": partial(found, method="doremi"),
    "DoGE": partial(found, method="doge"),
    "ScaleBiO": partial(found, method="scalebio"),
}


def build(config: DomainWeightsConfig) -> mlo.Program:
    """The two levels of ScaleBiO's search, untrained."""
    torch.manual_seed(config.seed)
    return two_levels(Cell(config, "ScaleBiO", config.seed), texts(config, config.seed))


def run(config: DomainWeightsConfig) -> bool:
    """All arms.

    Args:
        config: The configuration.

    Returns:
        Whether Ctrl-C ended it early.
    """
    return Comparison(config, ARMS, partial(draw, config=config), smaller_is_better=True).run()


RECIPE = Recipe(
    DomainWeightsConfig,
    build,
    run,
    "train a language model on several sources, learning the weight of each from a little text of the target",
    "Pan et al. 2024, ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting (arXiv:2406.19976)",
)
