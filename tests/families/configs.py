"""Tiny configurations of any family of transformers, by rules on the names of attributes and a table of exceptions."""

import dataclasses
import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.families.overrides import OVERRIDES

VOCAB, FIRST_WORD = 64, 40  # ids below are special
CLASSES = 3
SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "cls": 1, "sep": 2, "mask": 3, "unk": 3, "image": 4,
           "video": 5, "audio": 6, "img": 4, "vision_start": 7, "vision_end": 8}  # fmt: skip

RULES: list[tuple[str, Any]] = [
    (r"(dropout|drop_path|layerdrop|pdrop|drop_rate|dropout_rate|_drop$|^drop$|jitter)", 0.0),
    (r"mask_(time|feature)_prob|noise_(std|scale)", 0.0),
    (r"apply_spec_augment|use_cache|use_mamba_kernels|use_mem_eff|use_kernel", False),
    (r"vocab_size|n_vocab|^n_token|num_embeddings$|num_codevectors", VOCAB),
    (r"max_position|n_positions|n_ctx|max_seq|context_length|max_source_pos|max_target_pos|max_2d_pos", 128),
    (r"sliding_window|window_attention|attention_window|local_attention$|attention_chunk|window_length", 5),
    (r"image_size|img_size|input_size|pretrain_img", 16),
    (r"patch_size|patch_stride|temporal_patch", 4),
    (r"(key_value|kv|query_group).*heads?|num_.*kv|multi_query_group|n_kv|num_groups_kv", 2),
    (r"num_key_value_groups|n_group$|num_groups|topk_group|n_groups", 1),
    (r"(heads|n_head|head_num|num_head)$", 4),
    (r"rope_head_dim", 8),
    (r"nope_head_dim", 4),
    (r"(head_dim|d_kv|head_size|kv_channels|head_width|rotary_dim|rope_dim)$", 8),
    (r"lora_rank|low_rank|_rank$", 8),
    (r"num_experts_per|experts_per|moe_k$|_top_k$|topk$|top_k$|top_k_experts", 2),
    (r"(num|n)_.*experts|num_experts|experts_num|num_routed|n_routed", 4),
    (r"shared_experts", 1),
    (r"first_k_dense|num_dense_layers|first_dense|moe_layer_start", 1),
    (r"expert.*(intermediate|ffn|hidden|size|dim)|moe.*(intermediate|ffn|hidden|size|dim)", 16),
    (r"(intermediate|ffn|inner|d_ff|mlp_dim|mlp_size|ff_dim|filter_size|feedforward|feed_forward_(size|dim)"
     r"|proj_size)", 48),
    (r"(layers|n_layer|num_layer|depth|num_hidden_layers|num_blocks|layer_num|num_block)$", 2),
    (r"(d_model|n_embd|embd|hidden_size|embed_dim|_dim|^dim|width|embedding_size|d_embed|hidden_dim|embed_size"
     r"|hidden_channels|projection_size|model_dim|_size|channels|hidden)$", 32),
    (r"num_mel|n_mels|mel_bins|feature_size|input_feat", 16),
    (r"state_size|d_state|ssm_state", 8),
    (r"time_step_rank|dt_rank", 4),
]  # fmt: skip
KEPT = re.compile(
    r"kernel|stride|dilation|num_channels|in_channels|in_chans|padding|expand|merge|temporal|ratio|epsilon|eps$|theta"
    r"|bits|downsample|num_labels|version|chunk_size_feed|_interval|_every|frequency|_freq|_period|factor|out_channels_"
)
SECTIONS = [2, 1, 1]
LONG = 128  # larger integers become 32


def is_nested(value: Any) -> bool:
    return isinstance(value, PreTrainedConfig)


def tiny(model_type: str) -> PreTrainedConfig:
    """The family's configuration at a tiny size, without dropout.

    Args:
        model_type: As in transformers' auto classes.
    """
    override = OVERRIDES.get(model_type, {})
    if "build" in override:
        return override["build"](shrink)
    return shrink(CONFIG_MAPPING[model_type], override.get("config", {}))


