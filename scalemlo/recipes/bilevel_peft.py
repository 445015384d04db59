"""What the recipes with two levels in one adapted model share: configuration, data, programs, evaluation, report.

The training examples are split in two. The lower level trains on one part, the upper level on the other; afterwards
one level may train on both. A plain adapter, trained on both with as many steps, is the baseline.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import scalemlo as mlo

from .. import config as cfg
from ..assets import fetch, resolve_model
from ..distributed import is_main_process
from ..hf.data import keep_short, load_instructions
from ..hf.evaluation import Predictions, run_over
from ..hf.models import LoraSpec, load_causal_lm
from ..hf.peft import add_adapters, add_orthogonality
from ..hf.prepare import prepare_dataset
from ..hf.prepared import PreparedDataset
from ..hf.tasks import TASKS, Task
from ..hf.tokenizing import ensure_pad_token
from ..reporting import markdown_table, phase_table, print_table
from ..scheduler.beside import PlanBeside
from ..tracking import History


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
        batch_size: Examples per step, over all processes, at either level.
        max_grad_norm: Clipping of the lower level's gradient, or null.
        orthogonality: What the recipe's orthogonality term is multiplied with, where it has one.
    """

    __pydantic_config__ = cfg.STRICT
    steps: int
    unroll_steps: int = 1
    retrain_steps: int = 0
    batch_size: int = 16
    max_grad_norm: float | None = 1.0
    orthogonality: float = 0.0


@dataclass(kw_only=True)
class BilevelPeftConfig(cfg.RunConfig):
    """Configuration of these recipes.

    Args:
        model: A model of ``scalemlo assets``, a folder, or a hub name.
        lora: Rank, scale and layers of the adapters.
        data: The examples.
        train: The loop.
        upper: Optimizer of the upper level.
        lower: Optimizer of the lower level, of retraining and of the baseline.
        hypergradient: How the upper level differentiates through the lower one.
        baseline: Plain adapter to train on the same examples for comparison, or ``none``.
    """

    model: str
    lora: LoraSpec = field(default_factory=LoraSpec)
    data: DataConfig
    train: TrainConfig
    upper: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    lower: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["identity"])
    baseline: Literal["lora", "dora", "none"] = "lora"


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
        kind: Of the adapters, see :data:`scalemlo.hf.peft.KINDS`.
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
    """Data of one run, and what it is trained with."""

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


def prepare(config: BilevelPeftConfig) -> Prepared:
    """Load, tokenise and split the examples by the run's seed.

    Args:
        config: The configuration.

    Returns:
        Disjoint parts.

    Raises:
        ValueError: If there are too few examples.
    """
    data = config.data
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(config.model))
    ensure_pad_token(tokenizer)
    rows, groups = _rows(data, tokenizer)
    shuffled = np.random.default_rng(config.seed).permutation(np.unique(groups)).tolist()
    place = {group: i for i, group in enumerate(shuffled)}
    rows = [row for _, row in sorted(zip(groups, rows, strict=True), key=lambda pair: place[pair[0]])]
    if len(rows) < data.num_train + data.num_heldout:
        raise ValueError(
            f"data: num_train ({data.num_train}) + num_heldout ({data.num_heldout}) is more than the {len(rows)} "
            f"examples of {data.name} with at most {data.max_length} tokens; ask for fewer or raise max_length"
        )
    prepared = partial(prepare_dataset, processing_class=tokenizer, max_length=2 * data.max_length)
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


def fresh_model(config: BilevelPeftConfig, data: Prepared, kind: str, **options) -> Any:
    """The pretrained model with new adapters, and for sequences a new head.

    Args:
        config: The configuration.
        data: Decides the kind of model.
        kind: Of the adapters.
        **options: To :func:`scalemlo.hf.peft.add_adapters`.

    Returns:
        The model, the same on every rank.
    """
    torch.manual_seed(config.seed)
    if data.is_classification:
        path = resolve_model(config.model)
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=torch.float32)
        model.config.pad_token_id = data.tokenizer.pad_token_id
    else:
        model = load_causal_lm(config.model)[0]
    task_type = "SEQ_CLS" if data.is_classification else "CAUSAL_LM"
    return add_adapters(model, config.lora, kind, task_type=task_type, **options).train()


def search_program(config: BilevelPeftConfig, data: Prepared, method: Method) -> mlo.Program:
    """The two levels in one model, untrained.

    Args:
        config: The configuration.
        data: The data.
        method: The recipe.

    Returns:
        The program.
    """
    train = config.train
    model = fresh_model(config, data, method.kind)
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
    return mlo.Program(levels, **_program_options(config))


def finetune_program(config: BilevelPeftConfig, data: Prepared, model, num_steps: int, **options) -> mlo.Program:
    """One level ``finetune`` on all training examples.

    Args:
        config: The configuration.
        data: The data.
        model: A model with adapters; where ranks differ, the first one's counts.
        num_steps: For the learning-rate schedule.
        **options: Of the level.

    Returns:
        The program.
    """
    loader = _loader(config, data, ConcatDataset([data.train, data.validation]))
    options |= dict(task=data.task, data=loader, **_lower_options(config, num_steps))
    level = Finetune("finetune", model, **options)
    return mlo.Program([level], **_program_options(config))


