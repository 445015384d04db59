"""What becomes of each field of transformers' ``TrainingArguments``: honoured, or refused with the way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HONOURED = frozenset(
    # loop and optimizer
    "output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_kwargs warmup_steps "
    "weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm seed data_seed "
    # precision, devices, engines
    "bf16 fp16 tf32 use_cpu ddp_bucket_cap_mb ddp_timeout fsdp fsdp_config deepspeed "
    "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs "
    # logging
    "logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica disable_tqdm "
    "report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id "
    # evaluation and saving
    "eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size prediction_loss_only "
    "save_strategy save_steps save_total_limit save_only_model load_best_model_at_end metric_for_best_model "
    "greater_is_better resume_from_checkpoint restore_callback_states_from_checkpoint "
    # hub
    "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
    # data
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context "
    # read by scripts, never by a trainer, here as in transformers
    "do_train do_eval do_predict".split()
)
"""Fields that do what transformers says of them."""


@dataclass(frozen=True)
class Rule:
    """The values of a field that are honoured.

    Attributes:
        values: Those.
        otherwise: What to do where another one is wanted.
    """

    values: tuple[Any, ...]
    otherwise: str


_PASSES = "first- and second-order passes must run the same code"
_WHOLE = "predictions of the whole set are gathered; evaluate parts of it one by one"

RULES: Mapping[str, Rule] = {
    "optim": Rule(
        ("adamw_torch", "adamw_torch_fused", "sgd"), "choose one of these, or pass optimizers=(optimizer, scheduler)"
    ),
    "lr_scheduler_type": Rule(
        ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")
        + ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
        "a schedule must not depend on metrics; choose one of these, or pass optimizers=(optimizer, scheduler)",
    ),
    "optim_args": Rule((None,), "pass optimizers=(optimizer, scheduler) with the options in it"),
    "optim_target_modules": Rule((None,), "use peft_config to train parts of a model"),
    "average_tokens_across_devices": Rule((True,), "means are always over the global batch"),
    "label_smoothing_factor": Rule((0.0,), "pass losses=, a function (model, batch) -> losses [B]"),
    "bf16_full_eval": Rule((False,), "evaluation runs in the engine's precision; set bf16=True"),
    "fp16_full_eval": Rule((False,), "evaluation runs in the engine's precision; set fp16=True"),
    "torch_compile": Rule((False,), _PASSES),
    "torch_compile_backend": Rule((None,), _PASSES),
    "torch_compile_mode": Rule((None,), _PASSES),
    "use_liger_kernel": Rule((False,), "its kernels have no second derivatives"),
    "liger_kernel_config": Rule((None,), "its kernels have no second derivatives"),
    "use_cache": Rule((False,), "a cache makes packed sequences silently wrong in training"),
    "neftune_noise_alpha": Rule((None,), "add the noise in the model, under its dropout's random numbers"),
    "torch_empty_cache_steps": Rule((None,), "call torch.accelerator.empty_cache() in a callback's on_step_end"),
    "auto_find_batch_size": Rule((False,), "the batch size is part of the problem; set it and accumulate gradients"),
    "logging_nan_inf_filter": Rule((True,), "steps that are not finite raise or are skipped, see nonfinite"),
    "include_num_input_tokens_seen": Rule(("no",), "count them in a callback"),
    "eval_do_concat_batches": Rule((True,), _WHOLE),
    "eval_use_gather_object": Rule((False,), _WHOLE),
    "eval_accumulation_steps": Rule((None,), "predictions are moved to the host after every batch anyway"),
    "include_for_metrics": Rule(([],), "compute_metrics gets predictions and labels; call evaluate() for losses"),
    "batch_eval_metrics": Rule((False,), _WHOLE),
    "save_on_each_node": Rule((False,), "checkpoints are written once, to a file system that all ranks share"),
    "enable_jit_checkpoint": Rule((False,), "SIGTERM ends a run with a checkpoint anyway"),
    "ignore_data_skip": Rule((False,), "a resumed run goes on at its position in the data"),
    "full_determinism": Rule((False,), "call transformers.enable_full_determinism(seed) before building the model"),
    "parallelism_config": Rule((None,), "ranks split data and shards only; choose engine="),
    "dataloader_drop_last": Rule(
        (True,), "a shorter last batch would count its examples more; every epoch is shuffled anew, so none is lost"
    ),
    "dataloader_in_order": Rule((True,), "batches out of order cannot be found again when a run resumes"),
    "remove_unused_columns": Rule((True,), "pass data_collator= and prepared data to see other columns"),
    "label_names": Rule((None,), "pass losses=, a function (model, batch) -> losses [B]"),
    "train_sampling_strategy": Rule(("random", "sequential"), "choose one of these"),
    "length_column_name": Rule(("length",), "batches are not grouped by length"),
    "ddp_find_unused_parameters": Rule((None,), "it is found out from the levels"),
    "ddp_broadcast_buffers": Rule((None, False), "a broadcast between two forwards would break the backward"),
    "ddp_static_graph": Rule((None, False), "passes of several losses differ"),
    "ddp_backend": Rule((None,), "it follows the device: nccl on GPUs, gloo on CPUs; or make the group before"),
    "debug": Rule(([],), "use nonfinite='raise', which names level, step and phase"),
    "skip_memory_metrics": Rule((True,), "trainer.program.history.phases has seconds and bytes of every phase"),
    "local_rank": Rule((-1,), "launch with torchrun or accelerate, which set LOCAL_RANK"),
}
"""Fields of which only some values are honoured; the rest is an error."""


def check_arguments(args: Any) -> None:
    """Refuse what would be ignored.

    Args:
        args: Training arguments, after their own normalisation.

    Raises:
        ValueError: With all refused fields, their values and the ways out.
    """
    problems = []
    for name, rule in RULES.items():
        value = getattr(args, name)
        value = getattr(value, "value", value)  # of an enumeration
        if not any(value == allowed for allowed in rule.values):
            allowed = " or ".join(map(repr, rule.values))
            problems.append(f"{name}={value!r} is not supported (only {allowed}): {rule.otherwise}")
    if args.accelerator_config.to_dict() != type(args.accelerator_config)().to_dict():
        problems.append(
            f"accelerator_config={args.accelerator_config.to_dict()!r} is not supported: accelerate only launches; "
            "batches are split and shuffled by scalemlo"
        )
    if problems:
        raise ValueError(f"{type(args).__name__}: " + "; ".join(problems) + ".")


LEFT_TO_LEVELS = (
    "per_device_train_batch_size learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim weight_decay "
    "adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm activation_checkpointing "
    "activation_checkpointing_kwargs data_seed train_sampling_strategy unroll_steps hypergradient "
    "hypergradient_options model_init_kwargs dataloader_num_workers dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_multiprocessing_context"
).split()
"""Arguments that :class:`~scalemlo.hf.MLOTrainer` refuses: its levels say these."""


def check_left_to_levels(args: Any) -> None:
    """Refuse what the levels of a program say themselves.

    Args:
        args: Training arguments.

    Raises:
        ValueError: With the fields that are set.
    """
    default = type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu)
    known = [name for name in LEFT_TO_LEVELS if hasattr(default, name)]  # not all versions have all
    wrong = [name for name in known if getattr(args, name) != getattr(default, name)]
    if wrong:
        raise ValueError(
            f"{type(args).__name__}: {wrong[0]}={getattr(args, wrong[0])!r} is said by the levels of MLOTrainer "
            f"(refused here: {wrong}). Give it to Level(...), or use ReweightingTrainer."
        )
