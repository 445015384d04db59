"""Fine-tune a language model on instructions, learning the weight of every example from a small clean set.

Two levels. Above, a table with one logit per training example, trained so that the fine-tuned model does well on clean
data; below, the fine-tune on weighted examples:

    min_lambda  mean_j l_j(w*(lambda))           over clean examples j
    s.t.        w*(lambda) = argmin_w  sum_i sigmoid(lambda_i) l_i(w) / sum_i sigmoid(lambda_i)

The denominator is that of the batch at hand, which compares examples that are seen together; or that of the training
set, ``(1/B) sum_i w_i l_i`` with ``w_i = sigmoid(lambda_i) / mean_j sigmoid(lambda_j)``, with which 8 accumulated
batches of one example are one batch of 8.

A known part of the training answers is shuffled among its prompts, so that the learned weights can be judged: by the
AUROC of clean against corrupted examples, and by the held-out loss beside a plain fine-tune on the same batches.

Reference: Ren et al. 2018, "Learning to Reweight Examples for Robust Deep Learning"; Choe et al. 2023 (SAMA).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import scalemlo as mlo

from ..distributed.group import is_main_process, world_size
from ..hf.data.collate import PadCollator
from ..hf.evaluation import map_examples
from ..hf.losses.next_token import example_losses
from ..hf.models.models import LoraSpec, load_causal_lm
from ..hf.models.saving import save_pretrained
from ..hf.trainer.reweighting import ExampleWeights
from ..loop.program import Callback
from ..reporting import write_report
from ..reporting.tables import auroc, markdown_table, phase_table, plot_reweighting, print_table
from ..runs import config as cfg
from .data.instructions import InstructionDataset, corrupt, keep_short, load_instructions, split_rows
from .study.plan_beside import PlanBeside
from .study.recipe import Recipe


@dataclass(kw_only=True)
class ModelConfig:
    """The language model.

    Args:
        name: A model of ``scalemlo assets``, a folder, or a hub name.
        lora: Adapter, or null for full fine-tuning.
        attn_implementation: As in transformers.
    """

    __pydantic_config__ = cfg.STRICT
    name: str
    lora: LoraSpec | None = None
    attn_implementation: str | None = None


@dataclass(kw_only=True)
class DataConfig:
    """The instructions.

    Args:
        name: A data set of ``scalemlo assets``, a json(l) file, or a hub name.
        num_train: Examples to fine-tune on.
        num_meta: Clean examples that the weights are learned from.
        num_heldout: Clean examples that nothing is learned from.
        corrupt_fraction: Part of the training examples that get another one's answer.
        max_length: Tokens per example; longer ones are left out. An example that gets another one's answer may become
            longer and is kept whole, since a cut answer would give the corruption away.
        system: System message; null leaves it to the chat template.
    """

    __pydantic_config__ = cfg.STRICT
    name: str
    num_train: int
    num_meta: int
    num_heldout: int
    corrupt_fraction: float = 0.5
    max_length: int = 128
    system: str | None = None


@dataclass(kw_only=True)
class TrainConfig:
    """The loop.

    Args:
        steps: Outer steps.
        unroll_steps: Fine-tuning steps per outer step.
        batch_size: Training examples per fine-tuning step, over all processes.
        gradient_accumulation_steps: Batches per fine-tuning step; more than one needs ``weight_normalization=dataset``.
        weight_normalization: Whether weights are divided by their mean over the ``batch`` or the ``dataset``.
        meta_batch_size: Clean examples per outer step, over all processes.
        max_grad_norm: Clipping of the fine-tune's gradient, or null.
        eval_every: Outer steps between two evaluations on the held-out examples; 0 for the end only.
        eval_batch_size: Held-out examples per batch, over all processes.
        save_every: Outer steps between two checkpoints of the reweighted run, in ``checkpoints/`` of the output folder;
            one more at its end and at Ctrl-C. 0 writes none.
        save_total_limit: How many of them to keep.
        resume: Whether to go on from the latest one.

    Raises:
        ValueError: If ``save_every`` is negative, or batches are accumulated whose weights are normalised one by one.
    """

    __pydantic_config__ = cfg.STRICT
    steps: int
    unroll_steps: int = 1
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    weight_normalization: Literal["batch", "dataset"] = "batch"
    meta_batch_size: int = 8
    max_grad_norm: float | None = 1.0
    eval_every: int = 0
    eval_batch_size: int = 16
    save_every: int = 0
    save_total_limit: int = 2
    resume: bool = False

    def __post_init__(self) -> None:
        if self.save_every < 0:
            raise ValueError(f"save_every={self.save_every} must not be negative; 0 writes no checkpoints")
        if self.weight_normalization == "batch" and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"weight_normalization=batch with gradient_accumulation_steps={self.gradient_accumulation_steps}: "
                "each batch would be normalised by itself, which is another loss; one example's weight would be 1. "
                "Use weight_normalization=dataset, or gradient_accumulation_steps=1"
            )


@dataclass(kw_only=True)
class ReweightInstructionsConfig(cfg.RunConfig):
    """Configuration of this recipe; see the sections."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    finetune: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    weights: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["identity"])


