"""``MLOTrainer``: any multilevel program, run, logged, evaluated and saved as transformers' Trainer does it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback, ProgressCallback
from transformers.trainer_utils import (
    EvalPrediction,
    IntervalStrategy,
    SaveStrategy,
    TrainOutput,
    has_length,
    speed_metrics,
)
from transformers.utils import logging as transformers_logging

from ...checkpoint.writable import check_writable
from ...distributed.ranks import Ranks
from ...level import Level
from ...loop.listener import Listener
from ...loop.program import Program
from ..losses.per_example import Losses
from .argument_rules import check_left_to_levels
from .callbacks import Meter, MLOCallbackHandler
from .config import MLOConfig
from .evaluation import Evaluates
from .hub import Hub
from .saving import PROGRAM, Saves


class MLOTrainer(Evaluates, Saves):
    """Trains the levels of a program with transformers' callbacks, logging, checkpoints and hub uploads.

    One level is *the model*: the one at the bottom unless ``model_level`` says otherwise. ``global_step`` counts its
    steps; it is what is evaluated and saved by ``save_pretrained``. The loop is :meth:`scalemlo.Program.run`.

    Args:
        levels: Top to bottom, as for :class:`scalemlo.Program`; optimizers, schedules and data are theirs.
        args: Arguments; those that levels say (``learning_rate``, ``unroll_steps``, ...) must be left at their
            defaults.
        eval_dataset: Data to evaluate the model on, or a dict of them by name.
        processing_class: The tokenizer; saved with the model.
        data_collator: Makes a batch of a list of examples of ``eval_dataset``; by default by its kind.
        losses: ``losses(model, batch)`` gives one loss per example, ``[B]``; by default by the kind of the data.
        compute_metrics: From transformers' ``EvalPrediction`` (logits and labels of all examples) to metrics by name.
        preprocess_logits_for_metrics: From the logits and labels of a batch to what is kept of the logits.
        callbacks: ``TrainerCallback`` or :class:`MLOCallback`, classes or instances.
        model_level: Name of the level that is the model.

    Raises:
        ValueError: For arguments that levels say, and what :class:`scalemlo.Program` refuses.
    """

    level_prefixes: Mapping[str, str] = {}
    """What the loss of a level is logged as, where not ``<level>/loss``."""

    def __init__(
        self,
        levels: Sequence[Level],
        args: MLOConfig | None = None,
        *,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Callable[[list], Mapping[str, Tensor]] | None = None,
        losses: Losses | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        callbacks: Sequence[type[TrainerCallback] | TrainerCallback] = (),
        model_level: str | None = None,
    ):
        args = args if args is not None else MLOConfig(output_dir="trainer_output")
        check_left_to_levels(args)
        self._set_up(
            levels, args, eval_dataset, processing_class, data_collator, losses, compute_metrics,
            preprocess_logits_for_metrics, callbacks, model_level,
        )  # fmt: skip

    def _set_up(
        self,
        levels: Sequence[Level],
        args: MLOConfig,
        eval_dataset: Any,
        processing_class: Any,
        data_collator: Callable | None,
        losses: Losses | None,
        compute_metrics: Callable | None,
        preprocess_logits_for_metrics: Callable | None,
        callbacks: Sequence,
        model_level: str | None,
    ) -> None:
        self.args, self.processing_class = args, processing_class
        transformers_logging.set_verbosity(args.get_process_log_level())
        self.compute_metrics, self._preprocess = compute_metrics, preprocess_logits_for_metrics
        self._collate, self._losses = data_collator, losses
        self.eval_dataset = self._prepared_eval(eval_dataset)
        if args.eval_strategy != "no" and self.eval_dataset is None:
            raise ValueError(f"eval_strategy={IntervalStrategy(args.eval_strategy).value!r} needs eval_dataset.")
        Ranks().together(partial(check_writable, args.output_dir, "output_dir"))
        checked_there: dict[str, Any] = dict(nonfinite=args.nonfinite, verify=args.verify)
        self.program = Program(
            levels,
            engine=args.build_engine(),
            seed=args.seed,
            device=args.device,
            verify_every=args.verify_every,
            **checked_there,
        )
        self.model_level = self.program.graph.order[-1] if model_level is None else model_level
        if self.model_level not in self.program.trainers:
            raise ValueError(f"model_level={model_level!r} is unknown; levels are {list(self.program.trainers)}.")
        self._steps_per_iteration = self.program.graph.ticks_per_step
        self.hub = Hub(args)
        bottom = self.program.trainers[self.model_level]
        default = [DefaultFlowCallback, *get_reporting_integration_callbacks(args.report_to)]
        default.append(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self.callback_handler = MLOCallbackHandler(
            [*default, *callbacks], self.model, processing_class, bottom.optimizer, bottom.scheduler
        )
        self.state, self.control = self._new_state(), TrainerControl()
        self.meter = Meter({})
        self.control = self.callback_handler.on_init_end(args, self.state, self.control)

    @property
    def model(self) -> Any:  # ty: ignore[incompatible-property-override]
        """The module of the model's level; its parameters may be sharded."""
        return self.program.trainers[self.model_level].engine.module

    # ---- training ------------------------------------------------------------------------------------------------
    @property
    def steps_per_epoch(self) -> float:
        """Steps of the model in one pass over its data."""
        stream, level = self.program.trainers[self.model_level].stream, self.program.trainers[self.model_level].level
        if stream is None or not has_length(level.data):
            return self.max_steps
        return max(1, len(level.data) // level.gradient_accumulation_steps)

    @property
    def max_steps(self) -> int:
        """Steps of the model in the whole run: what the arguments say, rounded up to whole outer iterations."""
        wanted = self.args.max_steps
        if wanted <= 0:
            data = self.program.trainers[self.model_level].level.data
            if not has_length(data):
                raise ValueError(f"max_steps={wanted} must be positive, since the model's data has no length.")
            wanted = math.ceil(self.args.num_train_epochs * self.steps_per_epoch)
        return max(1, math.ceil(wanted / self._steps_per_iteration)) * self._steps_per_iteration

    def train(self, resume_from_checkpoint: bool | str | None = None):
        """Train to the end.

        Called again, it goes on from where it was stopped, or from the best checkpoint, if that was loaded. Ctrl-C or
        SIGTERM ends training after the outer iteration in hand, with a checkpoint unless ``save_strategy="no"``.

        Args:
            resume_from_checkpoint: A checkpoint, or True for the latest one in ``output_dir``.

        Returns:
            transformers' ``TrainOutput``: steps, mean loss, metrics.
        """
        args = self.args
        if self.program.num_steps == 0:  # else the run goes on where it was stopped
            self.state = self._new_state()
            self.program.extra_state["trainer"] = {}
        resumed = self._folder_to_resume(resume_from_checkpoint)
        if resumed is not None:
            self._load(resumed)
        self.meter = Meter(self.program.extra_state["trainer"])
        state = self.state
        state.global_step = self.program.num_steps * self._steps_per_iteration  # less where the best one was loaded
        state.max_steps, state.num_train_epochs = self.max_steps, math.ceil(self.max_steps / self.steps_per_epoch)
        state.compute_steps(args, state.max_steps)
        bridge = _Bridge(self)
        self.program.listener, self._bridge, self._last_logged = bridge, bridge, state.global_step
        first_step, start = state.global_step, time.time()
        self.callback_handler.train_dataloader = self.program.trainers[self.model_level].level.data
        self._event("on_train_begin")
        if args.eval_on_start and resumed is None:
            self.evaluate()
        self._event("on_epoch_begin")
        remaining = self.max_steps // self._steps_per_iteration - self.program.num_steps
        try:
            if remaining > 0:
                history = self.program.run(remaining, callbacks=[self._after_iteration], progress=False)
                if (
                    history.interrupted
                    and args.save_strategy != SaveStrategy.NO
                    and self._last_saved != state.global_step
                ):
                    self._save_checkpoint()
        finally:
            self.program.listener = Listener()
        metrics = speed_metrics(
            "train",
            start,
            num_samples=(state.global_step - first_step) * self._examples_per_step(self.model_level),
            num_steps=state.global_step - first_step,
        ) | {"train_loss": self.meter.mean_loss}
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.program.load(Path(state.best_model_checkpoint) / PROGRAM)
        self.log(metrics)
        self._event("on_train_end")
        Ranks().on_main(self.hub.wait)
        if args.push_to_hub:
            self.push_to_hub()
        return TrainOutput(state.global_step, metrics["train_loss"], metrics)

    def _after_iteration(self, program: Program, record: dict[str, float]) -> None:
        state, bridge = self.state, self._bridge
        before = state.global_step - self._steps_per_iteration
        if state.global_step // self.steps_per_epoch > before // self.steps_per_epoch:
            self._event("on_epoch_end")
            bridge.note_due()
            if state.global_step < state.max_steps:
                self._event("on_epoch_begin")
        due, bridge.due = bridge.due, set()
        if "log" in due and state.global_step > self._last_logged:
            self._last_logged = state.global_step
            self.log(self._measured())
        if "evaluate" in due:
            is_best = self._note_best(self.evaluate())
            if self.args.save_strategy == SaveStrategy.BEST:
                due = due | {"save"} if is_best else due - {"save"}
        if "save" in due:
            self._save_checkpoint()
        if self.control.should_training_stop:
            program.stop()

    def _measured(self) -> dict[str, float]:
        logs = self.meter.take(self.model_level)
        for name in self.program.graph.order:
            if name != self.model_level:
                for key, value in self.meter.take(name).items():
                    logs[self.level_prefixes.get(name, f"{name}/loss") if key == "loss" else f"{name}/{key}"] = value
        return logs

    def log(self, logs: dict[str, float]) -> None:
        """Add to ``state.log_history``, and tell the callbacks.

        Args:
            logs: Numbers by name; ``epoch`` is added.
        """
        logs = logs | {"epoch": self.state.epoch}
        self.state.log_history.append(logs | {"step": self.state.global_step})
        self._event("on_log", logs=logs)

    def _event(self, event: str, **kwargs: Any) -> None:
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control, **kwargs)

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Add a callback to those that are called."""
        self.callback_handler.add_callback(callback)

    def remove_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Remove a callback."""
        self.callback_handler.remove_callback(callback)

    def pop_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> TrainerCallback | None:
        """Remove a callback and return it; None if it is not there."""
        return self.callback_handler.pop_callback(callback)


