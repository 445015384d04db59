"""What must not reach a second derivative: kernels that have none.

Two fences. :func:`make_safe` switches a skeleton, a copy of the module, to implementations in torch's own operations
where the model's config names one. :func:`find_foreign_kernel` finds layers that cannot be switched; a derivative
through them is refused. Single operations are watched by :mod:`.operations`, and what raises by itself is left to
:func:`.errors.explained`. Each row of this file has one in ``tests/test_op_audit.py`` or ``tests/test_families.py``.
"""

import sys
import types
from collections.abc import Iterator

import torch
import torch.utils.checkpoint
from torch import nn
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket

from .attention import chunked_name
from .copying import is_of_user

# ---- switched on the copy ------------------------------------------------------------------------------------------
SAFE_EXPERTS = ("eager", "batched_mm")
"""Implementations of transformers' mixtures of experts that are made of torch's own operations."""


def make_safe(structure: nn.Module) -> None:
    """Switch a copied module, in place, to implementations that can be differentiated twice.

    Attention in fused kernels (flash, flex, kernels of the hub) becomes ``sdpa``, or ``eager`` where the model has no
    ``sdpa`` because it caps scores or has sinks; both run in chunks of queries (:mod:`.attention`). Grouped matrix
    products of experts become ``eager``. Gradient checkpointing, compilation and caches of keys and values, which no
    value of a whole sequence needs and every block writes into, are switched off.

    Args:
        structure: The copy, with configs of its own.
    """
    for module in structure.modules():
        if getattr(module, "gradient_checkpointing", False):  # torch.utils.checkpoint fails inside torch.func
            module.gradient_checkpointing = False  # ty: ignore[invalid-assignment]
        module._compiled_call_impl = None  # of nn.Module.compile
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return
    models = [m for m in structure.modules() if isinstance(m, transformers.PreTrainedModel)]
    for model in reversed(models):  # the innermost model that shares a config is the one whose code reads it
        config = model.config
        for part in (config, config.get_text_config()):
            if getattr(part, "use_cache", False):
                part.use_cache = False
        named = config._attn_implementation
        if named is not None and named.removeprefix("paged|") not in _own_implementations():
            capped = getattr(config, "attn_logit_softcapping", None)  # sdpa would leave it out
            named = "sdpa" if getattr(model, "_supports_sdpa", False) and not capped else "eager"
            config._attn_implementation_internal = named
        if named in ("sdpa", "eager") and not getattr(config, "output_attentions", False):
            config._attn_implementation_internal = chunked_name(model, named)
        if getattr(config, "_experts_implementation", None) not in (None, *SAFE_EXPERTS):
            config._experts_implementation_internal = "eager"


def _own_implementations() -> set[str]:
    """Names under which no fused kernel is registered: transformers' own two, and those a user registered."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    registered = {n for n in ALL_ATTENTION_FUNCTIONS if not any(kind in n for kind in ("flash", "flex", "paged", "/"))}
    return {"eager", "sdpa"} | registered


# ---- refused -------------------------------------------------------------------------------------------------------
FOREIGN_KERNELS = {
    "liger_kernel": "load the model without Liger kernels (use_liger_kernel=False)",
    "cut_cross_entropy": "compute the loss from logits, as scalemlo.hf.losses does",
    "unsloth": "load the model with transformers",
    "flash_attn": "use the modules of transformers with attn_implementation='sdpa'",
    "xformers": "use attention of torch or transformers",
    "apex": "use torch.nn.LayerNorm or torch.nn.RMSNorm",
    "transformer_engine": "use the layers of torch.nn",
    "mamba_ssm": "use the slow path of transformers (uninstall mamba_ssm)",
    "fla": "use the torch path of transformers (uninstall fla)",
    **dict.fromkeys(
        ("bitsandbytes", "awq", "gptqmodel", "auto_gptq", "hqq", "optimum", "aqlm", "eetq", "torchao", "fbgemm_gpu"),
        "load the weights in bf16 instead of quantised; with LoRA, the base may stay frozen in bf16",
    ),
}
"""Packages whose layers compute in kernels of their own, and the way out of each."""

FLAGS = {
    "_use_kernels": "kernels of the hub have no second derivatives; load the model with use_kernels=False",
    "is_quantized": f"quantised layers have no second derivatives; {FOREIGN_KERNELS['bitsandbytes']}",
}
"""What models of transformers say of themselves, and the way out of each."""


def find_foreign_kernel(module: nn.Module) -> str | None:
    """Look for a layer whose second derivatives would be missing or silently zero.

    A kernel in a ``torch.autograd.Function`` whose backward is a kernel too drops out of a double backward without a
    word, and has no forward derivative.

    Args:
        module: The live module.

    Returns:
        What is wrong with the first such layer and the way out, or None.
    """
    for path, m in module.named_modules():
        for attribute, way_out in FLAGS.items():
            if getattr(m, attribute, False):
                return f"{type(m).__name__} has {attribute}=True: {way_out}."
        code = [type(m), getattr(m.forward, "__func__", m.forward), getattr(m, "_loss_function", None)]
        code += [kind for p in m._parameters.values() if p is not None for kind in (type(p), type(p.data))]
        for part in code:
            package = (getattr(part, "__module__", None) or "").split(".")[0]
            if package in FOREIGN_KERNELS:
                return (
                    f"{path or 'the module'} ({type(m).__name__}) computes in kernels of {package!r}, which have no "
                    f"second derivatives: {FOREIGN_KERNELS[package]}."
                )
    return None


def find_suspects(module: nn.Module) -> list[str]:
    """Look for what takes part in a forward pass and may have no derivative of second order, or another one.

    It may be harmless; where a derivative turns out wrong, an error names it.

    Args:
        module: The live module.

    Returns:
        Descriptions, most telling first.
    """
    found: dict[str, None] = {}
    for name, m in module.named_modules():
        if isinstance(m, torch.jit.ScriptModule):
            found[f"{name or 'the module'}, a module of torch.jit.script, which drops tangents"] = None
        if m._backward_hooks or m._backward_pre_hooks:
            found[f"a backward hook on {name or 'the module'}"] = None
    for kind in {type(m) for m in module.modules()}:
        for base in kind.__mro__:
            for function in vars(base).values() if is_of_user(base) else ():
                for used in _used_by(function):
                    found[used] = None
    return list(found)


_CHECKPOINT = "torch.utils.checkpoint, which is of no use here: blocks are rematerialised anyway"


def _used_by(function: object) -> Iterator[str]:
    function = getattr(function, "__func__", getattr(function, "fget", function))
    if not isinstance(function, types.FunctionType):
        return
    names = function.__code__.co_names
    if "checkpoint" in names and function.__globals__.get("torch") is torch:
        yield _CHECKPOINT
    for name in names:
        x = function.__globals__.get(name)
        if isinstance(x, type) and issubclass(x, torch.autograd.Function):
            has = "jvp" in vars(x) and "setup_context" in vars(x)
            yield f"{name}, a torch.autograd.Function" + ("" if has else " without jvp and setup_context")
        elif isinstance(x, torch.jit.ScriptFunction):
            yield f"{name}, a function of torch.jit.script, which drops tangents"
        elif isinstance(x, (CustomOpDef, OpOverload, OpOverloadPacket)):
            yield f"{name}, a custom operator"
        elif x is torch.utils.checkpoint.checkpoint:
            yield _CHECKPOINT
