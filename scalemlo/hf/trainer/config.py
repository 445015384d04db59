"""The trainers' arguments: transformers' ``TrainingArguments`` and what multilevel training needs beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from ...distributed import group as distributed
from ...engines import EngineSpec
from ...hypergradients import Hypergradient, estimator_of
from ...loop.verification import VERIFY
from .argument_rules import check_arguments
from .engine_choice import choose_engine

NORMALIZATIONS: Mapping[str, tuple[str, ...]] = {
    "example": ("dataset", "batch", "none"),
    "domain": ("dataset",),
    "scorer": ("batch", "none"),
    "token": ("batch",),
}
"""What weights may be divided by, by ``reweighting``; the first is the default."""

SCORER_FEATURES = ("loss", "embedding")
"""What the net of ``reweighting="scorer"`` may see of an example."""


_DICTS = ("hypergradient_options", "dataset_options", "model_init_kwargs")


@dataclass
class MLOConfig(TrainingArguments):
    """Arguments of :class:`~scalemlo.hf.MLOTrainer`.

    Every field of transformers' ``TrainingArguments`` exists. Each is honoured, or refused where it is set to something
    else than what is done: none is accepted and ignored. One *step* is a step of the fine-tuned (bottom) level;
    ``unroll_steps`` of them and one of the level above are an outer iteration. Logging, evaluation, saving and stopping
    happen at the end of the first outer iteration at or past the step they are due at.

    Defaults that differ from transformers: ``optim="adamw_torch"``, ``dataloader_drop_last=True``,
    ``logging_steps=10``. ``weight_decay`` acts on all parameters that are trained, biases and norms included.

    Args:
        engine: How the fine-tuned model is held: ``"auto"`` (what ``fsdp``, ``deepspeed`` or the launcher ask for, else
            one process or DDP), ``"ddp"``, ``"fsdp"``, ``"deepspeed"``, ``"zero1"`` to ``"zero3"``, or an engine.
        unroll_steps: Steps of the fine-tuned model per step of the level above.
        hypergradient: Estimator: a name of :data:`scalemlo.hypergradients.ESTIMATORS`, or an estimator.
        hypergradient_options: Options of an estimator that is given by name.
        nonfinite: ``"raise"`` or ``"skip"`` where a loss or gradient is NaN or infinite.
        verify: When derivatives are compared with the live model, see :class:`scalemlo.Program`.
        verify_every: See there.
        max_length: Tokens per example.
        dataset_options: Further arguments of :func:`scalemlo.hf.prepare_dataset`.
        model_init_kwargs: Arguments of :func:`scalemlo.hf.load_causal_lm`, where the model is given by name.

    Raises:
        ValueError: For fields that are refused, and values out of range.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, *_DICTS]

    if TYPE_CHECKING:  # transformers has put a name in the place of None
        output_dir: str = ""  # ty: ignore[incompatible-mutable-override]
    optim: str = "adamw_torch"
    dataloader_drop_last: bool = True
    logging_steps: float = 10
    # HfArgumentParser takes one type per argument, so `engine` and `hypergradient` are typed by their names.
    engine: str = "auto"
    unroll_steps: int = 1
    hypergradient: str = "identity"
    hypergradient_options: dict[str, Any] | str | None = None
    nonfinite: str = "raise"
    verify: str = "first"
    verify_every: int = 1000
    max_length: int | None = 1024
    dataset_options: dict[str, Any] | str | None = None
    model_init_kwargs: dict[str, Any] | str | None = None

    def __post_init__(self) -> None:
        own = {name: getattr(self, name) for name in ("fsdp", "fsdp_config", "deepspeed")}
        self.fsdp = self.fsdp_config = self.deepspeed = None
        with _without_accelerate_plugins():
            super().__post_init__()
        vars(self).update({name: _from_command_line(value) for name, value in own.items()})
        vars(self).update({name: getattr(self, name) or {} for name in _DICTS})
        check_arguments(self)
        _check_counts(self, "unroll_steps", "per_device_train_batch_size", "per_device_eval_batch_size")
        _check_counts(self, "gradient_accumulation_steps", "verify_every")
        if self.max_length is not None:
            _check_counts(self, "max_length")
        if self.verify not in VERIFY:
            raise ValueError(f"verify={self.verify!r} is unknown; choose one of {list(VERIFY)}.")
        if self.load_best_model_at_end and self.save_only_model:
            raise ValueError(
                "load_best_model_at_end=True with save_only_model=True: the best checkpoint is loaded with all levels. "
                "Set save_only_model=False."
            )
        self.build_hypergradient()
        self.build_engine()

    # ---- devices: ours, so that accelerate's plugins stay out -----------------------------------------------------
    @cached_property
    def _setup_devices(self) -> torch.device:
        self.distributed_state = None
        device = torch.device("cpu") if self.use_cpu else None
        device = distributed.initialize(device, timeout_seconds=timedelta(seconds=self.ddp_timeout).total_seconds())
        self._n_gpu = int(device.type != "cpu")
        return device

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return distributed.world_size()

    @property
    def process_index(self) -> int:
        """Rank of this process."""
        return distributed.rank()

    @property
    def local_process_index(self) -> int:
        """Rank of this process on its machine."""
        return int(os.environ.get("LOCAL_RANK", distributed.rank()))

    @property
    def train_batch_size(self) -> int:
        """Examples per micro-batch, over all processes."""
        return self.per_device_train_batch_size * self.world_size

    # ---- what the levels are built from --------------------------------------------------------------------------
    def build_engine(self) -> EngineSpec:
        """The engine of the fine-tuned model."""
        return choose_engine(self)

    def build_hypergradient(self) -> Hypergradient:
        """The estimator."""
        options: Any = self.hypergradient_options  # a dict: __post_init__ has read it
        return estimator_of(self.hypergradient, options)

    def build_optimizer(self) -> partial:
        """A function from parameters to the fine-tuned model's optimizer."""
        return optimizer_of(OptimizerNames(self.optim).value, self.learning_rate, self)

    def build_scheduler(self, num_steps: int) -> partial:
        """A function from an optimizer to its schedule over a number of steps."""
        options: Any = self.lr_scheduler_kwargs  # a dict or None: __post_init__ has read it
        return partial(
            get_scheduler,
            self.lr_scheduler_type,
            num_warmup_steps=self.get_warmup_steps(num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=options,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them; engines and estimators by their ``repr``, tokens hidden."""
        return {name: _plain(value) for name, value in super().to_dict().items()}


@dataclass
class ReweightingConfig(MLOConfig):
    """Arguments of :class:`~scalemlo.hf.ReweightingTrainer`; those of :class:`MLOConfig`, and these.

    Args:
        reweighting: What has a weight: ``"example"`` (a table), ``"domain"`` (a mixture), ``"scorer"`` (a net on
            features of the example) or ``"token"`` (a net on features of the token). See
            :mod:`scalemlo.hf.trainer.reweighting` for their equations.
        weight_normalization: ``"dataset"`` divides by the mean weight of the training set (tables), ``"batch"`` by that
            of the batch (nets), ``"none"`` not at all. ``"auto"``: ``"dataset"`` for tables and ``"batch"`` for nets,
            whose raw weights tend to collapse to a constant.
        domain_column: Column of the training set that names an example's domain.
        scorer_features: What the net of ``"scorer"`` sees of an example: its ``"loss"``, its ``"embedding"`` (the
            mean of the last hidden state over its tokens), or both.
        scorer_hidden_size: Width of the net's hidden layer.
        meta_learning_rate: Of the weights.
        meta_optim: ``"adamw_torch"``, ``"adamw_torch_fused"`` or ``"sgd"``, which keeps the size of the gradient: for
            tables whose rows are rarely visited.
        meta_weight_decay: Of the weights.
        per_device_meta_batch_size: Examples of the meta set per process and outer iteration; None:
            ``per_device_train_batch_size``.
        preview_chars: Characters of an example's text in the exported table of weights.

    Raises:
        ValueError: For fields that are refused, and values out of range.
    """

    reweighting: str = "example"
    weight_normalization: str = "auto"
    domain_column: str | None = None
    scorer_features: list[str] = field(default_factory=lambda: ["loss"])
    scorer_hidden_size: int = 64
    meta_learning_rate: float = 1e-2
    meta_optim: str = "adamw_torch"
    meta_weight_decay: float = 0.0
    per_device_meta_batch_size: int | None = None
    preview_chars: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reweighting not in NORMALIZATIONS:
            raise ValueError(f"reweighting={self.reweighting!r} is unknown; choose one of {list(NORMALIZATIONS)}.")
        if self.reweighting == "domain" and self.domain_column is None:
            raise ValueError("reweighting='domain' needs domain_column, the column that names an example's domain.")
        self._check_scorer_features()
        if self.per_device_meta_batch_size is not None:
            _check_counts(self, "per_device_meta_batch_size")
        allowed = NORMALIZATIONS[self.reweighting]
        if self.weight_normalization == "auto":
            self.weight_normalization = allowed[0]
        if self.weight_normalization not in allowed:
            raise ValueError(
                f"weight_normalization={self.weight_normalization!r} is not defined for reweighting="
                f"{self.reweighting!r}; choose one of {list(allowed)}."
            )
        if self.weight_normalization == "batch" and self.gradient_accumulation_steps > 1:
            others = [name for name in allowed if name != "batch"]
            raise ValueError(
                f"weight_normalization='batch' with gradient_accumulation_steps={self.gradient_accumulation_steps}: "
                "weights would be normalised over each micro-batch alone, so that accumulating changes the problem. "
                "Use gradient_accumulation_steps=1" + (f", or weight_normalization={others[0]!r}." if others else ".")
            )
        if self.meta_optim not in OPTIMIZERS:
            raise ValueError(f"meta_optim={self.meta_optim!r} is unknown; choose one of {sorted(OPTIMIZERS)}.")
        if not self.meta_learning_rate > 0:
            raise ValueError(f"meta_learning_rate={self.meta_learning_rate!r} must be positive.")

    def _check_scorer_features(self) -> None:
        features = list(self.scorer_features)
        if not features or len(set(features)) < len(features) or not set(features) <= set(SCORER_FEATURES):
            raise ValueError(f"scorer_features={features!r} must be one or both of {list(SCORER_FEATURES)}.")
        if self.reweighting != "scorer" and features != ["loss"]:
            raise ValueError(
                f"scorer_features={features!r} has no effect with reweighting={self.reweighting!r}: only the net of "
                "'scorer' sees examples. Set reweighting='scorer', or leave it out."
            )

    @property
    def meta_batch_size(self) -> int:
        """Examples of the meta set per outer iteration, over all processes."""
        return (self.per_device_meta_batch_size or self.per_device_train_batch_size) * self.world_size

    def build_meta_optimizer(self) -> partial:
        """A function from parameters to the weights' optimizer."""
        return optimizer_of(self.meta_optim, self.meta_learning_rate, self, weight_decay=self.meta_weight_decay)


OPTIMIZERS: Mapping[str, Any] = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_torch_fused": partial(torch.optim.AdamW, fused=True),
    "sgd": torch.optim.SGD,
}
"""Optimizer by transformers' name."""


def optimizer_of(name: str, learning_rate: float, args: MLOConfig, weight_decay: float | None = None) -> partial:
    """A function from parameters to an optimizer.

    Args:
        name: One of :data:`OPTIMIZERS`.
        learning_rate: Its peak.
        args: Adam's options.
        weight_decay: Overrides that of ``args``.

    Returns:
        The function.
    """
    common: dict[str, Any] = dict(
        lr=learning_rate, weight_decay=args.weight_decay if weight_decay is None else weight_decay
    )
    if name != "sgd":
        common |= dict(betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
    return partial(OPTIMIZERS[name], **common)


def _check_counts(args: MLOConfig, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1.")


def _from_command_line(value: Any) -> Any:
    """A dict that was written as JSON; anything else as it is."""
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


@contextmanager
def _without_accelerate_plugins() -> Iterator[None]:
    """While transformers checks its arguments.

    accelerate's plugin for DeepSpeed would switch ``from_pretrained`` to ``deepspeed.zero.Init`` for the whole process.
    """
    kept = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = kept
