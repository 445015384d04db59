"""``ReweightingTrainer``: fine-tune a model while learning how much each example, domain or token should count."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback
from transformers.trainer_utils import EvalPrediction

from ...checkpoint.writable import check_writable
from ...distributed.ranks import Ranks
from ...versions import checkpointing_of
from ..data.fit import check_fits
from ..data.overlap import warn_of_overlap
from ..data.prepared import PreparedDataset
from ..evaluation import map_examples
from ..losses.per_example import Losses
from .config import ReweightingConfig
from .engine_choice import small_engine
from .loader import make_loader
from .model import load_model, made_ready
from .reweighting import REWEIGHTINGS, Finetune, Rate
from .trainer import MLOTrainer

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

SMALLEST_VARIATION = 1e-3
"""Standard deviation of the weights, over their mean, below which they are reported not to vary."""


class ReweightingTrainer(MLOTrainer):
    """Fine-tunes on weighted data; the weights are learned so that the model does well on ``meta_dataset``.

    Two levels, ``rater`` above ``finetune``; their equations stand in :mod:`scalemlo.hf.trainer.reweighting`. Logs have
    ``loss``, ``grad_norm`` and ``learning_rate`` of the fine-tune, ``meta_loss``, ``rater/grad_norm`` and
    ``rater/learning_rate`` of the weights.

    Args:
        model: A model, or the name or folder of a causal language model.
        args: Arguments.
        train_dataset: Data whose examples get weights; every format of :func:`scalemlo.hf.prepare_dataset`.
        meta_dataset: Data that the fine-tuned model should do well on; small, clean, none of it in ``train_dataset``.
        eval_dataset: Data to evaluate on, or a dict of them by name.
        processing_class: The tokenizer; by default that of a model given by name.
        peft_config: Adapter to train in the place of the model's weights.
        data_collator: As in :class:`MLOTrainer`; its batches must keep ``example_id`` (and ``domain_id``).
        losses: ``losses(model, batch)`` gives one loss per example, ``[B]``; by default by the kind of the data.
        compute_metrics: As in :class:`MLOTrainer`.
        preprocess_logits_for_metrics: As in :class:`MLOTrainer`.
        callbacks: As in :class:`MLOTrainer`.
        optimizers: Optimizer and scheduler of the fine-tuned model, over its trainable parameters; None for those of
            the arguments.

    Raises:
        ValueError: If a data set is missing, empty or without length, a column is, or the model cannot be trained.
    """

    args: ReweightingConfig  # ty: ignore[incompatible-mutable-override]
    level_prefixes = {"rater": "meta_loss"}

    def __init__(
        self,
        model: str | nn.Module,
        args: ReweightingConfig | None = None,
        train_dataset: Any = None,
        meta_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        data_collator: Callable[[list], Mapping[str, Tensor]] | None = None,
        losses: Losses | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        callbacks: Sequence[type[TrainerCallback] | TrainerCallback] = (),
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
    ):
        args = args if args is not None else ReweightingConfig(output_dir="trainer_output")
        for name, dataset in {"train_dataset": train_dataset, "meta_dataset": meta_dataset}.items():
            if dataset is None:
                raise ValueError(
                    f"{name} is missing: ReweightingTrainer fine-tunes on train_dataset and learns its weights from "
                    "meta_dataset, a small set of examples that the model should do well on."
                )
        Ranks().together(partial(check_writable, args.output_dir, "output_dir"))
        torch.manual_seed(args.seed)
        model_options: Any = args.model_init_kwargs  # like other dicts, read by __post_init__
        if isinstance(model, str):
            model, tokenizer = load_model(model, model_options, is_frozen=peft_config is not None)
            processing_class = processing_class or tokenizer
        elif model_options:
            raise ValueError(f"model_init_kwargs={model_options!r} has no effect: model is a module already.")
        self.args, self.processing_class, self._collate, self._losses = args, processing_class, data_collator, losses
        hypergradient = args.build_hypergradient()
        model = made_ready(model, peft_config, hypergradient, checkpointing_of(args))
        domains = {"domain_column": args.domain_column} if args.domain_column is not None else {}
        self._source = train_dataset
        self.train_dataset = self._prepared(train_dataset, "train_dataset", **domains)
        self.meta_dataset = self._prepared(meta_dataset, "meta_dataset")
        for part in (self.train_dataset, self.meta_dataset):
            if not isinstance(part, PreparedDataset):
                raise ValueError(
                    f"{type(part).__name__} has no length or is not prepared: weights are kept by example_id. Pass "
                    "rows that fit in memory, prepared by scalemlo.hf.prepare_dataset where data_collator is given."
                )
            check_fits(model, part)
        if data_collator is None and self.meta_dataset.kind != self.train_dataset.kind:
            raise ValueError(
                f"meta_dataset has rows of the format {self.meta_dataset.format.name!r} "
                f"({self.meta_dataset.kind}) and train_dataset of {self.train_dataset.format.name!r} "
                f"({self.train_dataset.kind}): both are read by one collator and one loss. Give both the same format, "
                "or data_collator and losses that take both."
            )
        warn_of_overlap(self.train_dataset, self.meta_dataset)
        collate, example_losses = self._task_of(self.train_dataset)
        self.reweighting = REWEIGHTINGS[args.reweighting](args, self.train_dataset, example_losses, model)
        per_step = args.train_batch_size * args.gradient_accumulation_steps
        data = make_loader(args, self.train_dataset, args.train_batch_size, per_step, collate)
        epoch_steps = len(self.train_dataset) // per_step
        steps = args.max_steps if args.max_steps > 0 else max(1, round(args.num_train_epochs * epoch_steps))
        optimizer, scheduler = optimizers
        rate = Rate(
            "rater",
            self.reweighting.module,
            data=make_loader(args, self.meta_dataset, args.meta_batch_size, args.meta_batch_size, collate),
            optimizer=args.build_meta_optimizer(),
            engine=small_engine(),
            losses=example_losses,
        )
        finetune = Finetune(
            "finetune",
            model,
            data=data,
            optimizer=args.build_optimizer() if optimizer is None else optimizer,
            scheduler=args.build_scheduler(steps) if scheduler is None else scheduler,
            unroll_steps=args.unroll_steps,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm or None,
            hypergradient=hypergradient,
            reweighting=self.reweighting,
        )
        self._set_up(
            [rate, finetune], args, eval_dataset, processing_class, data_collator, losses, compute_metrics,
            preprocess_logits_for_metrics, callbacks, "finetune",
        )  # fmt: skip

    def train(self, resume_from_checkpoint: bool | str | None = None):
        """See :meth:`MLOTrainer.train`; says so if the weights do not vary in the end."""
        output = super().train(resume_from_checkpoint)
        weights = self.example_weights()
        variation = float(weights.std() / weights.mean()) if len(weights) else 0.0
        if not variation > SMALLEST_VARIATION:
            logger.warning(
                "the weights hardly vary (standard deviation / mean = %.1e): raise meta_learning_rate (%g) or the "
                "number of steps, or use weight_normalization='batch' where it is 'none'.",
                variation,
                self.args.meta_learning_rate,
            )
        return output

    # ---- the weights ---------------------------------------------------------------------------------------------
    def example_weights(self) -> np.ndarray:
        """The weight of every example of the prepared training set, in its order. Collective.

        Where weights depend on losses, these are of the model as it is now, each without its batch.

        Returns:
            ``[N]`` in fp64, equal on every rank.
        """
        collate, _ = self._task_of(self.train_dataset)
        program, size = self.program, self.args.per_device_eval_batch_size
        with program.inference("finetune") as model, program.inference("rater") as rater:
            return map_examples(
                program,
                self.train_dataset,
                collate,
                size,
                lambda batch: self.reweighting.example_weights(model, rater, batch),
            )

    def weights_table(self) -> pd.DataFrame:
        """``example_id``, ``weight``, ``domain`` (where there are any) and ``text`` of every example. Collective."""
        import pandas as pd

        data = self.train_dataset
        columns: dict[str, Any] = {"example_id": data.example_ids, "weight": self.example_weights()}
        if data.domain_ids:
            columns["domain"] = [data.domains[i] for i in data.domain_ids]
        columns["text"] = [self._preview(row) for row in data]
        return pd.DataFrame(columns)

    def save_weights(self, path: str) -> None:
        """Write :meth:`weights_table` as CSV or Parquet, by the path's ending. Collective.

        Args:
            path: Ends in ``.csv`` or ``.parquet``.

        Raises:
            ValueError: If it does not.
        """
        if not str(path).endswith((".csv", ".parquet")):
            raise ValueError(f"path={path!r} must end in .csv or .parquet.")
        table = self.weights_table()
        if self.is_world_process_zero():
            (table.to_csv if str(path).endswith(".csv") else table.to_parquet)(path, index=False)

    def filtered_dataset(self, top_k_percent: float) -> Any:
        """The examples with the largest weights, in the order and the form of ``train_dataset``. Collective.

        Args:
            top_k_percent: How many of the prepared examples, in per cent; rounded, at least one.

        Returns:
            A ``datasets.Dataset`` or ``DataFrame`` where ``train_dataset`` is one (their own methods save them), else a
            list of rows.

        Raises:
            ValueError: If it is not in (0, 100].
        """
        if not 0 < top_k_percent <= 100:
            raise ValueError(f"top_k_percent={top_k_percent!r} must be in (0, 100].")
        weights = self.example_weights()
        count = max(1, round(len(weights) * top_k_percent / 100))
        positions = np.sort(np.argsort(-weights, kind="stable")[:count])
        source = self._source
        if isinstance(source, PreparedDataset):
            return [source[i] for i in positions]
        chosen = {self.train_dataset.example_ids[i] for i in positions}
        kept = [i for i, example_id in enumerate(self._source_ids()) if example_id in chosen]
        if hasattr(source, "select"):
            return source.select(kept)
        return source.iloc[kept] if hasattr(source, "iloc") else [source[i] for i in kept]

    def _source_ids(self) -> list[int]:
        """``example_id`` of every row of the source, as ``prepare_dataset`` gives them."""
        source, size = self._source, len(self._source)
        columns = getattr(source, "column_names", None) or getattr(source, "columns", None)
        options: Any = self.args.dataset_options
        named = options.get("column_names", {}).get("example_id", "example_id")
        has_ids = named in (columns if columns is not None else source[0])
        if not has_ids:
            return list(range(size))
        return list(source[named]) if columns is not None else [source[i][named] for i in range(size)]

    def _preview(self, row: Mapping[str, Any]) -> str:
        ids = row.get("input_ids", row.get("chosen_input_ids", []))
        decode = getattr(self.processing_class, "decode", None)
        return decode(ids, skip_special_tokens=True)[: self.args.preview_chars] if decode is not None else ""

    def _describe_data(self) -> dict[str, str]:
        def describe(data: PreparedDataset) -> str:
            return f"{len(data)} examples, {data.format.name}"

        own = {"training": describe(self.train_dataset), "meta": describe(self.meta_dataset)}
        return own | super()._describe_data()

    def _hyperparameters(self) -> dict[str, Any]:
        args = self.args
        return {
            "reweighting": args.reweighting,
            "weight normalization": args.weight_normalization,
        } | super()._hyperparameters()
