"""The model of a trainer: loaded by name, given its adapter, and refused where it cannot be trained here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from peft import AdaLoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...autodiff.safety import find_foreign_kernel
from ...hypergradients import Hypergradient
from ...versions import checkpoint_activations
from ..models.models import load_causal_lm

DTYPE_NAMES = {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
"""Our names of torch's, under which transformers and TRL know them."""


def load_model(name: str, options: Mapping[str, Any], *, is_frozen: bool) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal language model by name, and its tokenizer.

    Args:
        name: As in :func:`load_causal_lm`.
        options: Its other arguments; ``dtype`` by torch's name too.
        is_frozen: Whether the weights stay as they are, under an adapter.

    Returns:
        Both.
    """
    options = dict(options)
    if "dtype" in options:
        dtype = str(options["dtype"]).removeprefix("torch.")
        options["dtype"] = DTYPE_NAMES.get(dtype, dtype)
    return load_causal_lm(name, is_frozen=is_frozen, **options)


def made_ready(
    model: nn.Module,
    peft_config: PeftConfig | None,
    hypergradient: Hypergradient,
    checkpointing: Mapping[str, Any] | None,
) -> nn.Module:
    """The model in training mode, with its adapter and activation checkpointing.

    Args:
        model: Not yet in an engine.
        peft_config: Of the adapter, or None.
        hypergradient: The estimator that will differentiate through it.
        checkpointing: Options of ``activation_checkpointing_enable``, or None.

    Returns:
        The model.

    Raises:
        ValueError: If it computes in kernels without second derivatives, trains weights of less than 32 bits, or the
            adapter asks for what is not done here.
    """
    foreign = find_foreign_kernel(model)
    if foreign is not None and getattr(hypergradient, "mixed", None) != "finite_difference":
        raise ValueError(f"{type(model).__name__} has no hypergradients here: {foreign}")
    if isinstance(model, PreTrainedModel):
        model.config.use_cache = False
    if peft_config is not None:
        model = _adapted(model, peft_config)
    small = [(n, p.dtype) for n, p in model.named_parameters() if p.requires_grad and p.itemsize < 4]
    if small:
        raise ValueError(
            f"{len(small)} parameters to train have less than 32 bits ({small[0][0]}: {small[0][1]}), so that small "
            "steps are rounded away. Load the model in fp32 and set bf16=True, or give peft_config: under an adapter "
            "the weights may stay frozen in bf16."
        )
    if checkpointing is not None:
        _checkpoint_activations(model, checkpointing)
    return model.train()


def _adapted(model: nn.Module, peft_config: PeftConfig) -> PeftModel:
    if isinstance(model, PeftModel):
        raise ValueError("peft_config is given, and model has an adapter already: leave one of them out.")
    if isinstance(peft_config, AdaLoraConfig) and peft_config.target_r != peft_config.init_r:
        raise ValueError(
            f"peft_config: AdaLoRA prunes from rank init_r={peft_config.init_r} to target_r={peft_config.target_r} "
            "between backward passes and steps, which is not done here. Set target_r=init_r for fixed ranks, or learn "
            "ranks by the recipe autolora."
        )
    with warnings.catch_warnings():
        # peft 0.21 asks for a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return get_peft_model(model, peft_config)


def _checkpoint_activations(model: Any, options: Mapping[str, Any]) -> None:
    if options.get("use_reentrant"):
        raise ValueError("activation_checkpointing_kwargs: use_reentrant=True hides the graph; set it to False.")
    if not checkpoint_activations(model, dict(options) | {"use_reentrant": False}):
        raise ValueError(
            f"activation_checkpointing=True: {type(model).__name__} has no activation_checkpointing_enable."
        )
    # For reentrant checkpoints transformers makes the embeddings' outputs require gradients, which no transform allows.
    model.disable_input_require_grads()
