"""Inputs that a family's forward pass takes, found by its signature and by what its errors ask for."""

import inspect
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.families.configs import FIRST_WORD, VOCAB
from tests.families.overrides import OVERRIDES

BATCH, LENGTH = 3, 7
Inputs = dict[str, Any]
IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "media_token_id")
ASKED = re.compile(r"tokens: (\d+), features:? (\d+)")


class NoInputs(Exception):
    """No inputs were found with which the forward pass runs."""


def words(generator: torch.Generator, length: int = LENGTH) -> Tensor:
    return torch.randint(FIRST_WORD, VOCAB, (BATCH, length), generator=generator)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def attribute(config: Any, *names: str, default: Any) -> Any:
    """The first of some attributes that a configuration or a nested one has."""
    nested = [getattr(config, n, None) for n in ("vision_config", "audio_config", "encoder", "encoder_config")]
    for name in names:
        for c in [*nested, config]:
            value = getattr(c, name, None) if c is not None else None
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and value > 0:
                return value
    return default


def images(config: Any, g: torch.Generator) -> Tensor:
    size = attribute(config, "image_size", "img_size", "input_size", default=32)
    return normal(g, BATCH, attribute(config, "num_channels", "in_channels", "in_chans", default=3), size, size)


def text(g: torch.Generator) -> Inputs:
    mask = (torch.arange(LENGTH) < torch.tensor([LENGTH, 5, 6])[:, None]).long()  # padded on the right
    return {"input_ids": words(g), "attention_mask": mask}


def interleaved(config: Any, g: torch.Generator, accepted: Collection[str], count: int) -> Inputs:
    """Words around the tokens of one picture."""
    token = next((t for n in IMAGE_TOKENS if (t := getattr(config, n, None)) is not None), None)
    ids = words(g, 4 + count)
    if token is not None:
        ids[:, 2 : 2 + count] = token
    is_picture = (torch.arange(4 + count) - 2).clamp(0, count) == 0 if token is None else ids == token
    optional = {
        "mm_token_type_ids": is_picture.long().expand_as(ids),
        "image_embeds_position_mask": is_picture.expand_as(ids),
        "qformer_input_ids": words(g),
        "qformer_attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
    }
    kept = {n: t for n, t in optional.items() if n in accepted}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | kept


def pictures(config: Any, g: torch.Generator, accepted: Collection[str], count: int) -> Iterator[Inputs]:
    """One picture per example, as [B, C, H, W], [B, 1, C, H, W], or patches in a row with their grid."""
    picture = images(config, g)
    size, patch, channels = picture.shape[-1], attribute(config, "patch_size", default=4), picture.shape[1]
    sizes = {"image_sizes": torch.tensor([[size, size]] * BATCH)} if "image_sizes" in accepted else {}
    sizes |= {"image_num_patches": torch.ones(BATCH, dtype=torch.long)} if "image_num_patches" in accepted else {}
    for extra in (sizes, {}) if sizes else ({},):
        yield {"pixel_values": picture} | extra
        yield {"pixel_values": picture.unsqueeze(1)} | extra
        yield {"pixel_values": picture.unsqueeze(1).expand(-1, 2, -1, -1, -1)} | extra
    for merge in (2, 1):
        side = merge * max(round(count**0.5), 1)
        for time in (attribute(config, "temporal_patch_size", default=2), 1):
            flat = normal(g, BATCH * side * side, channels * time * patch * patch)
            for values in (flat, flat.view(BATCH * side * side, channels, -1, patch)):
                yield {"pixel_values": values, "image_grid_thw": torch.tensor([[1, side, side]] * BATCH)}
                yield {"pixel_values": values, "image_grid_hws": torch.tensor([[side, side]] * BATCH)}
    if "spatial_shapes" in accepted:
        side = 2
        yield {
            "pixel_values": normal(g, BATCH, side * side, channels * patch * patch),
            "spatial_shapes": torch.tensor([[side, side]] * BATCH),
            "pixel_attention_mask": torch.ones(BATCH, side * side, dtype=torch.long),
        }


