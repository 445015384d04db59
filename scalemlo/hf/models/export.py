"""Checkpoints in the format of ``from_pretrained``, made without building the program and without a process group."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from ...checkpoint.export import CheckpointWeights
from ...checkpoint.weight_files import SHARD_BYTES, WeightFiles
from .saving import write_config, write_model


def to_hf(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    base: str | None = None,
    level: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a level in the format that ``from_pretrained`` of transformers or PEFT reads.

    Args:
        checkpoint: A checkpoint, or a folder of them: then the latest complete one.
        folder: Created if needed.
        base: Folder or hub name of the model that training began with: configuration and frozen weights are taken
            from it. An adapter needs none.
        level: Which level; needed where there are several.
        max_shard_bytes: Size of a model's files; an adapter is one file.

    Raises:
        ValueError: If there is no checkpoint, it cannot be read, or it does not fit the base model.
    """
    weights = CheckpointWeights(checkpoint)
    level = weights.the_level(level)
    if weights.adapters(level):
        _write_adapter(weights, level, Path(folder))
    elif base is None:
        raise ValueError(f"level {level!r} of {weights.path} is no adapter: give base, the model it began with.")
    else:
        _write_model(weights, level, base, folder, max_shard_bytes)


def _write_adapter(weights: CheckpointWeights, level: str, folder: Path) -> None:
    adapters = weights.adapters(level)
    if len(adapters) > 1:
        raise ValueError(f"level {level!r} has the adapters {list(adapters)}; only one can be converted.")
    (adapter, config) = next(iter(adapters.items()))
    files = WeightFiles(folder, "adapter_model")
    for name in weights.shapes(level):
        as_saved = name.replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".")  # as PEFT names it
        files.add(as_saved.removesuffix(f".{adapter}"), weights.tensor(level, name))
    files.finish()
    (folder / "adapter_config.json").write_text(json.dumps(config | {"inference_mode": True}, indent=2, sort_keys=True))


def _write_model(weights: CheckpointWeights, level: str, base: str, folder: str | Path, max_shard_bytes: int) -> None:
    config = transformers.AutoConfig.from_pretrained(base)
    architecture = (config.architectures or [None])[0]
    model_class = getattr(transformers, architecture or "", None)
    if architecture is None or model_class is None:
        raise ValueError(
            f"base {base!r}: its config.json names the architecture {architecture!r}, not in transformers."
        )
    with torch.device("meta"):
        skeleton = model_class(config)
    trained = weights.shapes(level)
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}
    wrong = [name for name, shape in trained.items() if shapes.get(name) != shape]
    if wrong:
        raise ValueError(f"base {base!r} is not what level {level!r} began with: it has no {wrong[:3]} of that shape.")
    kept = skeleton.state_dict().keys()
    names = [*shapes, *(name for name, _ in skeleton.named_buffers() if name in kept)]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        frozen = None
        for name in names:
            if name in trained:
                yield name, weights.tensor(level, name)
            else:
                frozen = frozen or _BaseWeights(base)
                yield name, frozen.tensor(name)

    write_model(tensors(), folder, max_shard_bytes)
    generation_config = skeleton.generation_config if skeleton.can_generate() else None
    dtype = weights.dtype(level, next(iter(trained)))
    write_config(config, generation_config, architecture, dtype, folder)


class _BaseWeights:
    """Single tensors of a model's safetensors files."""

    def __init__(self, base: str):
        self._base = base
        index = cached_file(base, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
        if index is not None:
            places = json.loads(Path(index).read_text())["weight_map"]
            self._files = {name: cached_file(base, file) for name, file in places.items()}
        else:
            single = cached_file(base, "model.safetensors", _raise_exceptions_for_missing_entries=False)
            if single is None:
                raise ValueError(f"base {base!r} has no safetensors files, which its frozen weights are read from.")
            with safe_open(single, "pt") as f:
                self._files = dict.fromkeys(f.keys(), single)

    def tensor(self, name: str) -> Tensor:
        if name not in self._files:
            raise ValueError(
                f"base {self._base!r} has no {name!r} under this name. Build the program, load the checkpoint and use "
                "scalemlo.hf.models.saving.save_pretrained."
            )
        with safe_open(self._files[name], "pt") as f:
            return f.get_tensor(name)