class Rate(mlo.Level):
    """Upper level: the fine-tuned model should do well on clean examples."""

    def loss(self, batch, finetune):
        """Mean loss over clean examples."""
        return mlo.mean(example_losses(finetune, batch))


class Finetune(mlo.Level):
    """Lower level: fine-tune on weighted examples."""

    normalize: bool  # over the batch

    def loss(self, batch, rater):
        """Weighted mean of the examples' losses."""
        return mlo.weighted_mean(example_losses(self.module, batch), rater(batch["index"]), normalize=self.normalize)


class PlainFinetune(mlo.Level):
    """The baseline: every example counts the same."""

    def loss(self, batch):
        """Mean of the examples' losses."""
        return mlo.mean(example_losses(self.module, batch))


class Indexed(Dataset):
    """Adds to every example its position ``index``, by which its weight is looked up."""

    def __init__(self, dataset: InstructionDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return {**self.dataset[index], "index": index}


@dataclass
class Prepared:
    """Data of one run."""

    train: Indexed
    meta: InstructionDataset
    heldout: InstructionDataset
    corrupted: np.ndarray  # [N] booleans
    prompts: list[str]
    collate: PadCollator


def prepare(config: ReweightInstructionsConfig, tokenizer) -> Prepared:
    """Load, split and corrupt the data.

    Args:
        config: The configuration.
        tokenizer: Of the model.

    Returns:
        Disjoint training, meta and held-out examples.
    """
    data = config.data
    rows = keep_short(load_instructions(data.name), tokenizer, data.max_length, system=data.system)
    split = split_rows(
        rows, num_train=data.num_train, num_meta=data.num_meta, num_heldout=data.num_heldout, seed=config.seed
    )
    train, mask = corrupt(split.train, data.corrupt_fraction, config.seed)
    tokenized = partial(InstructionDataset, tokenizer=tokenizer, max_length=2 * data.max_length, system=data.system)
    dataset = tokenized(train)
    corrupted = {row["example_id"]: flag for row, flag in zip(train, mask, strict=True)}
    prompts = {row["example_id"]: row["prompt"] for row in train}
    ids = [row["example_id"] for row in dataset]
    return Prepared(
        train=Indexed(dataset),
        meta=tokenized(split.meta),
        heldout=tokenized(split.heldout),
        corrupted=np.array([corrupted[i] for i in ids]),
        prompts=[prompts[i] for i in ids],
        collate=PadCollator(tokenizer.pad_token_id),
    )


def losses_of(program: mlo.Program, dataset: Dataset, data: Prepared, batch_size: int) -> np.ndarray:
    """Loss of every example of a data set, all ranks sharing the work. Collective.

    Args:
        program: Its level ``finetune`` is evaluated.
        dataset: N examples.
        data: Has the collator.
        batch_size: Examples per batch, over all processes.

    Returns:
        Losses ``[N]`` in fp64, equal on every rank.
    """
    share = max(1, batch_size // world_size())
    with program.inference("finetune") as model:
        return map_examples(program, dataset, data.collate, share, lambda batch: example_losses(model, batch))


def heldout_loss(program: mlo.Program, data: Prepared, batch_size: int) -> float:
    """Mean loss over the held-out examples. Collective."""
    return float(losses_of(program, data.heldout, data, batch_size).mean())


def build_program(config: ReweightInstructionsConfig, data: Prepared, model: nn.Module, *, plain: bool) -> mlo.Program:
    """The reweighting program, or the plain fine-tune on the same batches.

    Args:
        config: The configuration.
        data: The data.
        model: A fresh model.
        plain: Whether to leave the weights out.

    Returns:
        The program.
    """
    train = config.train
    engine = config.engine.build()
    collate = partial(_collate, data.collate)
    shuffled = partial(DataLoader, shuffle=True, drop_last=True, collate_fn=collate)
    finetune: dict[str, Any] = dict(
        data=shuffled(data.train, batch_size=train.batch_size),
        optimizer=config.finetune.optimizer(),
        scheduler=config.finetune.scheduler(train.steps * train.unroll_steps),
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        max_grad_norm=train.max_grad_norm,
    )
    options: dict[str, Any] = dict(engine=engine, seed=config.seed) | config.program_options()
    if plain:
        return mlo.Program([PlainFinetune("finetune", model, **finetune)], **options)
    over_batch = train.weight_normalization == "batch"
    rate = Rate(
        "rater",
        ExampleWeights(len(data.train), None if over_batch else torch.arange(len(data.train))),
        # `units` names blocks of the language model.
        engine=replace(engine, units=None) if isinstance(engine, mlo.FSDP) else engine,
        data=shuffled(data.meta, batch_size=train.meta_batch_size),
        optimizer=config.weights.optimizer(),
        scheduler=config.weights.scheduler(train.steps),
    )
    lower = Finetune(
        "finetune",
        model,
        unroll_steps=train.unroll_steps,
        hypergradient=config.hypergradient.build(),
        **finetune,
    )
    lower.normalize = over_batch
    return mlo.Program([rate, lower], **options)


def build(config: ReweightInstructionsConfig) -> mlo.Program:
    """The reweighting program, untrained.

    Args:
        config: The configuration.

    Returns:
        The program.
    """
    model, tokenizer = _load(config)
    return build_program(config, prepare(config, tokenizer), model, plain=False)


def run(config: ReweightInstructionsConfig) -> bool:
    """Run the recipe: reweighted fine-tune, plain fine-tune, report.

    Args:
        config: The configuration.

    Returns:
        Whether Ctrl-C ended it early; adapter, weights and table of what was done are written all the same.
    """
    folder = Path(config.output_dir)
    train = config.train
    model, tokenizer = _load(config)
    data = prepare(config, tokenizer)
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        cfg.save(config, folder / "run.yaml")
        print(
            f"{config.model.name} on {len(data.train)} examples of {config.data.name} ({int(data.corrupted.sum())} "
            f"with shuffled answers), {len(data.meta)} clean ones above, {len(data.heldout)} held out; "
            f"{config.engine.build()} on {world_size()} process(es)"
        )

    plan = PlanBeside(config, "reweighted")
    program = build_program(config, data, model, plain=False)
    pretrained = heldout_loss(program, data, train.eval_batch_size)
    first_losses = losses_of(program, data.train, data, train.eval_batch_size)
    program.extra_state["held-out losses"] = [(0, pretrained)]
    checkpoints = folder / "checkpoints"
    saving = None
    if train.save_every:
        saving = mlo.Checkpointing(checkpoints, train.save_every, train.save_total_limit)
    evaluate = _evaluator(config, data)
    resume = checkpoints if train.resume else False
    callbacks = [evaluate, config.tracker("reweighted")]
    histories = {"reweighted": program.run(train.steps, callbacks=callbacks, checkpoint=saving, resume=resume)}
    save_pretrained(program, "finetune", folder / "reweighted", tokenizer)
    weights = torch.sigmoid(program.state_dict("rater").get("logits", torch.zeros(0))).numpy()
    if is_main_process():
        _write_weights(folder, data, weights)
    _add_last(program, data, config)
    curves = {"reweighted": program.extra_state["held-out losses"], "plain": [(0, pretrained)]}

    if not histories["reweighted"].interrupted:
        del program, model
        plain = build_program(config, data, _load(config)[0], plain=True)
        steps = train.steps * train.unroll_steps
        plain.extra_state["held-out losses"] = curves["plain"]
        every = _evaluator(config, data, steps_per_outer=train.unroll_steps)
        histories["plain"] = plain.run(steps, callbacks=[every, config.tracker("plain")])
        _add_last(plain, data, config, steps_per_outer=train.unroll_steps)
    if is_main_process():
        _report(folder, data, weights, first_losses, curves, histories, plan)
    return any(history.interrupted for history in histories.values())


def _load(config: ReweightInstructionsConfig):
    torch.manual_seed(config.seed)
    model = config.model
    return load_causal_lm(model.name, lora=model.lora, attn_implementation=model.attn_implementation)


def _collate(pad: PadCollator, rows: Sequence[dict]) -> dict[str, Tensor]:
    batch = pad(rows)
    return batch | {"index": torch.tensor([row["index"] for row in rows])} if "index" in rows[0] else batch


def _evaluator(config, data: Prepared, steps_per_outer: int = 1) -> Callback:
    """Adds to the curve of held-out losses in the program's ``extra_state``, which a resumed run goes on with."""

    def evaluate(program: mlo.Program, record: dict[str, float]) -> None:
        step, left_over = divmod(program.num_steps, steps_per_outer)
        if config.train.eval_every and not left_over and step % config.train.eval_every == 0:
            loss = heldout_loss(program, data, config.train.eval_batch_size)
            program.extra_state["held-out losses"].append((step, loss))

    return evaluate


def _add_last(program: mlo.Program, data: Prepared, config, steps_per_outer: int = 1) -> None:
    step, curve = program.num_steps // steps_per_outer, program.extra_state["held-out losses"]
    if curve[-1][0] != step:
        curve.append((step, heldout_loss(program, data, config.train.eval_batch_size)))


def _write_weights(folder: Path, data: Prepared, weights: np.ndarray) -> None:
    ids = [row["example_id"] for row in data.train]
    frame = pd.DataFrame(
        {"example_id": ids, "weight": weights, "corrupted": data.corrupted, "prompt": data.prompts}
    ).sort_values("weight")
    frame.to_csv(folder / "weights.csv", index=False)
    frame.to_parquet(folder / "weights.parquet", index=False)


def _report(
    folder: Path, data: Prepared, weights: np.ndarray, first_losses: np.ndarray, curves, histories, plan: PlanBeside
) -> None:
    score, baseline = auroc(weights, ~data.corrupted), auroc(-first_losses, ~data.corrupted)
    pretrained = f"{curves['reweighted'][0][1]:.4f}"
    rows: list[list[object]] = [["pretrained", 0, pretrained, f"{baseline:.3f} (its loss alone)"]]
    for name, label in (("plain", "plain fine-tune"), ("reweighted", "reweighted")):
        step, loss = curves[name][-1]
        done = name in histories
        note = f"{score:.3f}" if name == "reweighted" else ""
        rows.append([label, step if done else "not run", f"{loss:.4f}" if done else "", note])
    header = ["model", "outer steps", "held-out loss", "AUROC clean / corrupted"]
    print_table("Held-out loss", header, rows)
    spread = f"weights: mean {weights.mean():.3f}, sd {weights.std():.3f}"
    spread += f"; clean {weights[~data.corrupted].mean():.3f}" if (~data.corrupted).any() else ""
    spread += f", corrupted {weights[data.corrupted].mean():.3f}" if data.corrupted.any() else ""
    print(spread)
    if weights.std() < 1e-3:
        print("The weights hardly vary: raise weights.learning_rate or train.steps.")
    planned = plan.finish(wait=not histories["reweighted"].interrupted)
    phase_header, phases, said = phase_table(histories, planned, plan.reason)
    print_table("Seconds and bytes per phase", phase_header, phases)
    if said:
        print(said)
    for name, history in histories.items():
        history.save(folder / name)
        if history.skipped:
            print(f"{name}: skipped updates {history.skipped}")
    losses = {
        f"{run}: {level}": h.column(f"loss/{level}") for run, h in histories.items() for level in ("rater", "finetune")
    }
    plot_reweighting(
        folder / "report.png",
        weights=weights,
        corrupted=data.corrupted,
        auroc_value=score,
        losses={name: values for name, values in losses.items() if values and name != "plain: finetune"},
        heldout={name: points for name, points in curves.items() if len(points) > 1},
    )
    (folder / "report.md").write_text(
        markdown_table(header, rows) + f"\n{spread}\n\n" + markdown_table(phase_header, phases) + f"\n{said}\n"
    )
    summary = {"header": header, "rows": rows, "note": spread, "heldout": curves}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    write_report(folder)
    print(f"wrote {folder}/report.html, report.png, report.md, weights.csv, weights.parquet, reweighted/")


RECIPE = Recipe(
    ReweightInstructionsConfig,
    build,
    run,
    "fine-tune a language model on instructions, learning the weight of every example from a small clean set",
    "Ren et al. 2018, Learning to Reweight Examples for Robust Deep Learning (arXiv:1803.09050)",
)
