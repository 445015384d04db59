"""What the recipes with two levels in one adapted model share: configuration, data, programs, arms of the comparison.

The training examples are split in two. The lower level trains on one part, the upper level on the other; afterwards
one level may train on both. Baselines train a plain adapter on both: with as many steps, and with more of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import scalemlo as mlo

from ..distributed.group import is_main_process
from ..hf.data.prepare import prepare_dataset
from ..hf.data.prepared import PreparedDataset
from ..hf.data.tasks import TASKS, Task
from ..hf.data.tokenizing import ensure_pad_token
from ..hf.evaluation import Predictions, run_over
from ..hf.models.models import LoraSpec, load_causal_lm
from ..hf.models.peft import add_adapters, add_orthogonality
from ..runs import config as cfg
from ..runs.assets import fetch, resolve_model
from .data.instructions import keep_short, load_instructions
from .study.study import Cell, ComparisonConfig, Outcome


@dataclass(kw_only=True)
class DataConfig:
    """The examples.

    Args:
        name: ``rotten_tomatoes`` (sentences to classify, drawn movie by movie), or instructions: a data set of
            ``scalemlo assets``, a json(l) file or a hub name.
        num_train: Examples that training may see, both levels together.
        num_heldout: Examples for the evaluation at the end.
        validation_fraction: Part of the training examples that the upper level has.
        max_length: Tokens per example; longer ones are left out.

    Raises:
        ValueError: If the fraction is not between 0 and 1.
    """

    __pydantic_config__ = cfg.STRICT
    name: str
    num_train: int
    num_heldout: int
    validation_fraction: float
    max_length: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} must be between 0 and 1")


@dataclass(kw_only=True)
class TrainConfig:
    """The loop.

    Args:
        steps: Steps of the upper level.
        unroll_steps: Steps of the lower level between two of the upper one.
        retrain_steps: Steps of one level on all training examples afterwards, where the recipe has them.
        longer_steps: Steps of the plain adapter that spends what two levels cost on training.
        batch_size: Examples per step, over all processes, at either level.
        max_grad_norm: Clipping of the lower level's gradient, or null.
        orthogonality: What the recipe's orthogonality term is multiplied with, where it has one.

    Raises:
        ValueError: If ``longer_steps`` is not positive.
    """

    __pydantic_config__ = cfg.STRICT
    steps: int
    unroll_steps: int = 1
    retrain_steps: int = 0
    longer_steps: int = 100
    batch_size: int = 16
    max_grad_norm: float | None = 1.0
    orthogonality: float = 0.0

    def __post_init__(self) -> None:
        if self.longer_steps < 1:
            raise ValueError(f"longer_steps={self.longer_steps} must be at least 1")

    @property
    def num_lower_steps(self) -> int:
        """Steps of the lower level and of retraining together: what a plain adapter takes."""
        return self.steps * self.unroll_steps + self.retrain_steps


@dataclass(kw_only=True)
class BilevelPeftConfig(ComparisonConfig):
    """Configuration of these recipes.

    Args:
        model: A model of ``scalemlo assets``, a folder, or a hub name.
        lora: Rank, scale and layers of the adapters; its seed is added to the arm's.
        data: The examples.
        train: The loop.
        upper: Optimizer of the upper level.
        lower: Optimizer of the lower level, of retraining and of the baselines.
        hypergradient: How the upper level differentiates through the lower one.
    """

    model: str
    lora: LoraSpec = field(default_factory=LoraSpec)
    data: DataConfig
    train: TrainConfig
    upper: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    lower: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["identity"])


BilevelCell = Cell[BilevelPeftConfig]


class TaskLevel(mlo.Level):
    """A level of these recipes: knows the losses of its task, and the weight of the orthogonality term."""

    def __init__(self, *args, task: Task, orthogonality: float = 0.0, **options):
        super().__init__(*args, **options)
        self.task, self.orthogonality = task, orthogonality

    def mean_loss(self, model, batch) -> Tensor:
        """Mean loss of a model over the examples of all ranks."""
        return mlo.mean(self.task.losses(model, batch))


class Finetune(TaskLevel):
    """One level: the baseline, and retraining."""

    def loss(self, batch):
        """Mean loss, and the orthogonality term where it has a weight."""
        loss = self.mean_loss(self.module, batch)
        return loss + self.orthogonality * self.module.orthogonality() if self.orthogonality else loss


@dataclass(frozen=True)
class Method:
    """What makes one of these recipes.

    Attributes:
        kind: Of the adapters, see :data:`scalemlo.hf.models.peft.KINDS`.
        owned: Pattern of the names of the upper level's parameters; the lower level has all others that are trained.
        upper: Name and class of the upper level.
        lower: Name and class of the lower level.
        term: Orthogonality term of an adapted layer, if it has one.
    """

    kind: str
    owned: str
    upper: tuple[str, type[TaskLevel]]
    lower: tuple[str, type[TaskLevel]]
    term: Callable[[Any], Tensor] | None = None


@dataclass
class Prepared:
    """Data of one arm, and what it is trained with."""

    train: Dataset
    validation: Dataset
    heldout: PreparedDataset
    task: Task
    tokenizer: Any

    @property
    def is_classification(self) -> bool:
        """Whether there are classes to be right about."""
        return self.heldout.kind == "classification"

    def collate(self, rows) -> dict[str, Tensor]:
        """A padded batch."""
        return self.task.collator(self.tokenizer.pad_token_id)(rows)


def prepare(cell: BilevelCell) -> Prepared:
    """Load, tokenise and split the examples by the cell's seed.

    Args:
        cell: The arm and its seed.

    Returns:
        Disjoint parts.

    Raises:
        ValueError: If there are too few examples.
    """
    data = cell.config.data
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model(cell.config.model))
    ensure_pad_token(tokenizer)
    rows, groups = _rows(data, tokenizer)
    shuffled = np.random.default_rng(cell.seed).permutation(np.unique(groups)).tolist()
    place = {group: i for i, group in enumerate(shuffled)}
    rows = [row for _, row in sorted(zip(groups, rows, strict=True), key=lambda pair: place[pair[0]])]
    if len(rows) < data.num_train + data.num_heldout:
        raise ValueError(
            f"data: num_train ({data.num_train}) + num_heldout ({data.num_heldout}) is more than the {len(rows)} "
            f"examples of {data.name} with at most {data.max_length} tokens; ask for fewer or raise max_length"
        )
    prepared: Any = partial(prepare_dataset, processing_class=tokenizer, max_length=2 * data.max_length)
    both = prepared(rows[: data.num_train], name="train")
    heldout = prepared(rows[len(rows) - data.num_heldout :], name="heldout")
    cut = len(both) - round(data.validation_fraction * len(both))
    parts = Subset(both, range(cut)), Subset(both, range(cut, len(both)))
    return Prepared(*parts, heldout=heldout, task=TASKS[heldout.kind], tokenizer=tokenizer)


def _rows(data: DataConfig, tokenizer) -> tuple[list[dict], list]:
    """Rows, and the group that each is drawn with."""
    if data.name == "rotten_tomatoes":
        frame = pd.read_csv(fetch("rotten_tomatoes"))
        frame = frame[frame["category"].isin(("fresh", "rotten"))].dropna(subset=["text"]).drop_duplicates("text")
        lengths = [len(ids) for ids in tokenizer(frame["text"].tolist())["input_ids"]]
        frame = frame[np.array(lengths) <= data.max_length]
        labels = (frame["category"] == "fresh").astype(int)
        rows = [{"text": t, "label": y} for t, y in zip(frame["text"], labels.tolist(), strict=True)]
        return rows, frame["movie_name"].astype(str).tolist()
    kept = keep_short(load_instructions(data.name), tokenizer, data.max_length)
    return [{"prompt": r["prompt"], "completion": r["completion"]} for r in kept], list(range(len(kept)))


def fresh_model(cell: BilevelCell, data: Prepared, kind: str, **options: Any) -> Any:
    """The pretrained model with new adapters, and for sequences a new head.

    Args:
        cell: The arm and its seed.
        data: Decides the kind of model.
        kind: Of the adapters.
        **options: To :func:`scalemlo.hf.models.peft.add_adapters`.

    Returns:
        The model, the same on every rank.
    """
    config = cell.config
    torch.manual_seed(cell.seed)
    if data.is_classification:
        path = resolve_model(config.model)
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=torch.float32)
        model.config.pad_token_id = data.tokenizer.pad_token_id
    else:
        model = load_causal_lm(config.model)[0]
    task_type = "SEQ_CLS" if data.is_classification else "CAUSAL_LM"
    spec = replace(config.lora, seed=config.lora.seed + cell.seed)
    return add_adapters(model, spec, kind, task_type=task_type, **options).train()


def search_program(cell: BilevelCell, data: Prepared, method: Method) -> mlo.Program:
    """The two levels in one model, untrained.

    Args:
        cell: The arm and its seed.
        data: The data.
        method: The recipe.

    Returns:
        The program.
    """
    config, train = cell.config, cell.config.train
    model = fresh_model(cell, data, method.kind)
    if method.term is not None:
        add_orthogonality(model, method.term)
    (upper, upper_cls), (lower, lower_cls) = method.upper, method.lower
    levels = [
        upper_cls(
            upper,
            model,
            task=data.task,
            data=_loader(config, data, data.validation),
            parameters=method.owned,
            optimizer=config.upper.optimizer(),
            scheduler=config.upper.scheduler(train.steps),
        ),
        lower_cls(
            lower,
            model,
            task=data.task,
            orthogonality=train.orthogonality,
            data=_loader(config, data, data.train),
            parameters=partial(_not_matching, method.owned),
            unroll_steps=train.unroll_steps,
            hypergradient=config.hypergradient.build(),
            **_lower_options(config, train.steps * train.unroll_steps),
        ),
    ]
    return cell.program(levels)


def _lower_options(config: BilevelPeftConfig, num_steps: int) -> dict[str, Any]:
    return dict(
        optimizer=config.lower.optimizer(),
        scheduler=config.lower.scheduler(num_steps),
        max_grad_norm=config.train.max_grad_norm,
    )


def _loader(config: BilevelPeftConfig, data: Prepared, part: Dataset) -> DataLoader:
    return DataLoader(part, config.train.batch_size, shuffle=True, drop_last=True, collate_fn=data.collate)


def _not_matching(pattern: str, name: str) -> bool:
    return not fnmatchcase(name, pattern)


def evaluate(program: mlo.Program, level: str, data: Prepared, batch_size: int = 32) -> dict[str, float]:
    """Mean loss over the held-out examples, and the accuracy where there are classes. Collective.

    Args:
        program: The program.
        level: Whose module is evaluated.
        data: Has the examples, which the ranks share.
        batch_size: Per rank.

    Returns:
        ``held-out loss`` and perhaps ``accuracy, %``.
    """
    logits = Predictions() if data.is_classification else None
    found = run_over(program, level, data.heldout, data.collate, data.task.losses, batch_size, predictions=logits)
    result = {"held-out loss": float(found.losses.mean())}
    if found.predictions is not None:
        result["accuracy, %"] = 100 * float((found.predictions.argmax(1) == found.labels).mean())
    return result


# ---- what arms do ----------------------------------------------------------------------------------------------------
def search(cell: BilevelCell, data: Prepared, method: Method) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train the two levels.

    Args:
        cell: The arm and its seed.
        data: The data.
        method: The recipe.

    Returns:
        What was trained, on rank 0, and the scores.
    """
    program, lower = search_program(cell, data, method), method.lower[0]
    scores = cell.train(program, cell.config.train.steps, lambda: evaluate(program, lower, data))
    return program.state_dict(lower, trainable_only=True), scores


