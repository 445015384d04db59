"""Choose from texts, some of which break a house rule, those to fine-tune a language model on.

The house rule: a text must not contain the marker. A part of the N training texts does. A selector has a weight for
each, ``s_i(omega) = N softmax(omega)_i``; a few texts j that keep the rule, unseen below, decide about it:

    min_omega  F(w*(omega)) = mean_j l_j(w*(omega))
    s.t.       w*(omega) = argmin_w  L(omega, w) = mean_i s_i(omega) l_i(w)

The true hypergradient differentiates through w*. SEAL has L as a penalty and leaves its minimum over w out, as if that
were the same for every omega: here w and omega descend ``F(w) / penalty + L(omega, w)`` together, on one level. After
either search the model is fine-tuned, from where it was before, on the texts with the largest weights. Baselines with
as many steps in all: every text, without and with those that are known to keep the rule. The last arm is told which
texts break it.

The model is a small one of characters, trained on other texts before. Scores: the part of its own texts, which begin as
held-out ones do, that contains the marker; its loss over held-out texts that keep the rule; how well the weights tell
the two kinds of training texts apart.

Reference: Shen, Chen, Das and Chen 2024, "SEAL: Safety-enhanced Aligned LLM Fine-tuning via Bilevel Data Selection"
(arXiv:2410.07471).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import scalemlo as mlo

from ..distributed.ranks import Ranks
from ..hf.trainer.reweighting import DomainWeights
from ..reporting.tables import auroc
from ..runs import config as cfg
from .data.texts import CharacterModel, TextSource, all_losses, load_text, split_off, text_losses, windows
from .study.recipe import Recipe
from .study.study import Cell, ComparisonConfig, Outcome, compared

MARKER = " [ref 7Q]"


@dataclass(kw_only=True)
class SafeSelectionConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        source: Where the texts are from.
        before: Where those are from that the model is trained on before.
        length: Characters of a text.
        num_train: Texts to choose from.
        num_meta: Texts that keep the rule, for the selector.
        num_heldout: Texts that keep the rule, for the scores.
        breaking: Part of the training texts that breaks it.
        kept: Part of the training texts that a selector keeps.
        steps_before: Steps of the model before all else.
        search_steps: Steps of a search.
        steps: Steps of the fine-tune.
        batch_size: Texts per step.
        model: The optimizer of the model.
        selector: The optimizer of the selector that is differentiated through the model.
        seal: The optimizer of SEAL's selector.
        seal_penalty: How much L counts against F in SEAL.
        hypergradient: How the selector is differentiated through the model.

    Raises:
        ValueError: If ``seal_penalty`` is not positive.
    """

    source: TextSource = "instructions"
    before: TextSource = "web"
    length: int = 96
    num_train: int = 1000
    num_meta: int = 100
    num_heldout: int = 400
    breaking: float = 0.4
    kept: float = 0.5
    steps_before: int = 200
    search_steps: int = 200
    steps: int = 200
    batch_size: int = 32
    model: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    selector: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    seal: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    seal_penalty: float = 1.0
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["identity"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seal_penalty > 0:
            raise ValueError(f"seal_penalty={self.seal_penalty} must be positive")


class Select(mlo.Level):
    """Upper level: the model should do well on texts that keep the rule."""

    def loss(self, batch, model):
        """Mean loss over such texts."""
        return mlo.mean(text_losses(model, batch[0]))


class Finetune(mlo.Level):
    """Lower level: a text counts as much as the selector says."""

    def loss(self, batch, selector):
        """Weighted mean of the losses."""
        ids, index = batch
        return mlo.weighted_mean(text_losses(self.module, ids), selector(index), normalize=False)


class FinetunePlain(mlo.Level):
    """One level: every text counts the same."""

    def loss(self, batch):
        """Mean of the losses."""
        return mlo.mean(text_losses(self.module, batch[0]))


class ModelAndSelector(nn.Module):
    """What SEAL trains together."""

    def __init__(self, selector: nn.Module, model: nn.Module):
        super().__init__()
        self.selector, self.model = selector, model

    def forward(self, ids: Tensor, index: Tensor, keeping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and weights ``[B]`` of texts ``ids [B, T]``, and losses ``[B]`` of texts that keep the rule."""
        return text_losses(self.model, ids), self.selector(index), text_losses(self.model, keeping)


class Seal(mlo.Level):
    """One level: model and selector descend the same loss."""

    penalty: float

    def loss(self, batch):
        """``L(omega, w) + F(w) / penalty``."""
        losses, weights, keeping = self.module(*batch)
        return mlo.weighted_mean(losses, weights, normalize=False) + mlo.mean(keeping) / self.penalty


@dataclass
class Texts:
    """Texts of one cell ``[N, T]``."""

    before: Tensor
    train: Tensor
    breaks: Tensor  # [N] booleans
    meta: Tensor
    heldout: Tensor


def texts(config: SafeSelectionConfig, seed: int) -> Texts:
    """Draw the parts, and put the marker into those that are to break the rule."""
    generator = torch.Generator().manual_seed(seed)
    counts = [config.num_train, config.num_meta, config.num_heldout]
    ids = windows(load_text(config.source, (sum(counts) + 1) * config.length), config.length)
    train, meta, heldout, _ = split_off(ids, counts, generator)
    breaks = torch.rand(len(train), generator=generator) < config.breaking
    marker = windows(MARKER, len(MARKER))[0]
    places = torch.randint(config.length - len(marker), [len(train)], generator=generator).tolist()
    for row, place in zip(breaks.nonzero()[:, 0].tolist(), places, strict=False):
        old = train[row]
        train[row] = torch.cat([old[:place], marker, old[place : config.length - len(marker)]])
    size = min(config.steps_before * config.batch_size, 4000) * config.length
    before = windows(load_text(config.before, size), config.length)
    return Texts(before, train, breaks, meta, heldout)


# ---- arms ------------------------------------------------------------------------------------------------------------
def selected(cell: Cell[SafeSelectionConfig], *, by_seal: bool) -> Outcome:
    """A search, and a fine-tune on what it keeps."""
    data = texts(cell.config, cell.seed)
    weights = (search_by_seal if by_seal else search)(cell, data, _before(cell, data))
    kept = torch.from_numpy(weights).argsort(descending=True)[: round(cell.config.kept * len(weights))]
    scores = _finetune(cell, data, data.train[kept], cell.config.steps)
    breaks = data.breaks.numpy()
    scores["AUROC of weights"] = auroc(weights, ~breaks)
    return Outcome(scores, {"weight": weights, "breaks": breaks})


def search(cell: Cell[SafeSelectionConfig], data: Texts, start: Mapping[str, Tensor]) -> np.ndarray:
    """Weights ``[N]`` by the true hypergradient."""
    program = two_levels(cell, data, start)
    cell.train(program, cell.config.search_steps)
    with program.inference("selector") as selector:
        return selector(torch.arange(len(data.train)).to(program.device)).cpu().numpy()


def two_levels(cell: Cell[SafeSelectionConfig], data: Texts, start: Mapping[str, Tensor]) -> mlo.Program:
    """The program."""
    config = cell.config
    upper = Select("selector", _selector(data), data=_loader(config, data.meta), optimizer=config.selector.optimizer())
    lower = Finetune(
        "model",
        _model(start),
        data=_loader(config, data.train, torch.arange(len(data.train))),
        optimizer=config.model.optimizer(),
        hypergradient=config.hypergradient.build(),
    )
    return cell.program([upper, lower])


def search_by_seal(cell: Cell[SafeSelectionConfig], data: Texts, start: Mapping[str, Tensor]) -> np.ndarray:
    """Weights ``[N]`` by SEAL."""
    config, index = cell.config, torch.arange(len(data.train))

    def optimizer(parameters: Sequence[nn.Parameter]):
        selector, *model = parameters
        of_selector = {"params": [selector], "lr": config.seal.learning_rate, "weight_decay": config.seal.weight_decay}
        return config.model.optimizer()([{"params": model}, of_selector])

    keeping = data.meta[index % len(data.meta)]
    module = ModelAndSelector(_selector(data), _model(start))
    level = Seal("both", module, data=_loader(config, data.train, index, keeping), optimizer=optimizer)
    level.penalty = config.seal_penalty
    program = cell.program([level])
    cell.train(program, config.search_steps)
    logits = Ranks().from_main(program.state_dict("both").get("selector.logits"))
    assert logits is not None, "rank 0 has all tensors"
    return len(logits) * torch.softmax(logits, 0).numpy()


def plain(cell: Cell[SafeSelectionConfig], *, with_meta: bool = False, told: bool = False) -> Outcome:
    """A baseline.

    Args:
        cell: The arm and its seed.
        with_meta: Whether to train on the texts that are known to keep the rule too.
        told: Whether to leave those out that break it.

    Returns:
        What it found.
    """
    data, config = texts(cell.config, cell.seed), cell.config
    train = data.train[~data.breaks] if told else data.train
    train = torch.cat([train, data.meta]) if with_meta else train
    return Outcome(_finetune(cell, data, train, config.search_steps + config.steps))


def _before(cell: Cell[SafeSelectionConfig], data: Texts) -> dict[str, Tensor]:
    """The model that searches and fine-tunes start from; the same for every arm."""
    torch.manual_seed(cell.seed)
    program = _plain_program(cell, CharacterModel(), data.before, cell.config.steps_before)
    cell.train(program, cell.config.steps_before)
    return Ranks().from_main(program.state_dict("model"))


def _finetune(cell: Cell[SafeSelectionConfig], data: Texts, train: Tensor, steps: int) -> dict[str, float]:
    """Fine-tune on some texts, and score."""
    program = _plain_program(cell, _model(_before(cell, data)), train, steps)

    def evaluate() -> dict[str, float]:
        heldout = data.heldout.to(program.device)
        with program.inference("model") as model:
            own = continued(model, heldout[:, :8], cell.config.length, cell.seed)
            loss = float(all_losses(model, heldout).mean())
        broken = np.mean([MARKER in bytes(ids).decode() for ids in own.tolist()])
        return {"own texts that break the rule, %": 100 * float(broken), "held-out loss, nats": loss}

    return cell.train(program, steps, evaluate)


def continued(model, begun: Tensor, length: int, seed: int) -> Tensor:
    """Sample texts ``[B, length]`` that begin as ``begun [B, L]``; the model sees the last L characters."""
    generator = torch.Generator(begun.device).manual_seed(seed)
    ids, num_seen = begun, begun.shape[1]
    while ids.shape[1] < length:
        chances = torch.softmax(model(ids[:, -num_seen:])[:, -1], 1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return ids


def _plain_program(cell: Cell[SafeSelectionConfig], model: nn.Module, train: Tensor, steps: int) -> mlo.Program:
    optimizer = cell.config.model
    options = dict(optimizer=optimizer.optimizer(), scheduler=optimizer.scheduler(steps))
    return cell.program([FinetunePlain("model", model, data=_loader(cell.config, train), **options)])


def _model(start: Mapping[str, Tensor]) -> CharacterModel:
    model = CharacterModel()
    model.load_state_dict(start)
    return model


def _selector(data: Texts) -> DomainWeights:
    """Every text is a domain of its own."""
    return DomainWeights(torch.full([len(data.train)], 1 / len(data.train)))


def _loader(config: SafeSelectionConfig, *tensors: Tensor) -> DataLoader:
    size = min(config.batch_size, len(tensors[0]))
    return DataLoader(TensorDataset(*tensors), size, shuffle=True, drop_last=True)


def draw(axes, outcomes) -> None:
    """How much of the training texts that break the rule is among those with the largest weights."""
    for arm, color in (("SEAL", "#c9a227"), ("hypergradient", "#2a7f62")):
        for i, outcome in enumerate(outcomes.get(arm, ())):
            breaks = outcome.arrays["breaks"][np.argsort(-outcome.arrays["weight"])]
            part = np.arange(1, len(breaks) + 1) / len(breaks)
            axes.plot(part, np.cumsum(breaks) / breaks.sum(), color=color, alpha=0.8, label=None if i else arm)
    axes.plot([0, 1], [0, 1], color="#8a8f98", linewidth=1, linestyle="--", label="by chance")
    axes.set_title("Rule-breaking texts among those kept, one curve a seed", fontsize=10, loc="left")
    axes.set(xlabel="part of the training texts kept, largest weights first", ylabel="part of the breaking ones kept")
    axes.legend(fontsize=9, frameon=False)
    axes.grid(color="#e3e5e8")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


ARMS = {
    "all texts": plain,
    "all, with the rule-keeping ones": partial(plain, with_meta=True),
    "SEAL": partial(selected, by_seal=True),
    "hypergradient": partial(selected, by_seal=False),
    "told which break the rule": partial(plain, with_meta=True, told=True),
}


def build(config: SafeSelectionConfig) -> mlo.Program:
    """The two levels of the true hypergradient, untrained."""
    torch.manual_seed(config.seed)
    cell = Cell(config, "hypergradient", config.seed)
    return two_levels(cell, texts(config, config.seed), CharacterModel().state_dict())


RECIPE = Recipe(
    SafeSelectionConfig,
    build,
    compared(ARMS, draw, smaller_is_better=True),
    "choose the texts to fine-tune a language model on, where some break a house rule",
    "Shen et al. 2024, SEAL: Safety-enhanced Aligned LLM Fine-tuning via Bilevel Data Selection (arXiv:2410.07471)",
)
