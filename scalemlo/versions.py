"""What differs between the versions of torch and transformers that are supported: torch 2.11, transformers 5.17 on."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__version__ = "0.1.0"
"""Of scalemlo itself, as in pyproject.toml."""

NEWER, OLDER = "activation_checkpointing", "gradient_checkpointing"
"""What transformers calls it."""


def checkpointing_of(args: Any) -> dict[str, Any] | None:
    """Options of activation checkpointing in some training arguments of transformers; None where it is off."""
    name = NEWER if hasattr(args, NEWER) else OLDER
    return dict(getattr(args, f"{name}_kwargs") or {}) if getattr(args, name) else None


def checkpoint_activations(model: Any, options: dict[str, Any]) -> bool:
    """Switch it on in a model of transformers.

    Args:
        model: The model.
        options: Of ``torch.utils.checkpoint``.

    Returns:
        Whether the model has it.
    """
    for name in (NEWER, OLDER):
        enable = getattr(model, f"{name}_enable", None)
        if enable is not None:
            enable(options)
            return True
    return False


def buffers_stay() -> dict[str, Any]:
    """The argument of ``DistributedDataParallel`` by which no forward broadcasts the buffers of rank 0.

    Returns:
        It, as torch 2.13 or an older torch names it.
    """
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if newer else "broadcast_buffers": False}


def forget_pass(module: nn.Module) -> None:
    """Have FSDP2 forget a pass that an error has ended.

    Args:
        module: The root that was wrapped.
    """
    state: Any = module._get_fsdp_state()  # ty: ignore[not-callable]
    if state._is_root is None:  # it has not run yet
        return
    if hasattr(module, "reset_iter_state"):  # torch 2.13
        module.reset_iter_state()  # ty: ignore[not-callable]
        return
    shared, kinds = state._comm_ctx, type(state._training_state)
    shared.post_forward_order.clear()
    for name in ("all_gather_state", "reduce_scatter_state"):
        if hasattr(shared, name):
            setattr(shared, name, None)
    if hasattr(shared, "reduce_scatter_states"):
        shared.reduce_scatter_states.clear()
    for part in state._state_ctx.all_states:
        part._training_state = kinds.IDLE
        if hasattr(part, "_modules_to_run_forward"):
            part._modules_to_run_forward.clear()
        group = getattr(part, "_fsdp_param_group", None)
        for held in getattr(part, "_fsdp_param_groups", [group] if group is not None else []):
            held._training_state = kinds.IDLE
            held._post_forward_indices.clear()
            held._all_gather_result = held._post_reduce_event = held._all_reduce_state = None
            held._partial_reduce_output = None
            for p in held.fsdp_params:
                p.to_sharded()
                p.unsharded_accumulated_grad = None
            held._to_sharded()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False


def accelerator_types() -> tuple[str, ...]:
    """Device types that this process can compute on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