def candidates(kind: str, model: nn.Module, g: torch.Generator, counts: Collection[int] = ()) -> Iterator[Inputs]:
    """Inputs to try, the richest first; ``counts`` are numbers of image tokens that errors asked for."""
    config: Any = model.config
    override = OVERRIDES.get(config.model_type, {})
    accepted = inspect.signature(model.forward).parameters
    decoder = {"decoder_input_ids": words(g, 6)} if "decoder_input_ids" in accepted else {}
    if "inputs" in override:
        yield override["inputs"](config, g)
    if kind in ("image", "zero-shot"):
        picture = {"pixel_values": images(config, g)}
        yield picture | (text(g) if kind == "zero-shot" else {})
    elif kind in ("audio", "ctc", "speech"):
        bins = attribute(config, "num_mel_bins", "n_mels", "input_feat_per_channel", "feature_size", "input_size",
                         "feature_projection_input_dim", default=16)  # fmt: skip
        frames = attribute(config, "max_source_positions", "max_length", default=24)
        for name in ("input_features", "input_values", "input_ids"):
            if name in accepted:
                yield {name: normal(g, BATCH, 24, bins)} | decoder
                yield {name: normal(g, BATCH, bins, 24)} | decoder
                yield {name: normal(g, BATCH, bins, 2 * frames)} | decoder
                yield {name: normal(g, BATCH, 800)} | decoder
                yield {name: normal(g, BATCH, 1, 800)} | decoder
    elif kind == "vision-language":
        for count in (1, *counts) if "pixel_values" in accepted else ():
            for picture in pictures(config, g, accepted, count):
                yield interleaved(config, g, accepted, count) | picture | decoder
        yield text(g) | decoder
    else:
        yield text(g) | decoder
        yield {"input_ids": words(g)} | decoder


def find_inputs(kind: str, model: nn.Module, seeds: list[int]) -> tuple[list[Inputs], str]:
    """Batches with which the forward pass runs, and what was left out to get there.

    Args:
        kind: Of the family.
        model: The model.
        seeds: One batch for each.

    Raises:
        NoInputs: With the errors of the first and the last attempt.
    """
    errors: list[str] = []
    counts: dict[int, None] = {4: None, 16: None}
    i = 0
    while i < len(made := list(candidates(kind, model, torch.Generator().manual_seed(seeds[0]), counts))):
        try:
            with torch.no_grad():
                out = model(**converted(made[i], model))
                if not output_tensor(out).isfinite().all():
                    raise NoInputs("its outputs are not finite")
        except Exception as error:  # whatever a model says to inputs that it was not made for
            errors.append(f"{type(error).__name__}: {str(error)[:200]}")
            asked = ASKED.search(str(error))
            if asked and int(asked[2]) % BATCH == 0 and 0 < int(asked[2]) <= 200 * BATCH:
                counts.setdefault(int(asked[2]) // BATCH)
            i += 1
            continue
        batches = [list(candidates(kind, model, torch.Generator().manual_seed(s), counts))[i] for s in seeds]
        note = (
            "text alone"
            if kind == "vision-language" and not {"pixel_values", "flattened_patches"} & made[i].keys()
            else ""
        )
        return [converted(b, model) for b in batches], note
    raise NoInputs(" / ".join(dict.fromkeys([errors[0], errors[-1]])))


def converted(batch: Inputs, model: nn.Module) -> Inputs:
    """Real numbers in the dtype of the model."""
    dtype = next(p.dtype for p in model.parameters())
    return {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in batch.items()}


OUTPUTS = re.compile(r"logits|spectrogram|^pred_|hidden_state|output")


def output_tensor(out: Any) -> Tensor:
    """Logits ``[B, ..., C]``, or the first tensor that can be scored.

    Raises:
        NoInputs: If there is none.
    """
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        found = getattr(out, name, None)
        if isinstance(found, Tensor) and found.is_floating_point():
            return found
    for name, found in out.items():
        if isinstance(found, Tensor) and found.is_floating_point() and found.ndim >= 2 and OUTPUTS.search(name):
            return found
    raise NoInputs(f"outputs {list(out.keys())} hold no logits")
