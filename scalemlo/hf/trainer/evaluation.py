"""The trainers' ``evaluate`` and ``predict``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from transformers import TrainerState
from transformers.trainer_utils import EvalPrediction, PredictionOutput, speed_metrics

from ...distributed.group import world_size
from ...loop.program import Program
from ..data.prepare import prepare_dataset
from ..data.tasks import TASKS
from ..evaluation import Predictions, run_over
from ..losses.per_example import Losses
from .config import MLOConfig


class Evaluates:
    """The part of :class:`~scalemlo.hf.MLOTrainer` that evaluates."""

    args: MLOConfig
    program: Program
    model_level: str
    processing_class: Any
    state: TrainerState
    eval_dataset: Any
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
    _collate: Callable | None
    _losses: Losses | None
    _preprocess: Callable | None
    _event: Callable[..., None]
    log: Callable[..., None]
    _last_metrics: Mapping[str, float] = {}

    def _prepared_eval(self, dataset: Any) -> Any:
        """Prepared data, one or by name; as it is where the user collates it."""
        if isinstance(dataset, Mapping):
            return {name: self._prepared(part, f"eval_dataset[{name!r}]") for name, part in dataset.items()}
        return self._prepared(dataset, "eval_dataset")

    def _prepared(self, dataset: Any, name: str, **options: Any) -> Any:
        if dataset is None or self._collate is not None:
            return dataset
        if self.processing_class is None:
            raise ValueError(f"{name} is given without processing_class: pass the tokenizer, or data_collator.")
        if getattr(self.processing_class, "pad_token_id", None) is None:
            raise ValueError(
                f"processing_class ({type(self.processing_class).__name__}) has no pad token, so that batches cannot "
                "be padded: set tokenizer.pad_token = tokenizer.eos_token, say."
            )
        general: Any = self.args.dataset_options
        options = {"max_length": self.args.max_length} | general | options
        return prepare_dataset(dataset, self.processing_class, name=name, **options)

    def _task_of(self, dataset: Any) -> tuple[Callable, Losses]:
        """Collator and losses of some data."""
        if self._collate is not None:
            collate = self._collate
            if self._losses is None:
                raise ValueError("data_collator is given without losses: pass losses=(model, batch) -> losses [B].")
            return collate, self._losses
        task = TASKS[dataset.kind]
        return task.collator(self.processing_class.pad_token_id), self._losses or task.losses

    def evaluate(self, eval_dataset: Any = None, *, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate the model. Collective.

        ``eval_loss`` is the mean over examples of their losses, the same quantity as a meta loss.

        Args:
            eval_dataset: Other data than the trainer's, or a dict of them by name.
            metric_key_prefix: Before every name.

        Returns:
            Metrics by name.

        Raises:
            ValueError: If there is no data.
        """
        dataset = self.eval_dataset if eval_dataset is None else self._prepared_eval(eval_dataset)
        if dataset is None:
            raise ValueError("evaluate() needs eval_dataset, here or in the trainer.")
        if isinstance(dataset, Mapping):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, metric_key_prefix=f"{metric_key_prefix}_{name}")
            self._last_metrics = metrics
            return metrics
        wants_predictions = self.compute_metrics is not None and not self.args.prediction_loss_only
        found = self._run_over(dataset, metric_key_prefix, wants_predictions=wants_predictions).metrics
        assert found is not None, "there is always a loss"
        self.log(found)
        self._event("on_evaluate", metrics=found)
        self._last_metrics = found
        return found

    def predict(self, test_dataset: Any, *, metric_key_prefix: str = "test") -> PredictionOutput:
        """Logits and labels of all examples, and metrics. Collective.

        Args:
            test_dataset: The data.
            metric_key_prefix: Before every name.

        Returns:
            transformers' ``PredictionOutput``, padded with -100.
        """
        output = self._run_over(self._prepared(test_dataset, "test_dataset"), metric_key_prefix, wants_predictions=True)
        self._event("on_predict", metrics=output.metrics)
        return output

    def _run_over(self, dataset: Any, prefix: str, *, wants_predictions: bool) -> PredictionOutput:
        start, size = time.time(), self.args.per_device_eval_batch_size
        collate, losses = self._task_of(dataset)
        output: Any = run_over(  # transformers' types lack that predictions may be None
            self.program,
            self.model_level,
            dataset,
            collate,
            losses,
            size,
            predictions=Predictions(self._preprocess) if wants_predictions else None,
            after_batch=lambda: self._event("on_prediction_step"),
        )
        metrics = {f"{prefix}_loss": float(np.mean(output.losses))}
        if wants_predictions and self.compute_metrics is not None:
            found = self.compute_metrics(EvalPrediction(output.predictions, output.labels))
            metrics |= {k if k.startswith(f"{prefix}_") else f"{prefix}_{k}": v for k, v in found.items()}
        num_batches = math.ceil(len(dataset) / (size * world_size()))
        metrics |= speed_metrics(prefix, start, num_samples=len(dataset), num_steps=num_batches)
        return PredictionOutput(output.predictions, output.labels, metrics)

    def _note_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether the metric is the best one so far; it is noted then."""
        name = self.args.metric_for_best_model
        if name is None:
            return False
        key = name if name.startswith("eval_") else f"eval_{name}"
        if key not in metrics:
            raise ValueError(f"metric_for_best_model={name!r} is not among the metrics {sorted(metrics)}.")
        value, best, state = metrics[key], self.state.best_metric, self.state
        if best is None or (value > best if self.args.greater_is_better else value < best):
            state.best_metric, state.best_global_step = value, state.global_step
            return True
        return False
