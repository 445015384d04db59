"""Write what was trained in the format ``from_pretrained`` reads."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..distributed import barrier, is_main_process
from ..program import Program


def save_pretrained(
    program: Program, level: str, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Save a level's Hugging Face model, or its adapter if it is a PEFT model. Collective.

    Args:
        program: The program, on every rank.
        level: Name of the level.
        folder: Written by rank 0; created if needed.
        tokenizer: Saved beside the model.

    Raises:
        ValueError: If the level's module is neither a PEFT nor a transformers model.
    """
    module = program.trainers[level].engine.module
    is_adapter = isinstance(module, PeftModel)
    if not isinstance(module, (PeftModel, PreTrainedModel)):
        raise ValueError(f"level {level!r}: {type(module).__name__} has no save_pretrained; use Program.state_dict.")
    state = program.state_dict(level, trainable_only=is_adapter)
    if is_main_process():
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if is_adapter:
            adapter = get_peft_model_state_dict(module, state_dict=state)
            save_file({n: t.contiguous() for n, t in adapter.items()}, folder / "adapter_model.safetensors")
            config = module.peft_config[module.active_adapter]
            config.inference_mode = True
            config.save_pretrained(str(folder))
        else:
            _plain_model(module).save_pretrained(folder, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    barrier()


def _plain_model(module: PreTrainedModel) -> PreTrainedModel:
    """The same architecture without weights: FSDP has changed the class of the live one."""
    cls = next(c for c in type(module).__mro__ if not c.__name__.startswith("FSDP"))
    with torch.device("meta"):
        return cls(module.config)
