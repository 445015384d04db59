"""Every field of transformers' TrainingArguments is honoured or refused."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

import scalemlo as mlo
from scalemlo.hf import MLOConfig, MLOTrainer, ReweightingConfig, ReweightingTrainer
from scalemlo.hf.trainer.argument_rules import HONOURED, RULES
from tests.hf.trainer_runs import arguments

PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
OTHER_VALUES = {
    "optim": "adafactor", "lr_scheduler_type": "reduce_lr_on_plateau", "optim_args": "a=1",
    "optim_target_modules": "all-linear", "label_smoothing_factor": 0.1, "torch_compile_backend": "inductor",
    "torch_compile_mode": "default", "liger_kernel_config": {"rope": True}, "neftune_noise_alpha": 1.0,
    "torch_empty_cache_steps": 1, "include_num_input_tokens_seen": "all", "eval_accumulation_steps": 2,
    "include_for_metrics": ["inputs"], "train_sampling_strategy": "group_by_length", "length_column_name": "size",
    "label_names": ["labels"], "ddp_find_unused_parameters": True, "ddp_broadcast_buffers": True,
    "ddp_static_graph": True, "ddp_backend": "gloo", "debug": "underflow_overflow", "local_rank": 3,
    "parallelism_config": object(),
}  # fmt: skip


def test_no_field_of_transformers_is_left_to_chance():
    fields = {f.name for f in dataclasses.fields(TrainingArguments)}
    known = HONOURED | set(RULES) | {"accelerator_config"}
    assert fields - known == set(), "say in argument_rules.py what becomes of them"
    assert HONOURED & set(RULES) == set()
    if known <= fields:  # an older or newer transformers may lack some
        assert known == fields


@pytest.mark.parametrize("name", sorted(RULES))
def test_values_that_would_be_ignored_are_refused_by_name(name, tmp_path):
    default = {f.name: f.default for f in dataclasses.fields(MLOConfig)}[name]
    value = OTHER_VALUES.get(name, not default)
    options = {"eval_strategy": "steps"} if name == "lr_scheduler_type" else {}
    with pytest.raises(ValueError, match=rf"\b{name}=.*not supported.*: \w+"):
        MLOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value}, **options)


def test_accelerate_has_no_say_in_batches(tmp_path):
    with pytest.raises(ValueError, match="accelerator_config.*not supported"):
        MLOConfig(output_dir=str(tmp_path), use_cpu=True, accelerator_config={"split_batches": True})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hypergradient": "darts"}, "hypergradient='darts' is unknown.*'identity'.*'sama'"),
        ({"hypergradient": "neumann", "hypergradient_options": {"terms": 3}}, "terms.*num_terms"),
        ({"hypergradient": mlo.SAMA(), "hypergradient_options": {"a": 3}}, "put them into hypergradient"),
        ({"reweighting": "sentence"}, "reweighting='sentence'.*example.*domain"),
        ({"reweighting": "domain"}, "domain_column"),
        ({"reweighting": "scorer", "weight_normalization": "dataset"}, "not defined for reweighting='scorer'"),
        ({"reweighting": "scorer", "gradient_accumulation_steps": 2}, "weight_normalization='none'"),
        ({"meta_optim": "lion"}, "meta_optim='lion'.*sgd"),
        ({"meta_learning_rate": 0.0}, "meta_learning_rate"),
        ({"unroll_steps": 0}, "unroll_steps"),
        ({"engine": "megatron"}, "engine='megatron'.*'fsdp'.*'zero3'"),
        ({"engine": "ddp", "fsdp": True}, "type='ddp'.*'fsdp'"),
        ({"engine": mlo.DDP(), "bf16": True}, "bf16=True and engine=DDP"),
        ({"fsdp": True, "deepspeed": {"zero_optimization": {"stage": 3}}}, "both set"),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, "cpu_offload=True is not supported"),
        ({"fsdp": "hybrid_shard"}, "hybrid_shard"),
        (
            {
                "load_best_model_at_end": True,
                "save_strategy": "steps",
                "eval_strategy": "steps",
                "save_only_model": True,
            },
            "save_only_model=False",
        ),
    ],
)
def test_arguments_that_cannot_work_say_the_way_out(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


@pytest.mark.parametrize(
    "options, engine",
    [
        ({}, mlo.Single()),
        ({"bf16": True}, mlo.Single(dtype="bf16")),
        ({"engine": "fsdp"}, mlo.FSDP()),
        ({"engine": mlo.FSDP(reshard_after_forward=False)}, mlo.FSDP(reshard_after_forward=False)),
        ({"fsdp": True, "bf16": True}, mlo.FSDP(dtype="bf16")),
        ({"fsdp": "shard_grad_op auto_wrap"}, mlo.FSDP(reshard_after_forward=False)),
        (
            {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "version": 2}},
            mlo.FSDP(units=("LlamaDecoderLayer",)),
        ),
        ({"engine": "ddp", "ddp_bucket_cap_mb": 5}, mlo.DDP(bucket_cap_mib=5.0)),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}},
            mlo.DeepSpeed(stage=2, dtype="bf16"),
        ),
        ({"deepspeed": '{"zero_optimization": {"stage": 1}}'}, mlo.DeepSpeed(stage=1)),
        ({"engine": "zero1"}, mlo.DeepSpeed(stage=1)),
    ],
)
def test_engines_as_users_of_transformers_ask_for_them(options, engine, tmp_path):
    assert arguments(tmp_path, **options).build_engine() == engine


def test_deepspeed_does_not_switch_from_pretrained_to_zero_init(tmp_path):
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    arguments(tmp_path, deepspeed={"zero_optimization": {"stage": 3}})
    assert not is_deepspeed_zero3_enabled()


def test_arguments_are_plain_values(tmp_path):
    plain = arguments(tmp_path, engine=mlo.FSDP(), hypergradient=mlo.SAMA()).to_dict()
    assert plain["engine"].startswith("FSDP(") and plain["hypergradient"].startswith("SAMA(")
    assert isinstance(arguments(tmp_path).to_json_string(), str)


def test_scripts_may_read_the_arguments_from_the_command_line(tmp_path):
    line = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--hypergradient", "sama", "--engine", "fsdp"]
    line += ["--reweighting", "scorer", "--dataset_options", '{"on_overflow": "drop"}']
    (args,) = HfArgumentParser(ReweightingConfig).parse_args_into_dataclasses(line)
    assert args.build_hypergradient() == mlo.SAMA() and args.build_engine() == mlo.FSDP()
    assert args.dataset_options == {"on_overflow": "drop"}


def test_defaults_that_differ_are_those_of_the_docstring():
    ours = {f.name: f.default for f in dataclasses.fields(ReweightingConfig)}
    theirs = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    different = {n for n, value in theirs.items() if value is not dataclasses.MISSING and ours[n] != value}
    assert different == {"optim", "dataloader_drop_last", "logging_steps"}
    assert all(name in MLOConfig.__doc__.replace("\n", " ") for name in different)


def test_the_page_names_arguments_that_exist_and_all_that_transformers_lacks():
    fields = {f.name: f for f in dataclasses.fields(ReweightingConfig)}
    known = {*fields, *inspect.signature(ReweightingTrainer).parameters, *inspect.signature(MLOTrainer).parameters}
    named = set(re.findall(r"`([a-z]\w*)=", PAGE))
    assert len(named) > 10 and named <= known, named - known
    own = set(fields) - {f.name for f in dataclasses.fields(TrainingArguments)}
    missing = {name for name in own if not re.search(rf"\b{name}\b", PAGE)}
    assert missing == set(), "say on docs/trainers.md what they do"
    rows = {name: value for name, value in re.findall(r"^\| `(\w+)` \| `?([^|`]+?)`? \|", PAGE, re.M) if name in own}
    assert {"max_length", "nonfinite", "preview_chars"} <= set(rows)
    for name, value in rows.items():
        assert str(fields[name].default) == value.strip('"') or float(value) == fields[name].default, name
