"""Exceptions from the rules by which configurations are made tiny, as data.

By family: ``config`` has values for its configuration, for nested ones as dicts; ``build`` makes the configuration from
the function that shrinks a class; ``inputs`` makes one batch.
"""

from typing import Any

import torch
import transformers as tf

ROPE = {"rope_type": "default", "rope_theta": 1e4}
GEMMA4 = dict(head_dim=8, global_head_dim=8, num_attention_heads=4, num_key_value_heads=2)

GEMMA3N = dict(intermediate_size=48, num_kv_shared_layers=0, activation_sparsity_pattern=[0.5, 0.0])
SWIN = dict(window_size=2, depths=[1, 1], num_heads=[2, 2], embed_dim=8, image_size=16)
EFFICIENT = dict(width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, image_size=32, drop_connect_rate=0.0,
                 in_channels=[32, 16, 24, 40, 80, 112, 192], out_channels=[16, 24, 40, 80, 112, 192, 320])  # fmt: skip

INDEXER = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=4, indexer_compress_ratio=2,
               ngram_vocab_size_base=64, make_ngram_vocab_size_divisible_by=8, split_ngram_parts=2)  # fmt: skip


def normal(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(3, *shape, generator=g, dtype=torch.float64)


def words(g: torch.Generator, length: int = 8) -> torch.Tensor:
    return torch.randint(40, 64, (3, length), generator=g)


OVERRIDES: dict[str, dict[str, Any]] = {
    "align": {"config": dict(vision_config=dict(**EFFICIENT))},
    "convnext": {"config": dict(image_size=64)},
    "convnextv2": {"config": dict(image_size=64)},
    "cvt": {"config": dict(
        depth=[1, 2, 3], drop_path_rate=[0.0, 0.0, 0.0], embed_dim=[8, 16, 24], num_heads=[1, 2, 2])},
    "donut-swin": {"config": SWIN},
    "efficientnet": {"config": EFFICIENT},
    "esm": {"config": dict(vocab_size=64, pad_token_id=0, mask_token_id=3)},
    "esmc": {"config": dict(num_key_value_heads=4)},
    "glm4v_moe": {"config": dict(text_config=dict(rope_parameters=ROPE | {
        "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}))},
    "hgnet_v2": {"config": dict(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 16, 24, 32], stage_mid_channels=[8] * 4,
        stage_out_channels=[16, 24, 32, 40], hidden_sizes=[16, 24, 32, 40], stage_numb_of_layers=[1] * 4)},
    "imagegpt": {"config": dict(scale_attn_weights=True), "inputs": lambda config, g: {"input_ids": words(g)}},
    "led": {"config": dict(attention_window=4), "inputs": lambda config, g: {
        "input_ids": words(g), "decoder_input_ids": words(g, 6)}},
    "levit": {"config": dict(drop_path_rate=0, image_size=64)},
    "longformer": {"config": dict(attention_window=4), "inputs": lambda config, g: {"input_ids": words(g)}},
    "mobilenet_v1": {"config": dict(image_size=64)},  # at 16 pixels its last batch norm sees three numbers
    "mobilenet_v2": {"config": dict(image_size=64)},
    "mobilevitv2": {"config": dict(image_size=64, base_attn_unit_dims=[16, 16, 16], n_attn_blocks=[1, 1, 1])},
    "neomme": {"config": dict(head_dim=16)},
    "paddleocr_vl": {"config": dict(text_config=dict(rope_parameters=ROPE | {"mrope_section": [2, 1, 1]}))},
    "pvt": {"config": dict(image_size=64)},
    "pvt_v2": {"config": dict(image_size=64)},
    "qwen3_omni_moe_thinker": {"config": dict(vision_start_token_id=7)},
    "qwen2_5_omni_thinker": {"config": dict(vision_start_token_id=7)},
    "step3p7": {"config": dict(text_config=dict(sliding_window=5))},
    "swin": {"config": SWIN},
    "swinv2": {"config": SWIN | dict(pretrained_window_sizes=[0, 0])},
    "textnet": {"config": dict(stem_out_channels=8, hidden_sizes=[8, 8, 16, 16, 16], image_size=[32, 32])},
    "xmod": {"config": dict(default_language="en_XX")},
    "dbrx": {"config": dict(attn_config=dict(rope_theta=1e4, clip_qkv=8.0))},
    "deepseek_ocr2": {"config": dict(text_config=dict(mlp_layer_types=["dense", "sparse"]))},
    "dots3_note": {"config": dict(text_config=dict(num_key_value_heads=4))},
    "ernie4_5_vl_moe": {"config": dict(text_config=dict(
        moe_intermediate_size=[16, 16], rope_parameters=ROPE | {"mrope_section": [1, 1, 2]}))},
    "fun_asr_nano": {"config": dict(adaptor_config=dict(intermediate_size=8))},
    "granite4_vision": {"config": dict(deepstack_layer_map=[[1, 0]])},
    "granite_speech5_ctc": {"inputs": lambda config, g: {"input_features": normal(g, 24, 64)}},
    "kosmos-2": {"config": dict(latent_query_num=4)},
    "longcat_flash": {"config": dict(qk_head_dim=12)},
    "molmo2": {"config": dict(adapter_config=dict(vision_feature_layer=[1, 0]))},
    "mistral_large4": {"config": dict(text_config=dict(kv_source_layers=[0, 1]))},
    "nemo_speechlm": {"config": dict(chunk_right_context=4)},
    "nemotron_h_omni": {"config": dict(vision_config=dict(video_temporal_patch_size=2))},
    "pix2struct": {"inputs": lambda config, g: {
        "flattened_patches": torch.cat(
            [torch.arange(8.0).view(1, 4, 2).expand(3, 4, 2),
             normal(g, 4, config.vision_config.patch_embed_hidden_size)], dim=-1),
        "decoder_input_ids": words(g, 6)}},
    "qwen4_exp": {"config": dict(text_config=INDEXER)},
    "qwen4_exp_text": {"config": INDEXER},
    "udop": {"inputs": lambda config, g: {
        "input_ids": words(g, 7), "bbox": torch.rand(3, 7, 4, generator=g), "decoder_input_ids": words(g, 6)}},
    "dia": {"inputs": lambda config, g: {
        "input_ids": words(g, 7),
        "decoder_input_ids": words(g, 6)[..., None].expand(-1, -1, config.decoder_config.num_channels)}},
    "blip-2": {"config": dict(image_token_index=4, num_query_tokens=4)},
    "chameleon": {"config": dict(vocabulary_map={"<image>": 4})},
    "emu3": {"config": dict(vocabulary_map={"<image>": 4})},
    "diffusion_gemma": {"config": dict(text_config=dict(
        **GEMMA4, num_experts=4, top_k_experts=2, moe_intermediate_size=16))},
    "glm5_next": {"config": dict(text_config=dict(num_key_value_heads=4, index_kpool=1))},
    "hunyuan_vl": {"config": dict(text_config=dict(head_dim=8))},
    "instructblip": {"config": dict(image_token_index=4, num_query_tokens=4)},
    "instructblipvideo": {"config": dict(image_token_index=4, video_token_index=4, num_query_tokens=4)},
    "cohere_compass": {"config": dict(text_config=dict(rope_parameters={"full_attention": ROPE}))},
    "cohere_compass_text": {"config": dict(rope_parameters={"full_attention": ROPE})},
    "deepseek_v2": {"config": dict(n_group=1, topk_group=1, num_experts_per_tok=2, head_dim=8)},
    "dots1": {"config": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16)},
    "gemma3n_text": {"config": GEMMA3N},
    "gemma3n": {"config": dict(text_config=GEMMA3N)},
    "gemma4_text": {"config": GEMMA4},
    "gemma4_unified_text": {"config": GEMMA4},
    "gemma4": {"config": dict(text_config=GEMMA4)},
    "gemma4_unified": {"config": dict(text_config=GEMMA4)},
    "gpt_neo": {"config": dict(num_layers=2, attention_types=[[["global", "local"], 1]])},
    "hunyuan_v1_dense": {"config": dict(head_dim=8)},
    "hunyuan_v1_moe": {"config": dict(head_dim=8)},
    "laguna": {"config": dict(num_attention_heads_per_layer=[4, 4])},
    "lfm2_moe": {"config": dict(layer_types=["conv", "full_attention"], num_hidden_layers=2)},
    "mamba2": {"config": dict(num_heads=8, head_dim=8)},
    "ministral": {"config": dict(head_dim=8)},
    "mpt": {"config": dict(attn_config=dict(attn_pdrop=0))},
    "musicgen": {"build": lambda shrink: shrink(tf.MusicgenDecoderConfig, {"num_codebooks": 1})},
    "musicgen_melody": {"build": lambda shrink: shrink(tf.MusicgenMelodyDecoderConfig, {"num_codebooks": 1})},
    "nemotron": {"config": dict(num_key_value_heads=2)},
    "reformer": {"config": dict(
        is_decoder=True, axial_pos_embds=False, attn_layers=["local", "lsh"], lsh_attn_chunk_length=4,
        local_attn_chunk_length=4, hash_seed=0, num_buckets=4),
        "inputs": lambda config, g: {"input_ids": words(g)}},
    "zamba": {"config": dict(
        layers_block_type=["linear_attention", "hybrid", "hybrid"], num_hidden_layers=3, mamba_dt_rank=4,
        attention_hidden_size=64, attention_head_dim=16)},
}  # fmt: skip