def _program_options(config: BilevelPeftConfig) -> dict[str, Any]:
    engine = config.engine.build()
    return dict(engine=engine, seed=config.seed, nonfinite=config.nonfinite, memory=config.memory)


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
        ``heldout loss`` and perhaps ``accuracy``.
    """
    logits = Predictions() if data.is_classification else None
    found = run_over(program, level, data.heldout, data.collate, data.task.losses, batch_size, predictions=logits)
    result = {"heldout loss": float(found.losses.mean())}
    if found.predictions is not None:
        result["accuracy"] = float((found.predictions.argmax(1) == found.labels).mean())
    return result


SEARCH = "two levels"
"""Name of the run of both levels."""


class Run:
    """One run of one of these recipes: what it trains, and what it reports at the end.

    Args:
        config: The configuration.
        method: The recipe.
    """

    def __init__(self, config: BilevelPeftConfig, method: Method):
        self.config, self.method, self.data = config, method, prepare(config)
        self.folder = Path(config.output_dir)
        self.rows: dict[str, dict[str, float]] = {}
        self.histories: dict[str, History] = {}
        self.interrupted = False
        if is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            cfg.save(config, self.folder / "run.yaml")
        self.plan = PlanBeside(config, SEARCH)

    def train(self, name: str, program: mlo.Program, level: str, num_steps: int) -> History:
        """Train a program, evaluate it, and keep its history in the run's folder.

        Args:
            name: Of the row of the report.
            program: The program.
            level: Whose module is evaluated.
            num_steps: Outer steps.

        Returns:
            The history.
        """
        history = program.run(num_steps, callbacks=[self.config.tracker(name)])
        self.histories[name], self.interrupted = history, history.interrupted
        found = evaluate(program, level, self.data)
        seconds = sum(phase.cpu_seconds for phase in history.phases.values())
        self.rows[name] = found | {"steps": len(history.steps), "CPU seconds": seconds}
        if is_main_process():
            history.save(self.folder / name.replace(" ", "_"))
        return history

    def search(self) -> mlo.Program:
        """Train the two levels."""
        program = search_program(self.config, self.data, self.method)
        self.train(SEARCH, program, self.method.lower[0], self.config.train.steps)
        return program

    def retrain(self, model, **options) -> dict[str, Tensor]:
        """Train one level on all training examples; nothing after Ctrl-C.

        Args:
            model: With adapters.
            **options: Of the level.

        Returns:
            What was trained, on rank 0.
        """
        if self.interrupted:
            return {}
        steps = self.config.train.retrain_steps
        program = finetune_program(self.config, self.data, model, steps, **options)
        self.train("retrained", program, "finetune", steps)
        return program.state_dict("finetune", trainable_only=True)

    def save(self, kind: str, state: Mapping[str, Tensor], **options: Any) -> None:
        """Write ``adapter/`` for ``PeftModel.from_pretrained``; rank 0 does.

        Args:
            kind: Of the adapters.
            state: All their tensors, those that were frozen at the end too.
            **options: As in :func:`fresh_model`.
        """
        if is_main_process():
            model = fresh_model(self.config, self.data, kind, **options)
            model.load_state_dict(state, strict=False)
            model.save_pretrained(str(self.folder / "adapter"))
            self.data.tokenizer.save_pretrained(self.folder / "adapter")

    def finish(self, **facts: Any) -> bool:
        """Train the baseline, and write the report.

        Args:
            **facts: What else the report says.

        Returns:
            Whether Ctrl-C ended the run early.
        """
        train, kind = self.config.train, self.config.baseline
        steps = train.steps * train.unroll_steps + train.retrain_steps
        if kind != "none" and not self.interrupted:
            model = fresh_model(self.config, self.data, kind)
            self.train(f"plain {kind}", finetune_program(self.config, self.data, model, steps), "finetune", steps)
        if is_main_process():
            self._report(facts)
        return self.interrupted

    def _report(self, facts: Mapping[str, Any]) -> None:
        header = ["model", *next(iter(self.rows.values()))]
        rows = [[name, *(f"{v:.4g}" for v in row.values())] for name, row in self.rows.items()]
        print_table("Held-out examples", header, rows)
        said = "\n".join(f"{key}: {value}" for key, value in facts.items())
        planned = self.plan.finish(wait=not self.interrupted)
        phase_header, phases, note = phase_table(self.histories, planned, self.plan.reason)
        print_table("Seconds and bytes per phase", phase_header, phases)
        print(f"{note}\n{said}".strip())
        table = f"{markdown_table(phase_header, phases)}\n{note}\n"
        (self.folder / "report.md").write_text(f"{markdown_table(header, rows)}\n{said}\n\n{table}")
        (self.folder / "summary.json").write_text(json.dumps({"rows": self.rows, **facts}, indent=2))
