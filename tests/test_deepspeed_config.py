"""DeepSpeed's own configuration: what is used, what must agree, what does nothing, what is refused by name."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import scalemlo as mlo
from scalemlo.engines.base import StepOptions
from scalemlo.engines.deepspeed import config as configuration

ZERO2 = {  # "ZeRO-2 example" of transformers' documentation
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
        "round_robin_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
ZERO3 = ZERO2 | {  # "ZeRO-3 example"
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def given(spec: mlo.DeepSpeed, module: nn.Module) -> dict:
    """What DeepSpeed is given."""
    return configuration.settings(spec, configuration.used(spec.config, module))


def test_a_file_made_for_the_hugging_face_trainer(tmp_path):
    path = tmp_path / "ds_config_zero3.json"
    path.write_text(json.dumps(ZERO3))
    spec = mlo.DeepSpeed(dtype="bf16", config=path)
    assert spec.offload_optimizer and spec.offload_parameters
    module = nn.Linear(2, 2)
    module.config = SimpleNamespace(hidden_size=64)
    zero = given(spec, module)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 64**2
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 64**2)
    assert zero["stage3_param_persistence_threshold"] == 0
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert zero["sub_group_size"] == 1e9 and zero["overlap_comm"] is False
    assert spec == mlo.DeepSpeed(dtype="bf16", config=ZERO3) and hash(spec) == hash(mlo.DeepSpeed(**vars(spec)))

    spec = mlo.DeepSpeed(stage=2, config=ZERO2)
    assert spec.offload_optimizer and not spec.offload_parameters
    zero = given(spec, nn.Linear(2, 2))["zero_optimization"]
    assert zero["allgather_bucket_size"] == zero["reduce_bucket_size"] == 2e8


def test_sizes_left_open_are_those_of_deepspeed_where_the_module_has_none():
    spec = mlo.DeepSpeed(config={"zero_optimization": {"reduce_bucket_size": "auto"}})
    assert "reduce_bucket_size" not in given(spec, nn.Linear(2, 2))["zero_optimization"]
    module = nn.Linear(2, 2)
    module.config = SimpleNamespace(text_config=SimpleNamespace(hidden_sizes=[8, 16]))
    assert given(spec, module)["zero_optimization"]["reduce_bucket_size"] == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(stage=0), "stage 0"),
        (dict(stage=2, offload_parameters=True), "only stage 3 splits the weights"),
        (dict(config={"bf16": {"enabled": True}}), "bf16.enabled=True, but the engine has dtype='fp32'"),
        (
            dict(dtype="bf16", config={"bf16": {"enabled": False}}),
            "bf16.enabled=False, but the engine has dtype='bf16'",
        ),
        (dict(config={"fp16": {"enabled": True}}), "fp16.enabled=True, but the engine has dtype='fp32'"),
        (
            dict(config={"zero_optimization": {"stage": 2}}),
            r"stage=2, but the engine has stage=3. Set DeepSpeed\(stage=",
        ),
        (dict(config={"fp16": {"loss_scale": 128}}), "fp16.loss_scale=128 is refused: the loss scale is dynamic"),
        (dict(config={"fp16": {"loss_scale": 1}}), "fp16.loss_scale=1 is refused"),
        (
            dict(offload_optimizer=True, config={"zero_optimization": {"offload_optimizer": {"device": "none"}}}),
            "device='none' is refused: .* use 'cpu'",
        ),
        (dict(config={"fp16": {"consecutive_hysteresis": True}}), "not known to the loss scaler"),
        (dict(config={"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}), "own optimizer steps"),
        (dict(config={"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}), "own scheduler steps"),
        (dict(config={"train_batch_size": 16}), "batches are what the level's data gives"),
        (dict(config={"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}), "masters in memory; use 'cpu'"),
        (dict(config={"zero_optimization": {"offload_param": {"device": "nvme"}}}), "weights from memory; use 'cpu'"),
        (
            dict(config={"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.3}}}),
            "all of the masters",
        ),
        (dict(config={"zero_optimization": {"cpu_offload": True}}), "offload_optimizer: {device: cpu}"),
        (dict(config={"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}), "ZenFlow"),
        (dict(config={"zero_optimization": {"zero_quantized_weights": True}}), "quantised gathers"),
        (dict(config={"zero_optimization": {"zero_quantized_nontrainable_weights": True}}), "quantised gathers"),
        (dict(config={"zero_optimization": {"zero_quantized_gradients": True}}), "quantised reductions"),
        (dict(config={"zero_optimization": {"zero_hpz_partition_size": 8}}), "second partition"),
        (dict(config={"zero_optimization": {"mics_shard_size": 8}}), "MiCS"),
        (dict(config={"zero_optimization": {"memory_efficient_linear": True}}), "without forward derivatives"),
        (dict(config={"compile": {"deepcompile": True}}), "DeepCompile"),
        (dict(config={"sparse_attention": {"mode": "fixed"}}), "sparse_attention.mode='fixed' is refused"),
        (dict(config={"moe": {"enabled": True}}), "moe.enabled=True is refused"),
        (dict(config={"amp": {"enabled": True}}), "dtype of the engine"),
        (dict(config={"flops_profiler": {"enabled": True}}), "not known to leave derivatives as they are"),
        (dict(config="nowhere.json"), "not a readable JSON file"),
    ],
)
def test_refusals_name_the_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        mlo.DeepSpeed(**arguments)


def test_keys_that_switch_off_or_tune_are_taken():
    off = {"train_batch_size": "auto", "bf16": {"enabled": False}, "compile": {"deepcompile": False}}
    off["zero_optimization"] = {"stage": 3, "offload_param": None, "offload_optimizer": {"device": "none"}}
    off["zero_optimization"] |= {"zero_hpz_partition_size": 1, "reduce_bucket_size": 1000}
    spec = mlo.DeepSpeed(config=off)
    assert spec.config == (("zero_optimization.reduce_bucket_size", 1000),)
    assert spec == mlo.DeepSpeed(config={"zero_optimization": {"reduce_bucket_size": 1000}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0, the level has max_grad_norm=0.5"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4, the level has .*=2"),
        ({"optimizer": {"type": "Muon"}}, "optimizer.type='Muon', the level has optimizer='AdamW'"),
        ({"optimizer": {"params": {"lr": 1e-3}}}, "optimizer.params.lr=0.001, the level has lr=0.01"),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, r"betas=\(0.9, 0.95\), the level has betas=\(0.9, 0.999\)"),
        ({"optimizer": {"params": {"momentum": 0.9}}}, "momentum=0.9, the level has optimizer='AdamW'"),
    ],
)
def test_a_value_that_contradicts_the_level_is_shown_beside_it(config, message):
    level = StepOptions("train", max_grad_norm=0.5, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=1e-2)
    agreed = {"gradient_clipping": 0.5, "gradient_accumulation_steps": 2}
    agreed["optimizer"] = {"type": "adamw", "params": {"lr": 1e-2, "betas": [0.9, 0.999]}}
    mlo.DeepSpeed(config=agreed).check_options(level, optimizer)
    with pytest.raises(ValueError, match=message):
        mlo.DeepSpeed(config=config).check_options(level, optimizer)


def test_the_loss_scaler_moves_as_deepspeeds(monkeypatch):
    loss_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    keys = {"initial_scale_power": 6, "loss_scale_window": 3, "hysteresis": 2, "min_loss_scale": 4}
    ours = mlo.DeepSpeed(dtype="fp16", config={"fp16": keys}).loss_scaler()
    theirs = loss_scaler.DynamicLossScaler(
        init_scale=2.0**6, scale_window=3, min_scale=4, delayed_shift=2, consecutive_hysteresis=False
    )
    monkeypatch.setattr(loss_scaler, "dist", SimpleNamespace(get_rank=lambda: 1))  # it logs on rank 0
    draw = random.Random(0)
    for i in range(600):
        overflowed = draw.random() < (0.25 if i < 300 else 0.75)
        try:
            theirs.update_scale(overflowed)
        except Exception:
            with pytest.raises(OverflowError, match="smallest loss scale"):
                ours.update(overflowed=overflowed)
            return
        ours.update(overflowed=overflowed)
        assert ours.scale == theirs.cur_scale
    raise AssertionError("the smallest scale was never reached")