def finetune(
    cell: BilevelCell, data: Prepared, model: Any, num_steps: int, **options: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train one level on all training examples.

    Args:
        cell: The arm and its seed.
        data: The data.
        model: A model with adapters; where ranks differ, the first one's counts.
        num_steps: Of the level.
        **options: Of the level.

    Returns:
        What was trained, on rank 0, and the scores.
    """
    config = cell.config
    loader = _loader(config, data, ConcatDataset([data.train, data.validation]))
    level = Finetune("finetune", model, task=data.task, data=loader, **_lower_options(config, num_steps), **options)
    program = cell.program([level])
    scores = cell.train(program, num_steps, lambda: evaluate(program, "finetune", data))
    return program.state_dict("finetune", trainable_only=True), scores


def plain(cell: BilevelCell, *, kind: str, longer: bool = False) -> Outcome:
    """A baseline: a plain adapter on all training examples.

    Args:
        cell: The arm and its seed.
        kind: Of the adapters.
        longer: Whether to take ``longer_steps`` instead of as many as the lower level and retraining.

    Returns:
        What it found.
    """
    data, train = prepare(cell), cell.config.train
    num_steps = train.longer_steps if longer else train.num_lower_steps
    return Outcome(finetune(cell, data, fresh_model(cell, data, kind), num_steps)[1])


def save(cell: BilevelCell, data: Prepared, kind: str, state: Mapping[str, Tensor], **options: Any) -> None:
    """Write ``adapter-<seed>/`` for ``PeftModel.from_pretrained``; rank 0 does.

    Args:
        cell: The arm and its seed.
        data: Decides the kind of model.
        kind: Of the adapters.
        state: All their tensors, those that were frozen at the end too.
        **options: As in :func:`fresh_model`.
    """
    if is_main_process():
        folder = Path(cell.config.output_dir) / f"adapter-{cell.seed}"
        model = fresh_model(cell, data, kind, **options)
        model.load_state_dict(state, strict=False)
        model.save_pretrained(str(folder))
        data.tokenizer.save_pretrained(folder)


def draw_by_layer(axes: Any, outcomes: Mapping[str, Any], arm: str, title: str, label: str) -> None:
    """A line a seed of an array ``by layer`` with one number for every adapted layer, first layer first.

    Args:
        axes: To draw on.
        outcomes: By arm.
        arm: Whose arrays are drawn.
        title: Of the picture.
        label: Of the vertical axis.
    """
    for outcome in outcomes.get(arm, ()):
        axes.plot(outcome.arrays["by layer"], color="#2a7f62", alpha=0.7, marker="o", markersize=4)
    axes.set(xlabel="adapted layer", ylabel=label)
    axes.set_title(title, fontsize=10, loc="left")
