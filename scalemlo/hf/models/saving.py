"""Write what was trained in the format ``from_pretrained`` reads."""

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...checkpoint.weight_files import SHARD_BYTES, WeightFiles
from ...distributed.group import is_main_process
from ...distributed.ranks import Ranks
from ...loop.program import Program


def save_pretrained(
    program: Program,
    level: str,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Save a level's Hugging Face model, or its adapter if it is a PEFT model. Collective.

    Of any other module the weights alone are saved, as ``model.safetensors`` under their names in the module.

    Weights are gathered one by one: rank 0 holds those of one file (an adapter is one file), the other ranks one
    weight.

    Args:
        program: The program, on every rank.
        level: Name of the level.
        folder: Written by rank 0; created if needed.
        tokenizer: Saved beside the model.
        max_shard_bytes: Size of a model's files.

    """
    engine = program.trainers[level].engine
    module = engine.module
    is_adapter = isinstance(module, PeftModel)
    frozen = _adapter_names(module) if is_adapter else ()
    tensors = engine.full_tensors(trainable_only=is_adapter, also=frozen)

    def write() -> None:
        try:
            if not is_main_process():
                return
            if isinstance(module, PeftModel):
                _write_adapter(module, tensors, Path(folder))
            else:
                write_model(tensors, folder, max_shard_bytes)
            if isinstance(module, PreTrainedModel):
                dtype = next(engine.dtypes[n] for n in engine.parameters)
                write_config(module.config, module.generation_config, _class_name(module), dtype, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        finally:
            for _ in tensors:  # the other ranks only gather; they must get to the end also where rank 0 fails
                pass

    with program.resident(level):
        Ranks().together(write)


def write_model(tensors: Iterable[tuple[str, Tensor]], folder: str | Path, max_shard_bytes: int) -> None:
    """Write the weights of a model; those of one file are in memory."""
    files = WeightFiles(folder, "model", max_shard_bytes)
    for name, tensor in tensors:
        files.add(name, tensor)
    files.finish()


def write_config(
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None,
    architecture: str,
    dtype: torch.dtype,
    folder: str | Path,
) -> None:
    """Write what ``from_pretrained`` needs beside the weights.

    Args:
        config: Of the model.
        generation_config: Of the model, if it generates.
        architecture: Name of its class.
        dtype: Of the weights that were trained; ``from_pretrained`` casts all weights to it.
        folder: Where.
    """
    config = deepcopy(config)
    config.architectures, config.dtype = [architecture], dtype
    config.save_pretrained(folder)
    if generation_config is not None:
        generation_config.save_pretrained(folder)


def _write_adapter(module: PeftModel, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    files, adapter = WeightFiles(folder, "adapter_model"), cast(str, module.active_adapter)
    for name, tensor in get_peft_model_state_dict(module, state_dict=dict(tensors), adapter_name=adapter).items():
        files.add(name, tensor)
    files.finish()
    config = deepcopy(module.peft_config[adapter])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _adapter_names(module: PeftModel) -> set[str]:
    """Parameters of the adapter, those that are frozen too."""
    layers = {name: m for name, m in module.named_modules() if isinstance(m, BaseTunerLayer)}
    return {
        f"{prefix}.{name}"
        for prefix, layer in layers.items()
        for name, _ in layer.named_parameters()
        if name.split(".")[0] in layer.adapter_layer_names
    }


def _class_name(module: PreTrainedModel) -> str:
    """FSDP has changed the class of the live model."""
    return next(c.__name__ for c in type(module).__mro__ if not c.__name__.startswith("FSDP"))