def shrink(cls: type[PreTrainedConfig], override: dict[str, Any]) -> PreTrainedConfig:
    """A class's default configuration, smaller.

    Args:
        cls: Of the configuration.
        override: Values by name, for nested configurations dicts.
    """
    default = cls()
    names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else list(default.to_dict())
    values: dict[str, Any] = {}
    num_layers = next((getattr(default, n) for n in ("num_hidden_layers", "num_layers") if hasattr(default, n)), None)
    for name in names:
        if name in override and not isinstance(override[name], dict):
            continue
        try:
            value = getattr(default, name, None)
        except (AttributeError, RuntimeError):  # differs between layers
            value = None
        if is_nested(value):
            values[name] = shrink(type(value), override.get(name, {}))
        elif name in override:
            values[name] = override[name]
        else:
            found = rule(name, value, num_layers)
            if found is not None:
                values[name] = found[0]
    if "kv_lora_rank" in names and "num_key_value_heads" in names and "num_key_value_heads" not in override:
        values["num_key_value_heads"] = 4  # one per head in latent attention
    if "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ()) and "rope_parameters" not in override:
        given = getattr(default, "rope_parameters", None)
        if not given or "rope_theta" in given:
            values["rope_parameters"] = {
                "rope_type": "default",
                "rope_theta": 1e4,
                **(given or {}),
                "mrope_section": SECTIONS,
            }
    if isinstance(values.get("layer_types"), list):
        for name in ("num_hidden_layers", "num_layers"):
            if name in names and name not in override:
                values[name] = len(values["layer_types"])
    values |= {n: v for n, v in override.items() if not isinstance(v, dict) or not is_nested(getattr(default, n, None))}
    if "num_labels" not in values and "id2label" in names:
        values["num_labels"] = CLASSES
    return cls(**values)


def rule(name: str, value: Any, num_layers: Any) -> tuple[Any] | None:
    """What an attribute becomes, in a tuple; None where it stays."""
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, bool) and re.search(r"token_(id|index)s?$|_token$|token_idx$", name):
        if name in ("forced_eos_token_id", "forced_bos_token_id", "suppress_token_id"):
            return (None,)
        return (special(name),) if isinstance(value, (int, list)) else None
    if isinstance(value, dict):
        return rope(name, value)
    if isinstance(value, (list, tuple)):
        return sequence(name, list(value), num_layers)
    for pattern, small in RULES:
        if re.search(pattern, name):
            if isinstance(value, bool) != isinstance(small, bool):
                continue
            if KEPT.search(name) and not isinstance(small, (float, bool)):
                return None
            if isinstance(small, int) and not isinstance(small, bool):
                return (min(small, value),) if isinstance(value, int) and value > 0 else None
            return (small,)
    if isinstance(value, int) and not isinstance(value, bool) and value > LONG and not KEPT.search(name):
        return (32,)
    return None


def special(name: str) -> int:
    stem = re.sub(r"_token.*$", "", name)
    if stem not in SPECIAL:
        SPECIAL[stem] = 9 + (sum(ord(c) * (i + 1) for i, c in enumerate(stem)) % (FIRST_WORD - 9))
    return SPECIAL[stem]


def rope(name: str, value: dict) -> tuple[Any] | None:
    """Sections of rotary dimensions that fit heads of 8; the rest as it is."""
    if "mrope_section" in value:
        return (value | {"mrope_section": SECTIONS},)
    nested = {
        k: v | {"mrope_section": SECTIONS} for k, v in value.items() if isinstance(v, dict) and "mrope_section" in v
    }
    return (value | nested,) if nested else None


def sequence(name: str, value: list, num_layers: Any) -> tuple[Any] | None:
    """Per layer: one of each kind. Per stage: as many stages, of one block and few channels."""
    if name == "image_grid_pinpoints":
        return ([[16, 16]],)
    if name == "layer_types" or (value and all(isinstance(v, str) for v in value) and len(value) == num_layers):
        kinds = list(dict.fromkeys(value))
        return (kinds if len(kinds) > 1 else kinds * 2,)
    if not value or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        if isinstance(num_layers, int) and len(value) == num_layers and num_layers > 2:
            return (value[:2],)
        return None
    if re.search(r"(image|img)_size$", name):
        return ([16] * len(value),)
    if re.search(r"patch_size$", name):
        return ([4] * len(value),)
    if KEPT.search(name):
        return None
    if re.search(r"depth|num_.*(layers|blocks)|layers|blocks", name):
        return ([1] * len(value),)
    if re.search(r"head", name):
        return ([min(v, 2) for v in value],)
    if re.search(r"(size|dim|channel|width|filters)s?$", name) and max(value) > 8:
        if re.search(r"image|patch|window|crop", name):
            return None
        return ([8 * (i + 1) if len(set(value)) > 1 else 16 for i in range(len(value))],)
    return None
