"""Hugging Face models made ready for multilevel training: no cache, a pad token, fp32 masters, optionally LoRA."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ...runs.assets import resolve_model
from ..data.tokenizing import ensure_pad_token

DTYPES: dict[str, torch.dtype] = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters on a frozen base (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        r: Rank.
        alpha: The update is scaled by alpha / r.
        dropout: On the adapters' input. Zero by default: finite differences across two passes with different masks
            are noise, and exact products would differentiate one random mask.
        target_modules: Names of linear layers, or `"all-linear"` for every one except the output head.
        seed: Of the adapters' initial values, so that every rank starts from the same ones.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r ({self.r}) must be at least 1; for full fine-tuning pass lora=None")
        if self.alpha <= 0:
            raise ValueError(f"alpha ({self.alpha}) must be positive, since it scales the adapters; 2 * r is usual")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout ({self.dropout}) must be in [0, 1); use 0 for exact second-order products")
        if not self.target_modules:
            raise ValueError("target_modules () must name at least one layer; use 'all-linear' for every linear one")


def load_causal_lm(
    name: str,
    *,
    dtype: str = "fp32",
    attn_implementation: str | None = None,
    lora: LoraSpec | None = None,
    is_frozen: bool = False,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer for training.

    Without `lora` every parameter is trainable and is the fp32 (or fp64) master copy; engines make the bf16 compute
    copies. With `lora` only the adapters are trainable, in fp32 even on a bf16 base.

    Args:
        name: Asset name (`scalemlo.runs.assets.known_assets`), folder or hub name.
        dtype: Of the loaded weights: `fp64`, `fp32`, or, for the frozen base of LoRA only, `bf16`.
        attn_implementation: As in transformers. `None` is its own choice, usually `sdpa`, whose fused kernels have
            neither forward-mode nor double derivatives: use `eager` for exact second-order products.
        lora: Adapters to train in place of the weights.
        is_frozen: Whether the weights will not be trained, since the caller adds adapters.

    Returns:
        The model, in training mode, on CPU and with `config.use_cache` off, and its tokenizer, with a pad token.

    Raises:
        ValueError: If the dtype is unknown or unfit for training, or the tokenizer has no pad and no eos token.
    """
    torch_dtype = _parse_dtype(dtype)
    if lora is None and not is_frozen and torch_dtype == torch.bfloat16:
        raise ValueError(
            f"dtype ({dtype!r}) must be 'fp32' or 'fp64' when lora is None, because the weights are the optimizer's "
            "master copy; choose bf16 compute in the engine, or pass a LoraSpec to train adapters on a bf16 base"
        )
    path = resolve_model(name)
    tokenizer = _load_tokenizer(path)
    kwargs: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype, **kwargs)
    # A key-value cache costs memory in training and makes packed sequences silently wrong.
    model.config.use_cache = False
    model.config.pad_token_id = tokenizer.pad_token_id
    if lora is not None:
        model = _add_lora(model, lora)
    return model.train(), tokenizer


def load_encoder(name: str, *, dtype: str = "fp32") -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a text encoder as a frozen feature extractor.

    Args:
        name: Asset name, folder or hub name.
        dtype: `fp64`, `fp32` or `bf16`.

    Returns:
        The encoder, in evaluation mode, on CPU and without trainable parameters, and its tokenizer.
    """
    torch_dtype = _parse_dtype(dtype)
    path = resolve_model(name)
    model = AutoModel.from_pretrained(path, dtype=torch_dtype)
    return model.eval().requires_grad_(False), _load_tokenizer(path)


def _parse_dtype(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise ValueError(f"dtype ({dtype!r}) must be one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(path))
    ensure_pad_token(tokenizer)
    return tokenizer


def _add_lora(model: nn.Module, spec: LoraSpec) -> nn.Module:
    # Imported here: full fine-tuning must not need peft.
    from peft import LoraConfig, get_peft_model

    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    # The adapters are drawn on CPU from a generator of their own: ranks agree, and the caller's stream is untouched.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft 0.21 asks for a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        torch.manual_seed(spec.seed)
        return get_peft_model(model, config)