class _Bridge(Listener):
    """Turns what a program tells into transformers' events.

    ``should_log``, ``should_evaluate`` and ``should_save`` of a step are kept until the outer iteration ends: between
    its steps the levels are not at one point.

    Args:
        trainer: Whose state, control and callbacks.
    """

    def __init__(self, trainer: MLOTrainer):
        self._trainer = trainer
        self.due: set[str] = set()

    def _call_if_heard(self, event: str, **kwargs: Any) -> None:
        t = self._trainer
        t.control = t.callback_handler.call_if_heard(event, t.args, t.state, t.control, **kwargs)

    def on_tick_begin(self) -> None:
        """See :class:`Listener`."""
        self._trainer._event("on_step_begin")

    def on_micro_batch(self, level: str) -> None:
        """See :class:`Listener`."""
        if level == self._trainer.model_level:
            self._trainer._event("on_substep_end")

    def on_level_gradient(self, level: str, loss: float, norm: float, is_hypergradient: bool) -> None:
        """See :class:`Listener`."""
        t = self._trainer
        t.meter.add(level, loss, norm, float(t.program.trainers[level].optimizer.param_groups[0]["lr"]))
        if is_hypergradient:
            self._call_if_heard("on_hypergradient", level=level, norm=norm)
        if level == t.model_level:
            t.meter.count(loss)
            self._trainer._event("on_pre_optimizer_step")

    def on_level_step(self, level: str, loss: float) -> None:
        """See :class:`Listener`."""
        if level == self._trainer.model_level:
            self._trainer._event("on_optimizer_step")
        self._call_if_heard("on_level_step_end", level=level, loss=loss)

    def on_tick_end(self) -> None:
        """See :class:`Listener`."""
        t = self._trainer
        t.state.global_step += 1
        t.state.epoch = t.state.global_step / t.steps_per_epoch
        self._trainer._event("on_step_end")
        self.note_due()

    def note_due(self) -> None:
        """Keep what callbacks asked for.

        Raises:
            ValueError: If one asked for the end of an epoch.
        """
        control = self._trainer.control
        if control.should_epoch_stop:
            raise ValueError("a callback set should_epoch_stop, which is not supported: use should_training_stop.")
        self.due |= {name for name in ("log", "evaluate", "save") if getattr(control, f"should_{name}")}
