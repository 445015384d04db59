"""Who chooses the engine: configuration, overrides, and the launcher's environment; and `--launch`."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from accelerate.commands.config.config_args import load_config_from_file

import scalemlo as mlo
from scalemlo.cli import launcher
from scalemlo.cli.main import main
from scalemlo.engines.deepspeed import jit_locks
from scalemlo.runs import config as cfg
from scalemlo.runs.launched import claims


@dataclass(kw_only=True)
class Recipe(cfg.RunConfig):
    steps: int = 1


def assert_replays(path, config):
    replayed = cfg.load(path, [], {"tiny": Recipe})
    assert replayed.provenance is not None and replace(replayed, provenance=None) == config


def load(folder, text, *overrides):
    path = folder / "run.yaml"
    path.write_text(f"recipe: tiny\noutput_dir: out\n{text}\n")
    return cfg.load(path, overrides, {"tiny": Recipe})


def refused(folder, text, *overrides):
    with pytest.raises(cfg.ConfigError) as error:
        load(folder, text, *overrides)
    return str(error.value)


FSDP = {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_MIXED_PRECISION": "no"}
ZERO3 = {
    "WORLD_SIZE": "2",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_MIXED_PRECISION": "no",
}
OFFLOAD = mlo.DeepSpeed(stage=3, offload_optimizer=True, offload_parameters=True)


@pytest.fixture
def launched(monkeypatch):
    def put(environment, **more):
        for key, value in (environment | more).items():
            monkeypatch.setenv(key, value)

    return put


# ---- the configuration alone -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, overrides, engine",
    [
        ("", [], mlo.Single()),
        ("engine: auto", ["engine.dtype=bf16"], mlo.Single(dtype="bf16")),
        ("engine: fsdp", ["engine.dtype=bf16"], mlo.FSDP(dtype="bf16")),
        ("engine: {type: fsdp, units: [Block], reshard_after_forward: false}", [],
         mlo.FSDP(units=["Block"], reshard_after_forward=False)),
        ("engine: {type: deepspeed, stage: 2, dtype: bf16}", [], mlo.DeepSpeed(stage=2, dtype="bf16")),
        ("engine: zero2", [], mlo.DeepSpeed(stage=2)),
        ("", ["engine=zero3_offload"], OFFLOAD),
        ("engine: {type: fsdp, units: [Block], dtype: bf16}", ["engine=zero1"], mlo.DeepSpeed(stage=1, dtype="bf16")),
        ("engine: {type: fsdp}", ["engine=ddp", "engine.bucket_cap_mib=5"], mlo.DDP(bucket_cap_mib=5.0)),
        ("engine: {type: zero3}", ["engine.offload_optimizer=true"], mlo.DeepSpeed(stage=3, offload_optimizer=True)),
    ],
)  # fmt: skip
def test_engines_in_yaml_and_overrides(tmp_path, text, overrides, engine):
    config = load(tmp_path, text, *overrides)
    assert config.engine.build() == engine
    cfg.save(config, tmp_path / "saved.yaml")
    assert_replays(tmp_path / "saved.yaml", config)


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("engine: {type: fsdp, stage: 3}", [], "engine.stage: unknown key. Keys of fsdp: ['type', 'dtype', 'units'"),
        ("engine: {stage: 3}", [], "engine.stage: unknown key. Keys of auto: ['type', 'dtype']"),
        ("engine: {type: deepspeed, stag: 3}", [], "engine.stag: unknown key. Did you mean 'stage'? Keys of deepspeed"),
        ("engine: {type: deepspeed, stage: 0}", [], "engine.stage"),
        ("engine: zero4", [], "type='zero4' is unknown; engines are ['auto', 'single'"),
        ("engine: zero2", ["engine.stage=3"], "type='zero2' is short for"),
        ("engine: {type: deepspeed, config: nothing.json}", [], "not a readable JSON file"),
    ],
)
def test_wrong_engines_are_named_with_the_other_problems(tmp_path, text, overrides, message):
    error = refused(tmp_path, text + "\nstepz: 3", *overrides)
    assert message in error and "stepz: unknown key. Did you mean 'steps'" in error and "2 problem(s)" in error


def test_a_saved_run_replays_without_the_file_that_its_engine_read(tmp_path):
    tuned = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}
    (tmp_path / "ds.json").write_text(json.dumps(tuned))
    config = load(tmp_path, f"engine: {{type: zero2, config: {tmp_path}/ds.json}}")
    assert config.engine.build() == mlo.DeepSpeed(stage=2, config=tuned)
    cfg.save(config, tmp_path / "saved.yaml")
    (tmp_path / "ds.json").unlink()
    assert cfg.load(tmp_path / "saved.yaml", [], {"tiny": Recipe}).engine.build() == config.engine.build()


# ---- the launcher's environment --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "environment, more, engine",
    [
        (FSDP, {}, mlo.FSDP()),
        (FSDP, {"ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_TRANSFORMER_CLS_TO_WRAP": "A, B"},
         mlo.FSDP(dtype="bf16", units=["A", "B"])),
        (FSDP, {"FSDP_RESHARD_AFTER_FORWARD": "false"}, mlo.FSDP(reshard_after_forward=False)),
        (FSDP, {"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, mlo.FSDP(reshard_after_forward=False)),
        (ZERO3, {}, mlo.DeepSpeed(stage=3)),
        (ZERO3, {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "ACCELERATE_GRADIENT_CLIPPING": "1.0"},
         mlo.DeepSpeed(stage=3, offload_optimizer=True, config={"gradient_clipping": 1.0})),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, {}, mlo.DeepSpeed(stage=2)),
    ],
)  # fmt: skip
def test_auto_takes_the_engine_from_the_launcher(tmp_path, launched, environment, more, engine):
    launched(environment, **more)
    config = load(tmp_path, "engine: auto")
    assert config.engine.build() == engine
    cfg.save(config, tmp_path / "saved.yaml")
    assert_replays(tmp_path / "saved.yaml", config)  # under the launcher


def test_a_deepspeed_file_of_the_launcher_is_used(tmp_path, launched):
    written = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}
    (tmp_path / "ds.json").write_text(json.dumps(written))
    launched({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"})
    launched({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")})
    assert load(tmp_path, "").engine.build() == mlo.DeepSpeed(stage=1, dtype="bf16", config=written)
    error = refused(tmp_path, "engine: {type: deepspeed, stage: 3}")
    assert "engine.stage is 3 in" in error and "1 by" in error and "ds.json (zero_optimization.stage)" in error


@pytest.mark.parametrize(
    "environment, more, overrides, messages",
    [
        (ZERO3, {}, ["engine=fsdp"], ["'fsdp' in the override engine=fsdp", "ACCELERATE_USE_DEEPSPEED=true"]),
        (FSDP, {}, ["engine=zero3"], ["'deepspeed' in the override engine=zero3", "ACCELERATE_USE_FSDP=true"]),
        (ZERO3, {}, ["engine=zero2"], ["engine.stage is 2 in the override engine=zero2", "ZERO_STAGE=3"]),
        (FSDP, {"ACCELERATE_MIXED_PRECISION": "bf16"}, ["engine.dtype=fp32"], ["MIXED_PRECISION=bf16", "engine=auto"]),
        (FSDP, {"FSDP_OFFLOAD_PARAMS": "true"}, [], ["FSDP_OFFLOAD_PARAMS=true", "launch/zero3_offload.yaml"]),
        (FSDP, {"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, [], ["STRATEGY=HYBRID_SHARD"]),
        (FSDP, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, [], ["ACCELERATE_DYNAMO_BACKEND=INDUCTOR"]),
        (FSDP, {"ACCELERATE_USE_DEEPSPEED": "true"}, [], ["are both set"]),
        (ZERO3, {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, [], ["PARAM_DEVICE=nvme", "none or cpu"]),
    ],
)
def test_contradictions_show_both_sides(tmp_path, launched, environment, more, overrides, messages):
    launched(environment, **more)
    error = refused(tmp_path, "", *overrides)
    assert all(message in error for message in messages), error


def test_what_the_launcher_leaves_open_is_the_runs(tmp_path, launched):
    launched({"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"})
    assert load(tmp_path, "engine: {type: fsdp, dtype: bf16}").engine.build() == mlo.FSDP(dtype="bf16")


def test_a_stale_environment_chooses_nothing(tmp_path, launched):
    launched({k: v for k, v in FSDP.items() if k != "WORLD_SIZE"})
    assert load(tmp_path, "").engine.build() == mlo.Single()


# ---- launch/ ---------------------------------------------------------------------------------------------------
def environment_of(path, monkeypatch):
    """What accelerate would export for a launch configuration."""
    from accelerate.commands import launch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parsed = launch.launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    options, defaults, _ = launch._validate_launch_command(parsed)
    if options.use_deepspeed:
        options.deepspeed_fields_from_accelerate_config = ""
        return launch.prepare_deepspeed_cmd_env(options)[1]
    return launch.prepare_multi_gpu_env(options)


def test_each_launch_configuration_gives_the_engine_of_its_name(tmp_path, monkeypatch):
    found = launcher.configurations()
    assert set(found) == {"ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"}
    for name, path in found.items():
        assert load_config_from_file(str(path)).num_processes == 8
        assert f"launch/{name}.yaml -m scalemlo" in path.read_text()
        asked = claims(environment_of(path, monkeypatch) | {"WORLD_SIZE": "8"})
        expected = {} if name == "ddp" else vars(load(tmp_path, "", f"engine={name}").engine)
        assert all(expected[key] == claim.value for key, claim in asked.items()), name
        assert set(asked) >= {"type", "stage"} & set(expected), name
        assert ("offload_parameters" in asked) == (name == "zero3_offload")


@pytest.mark.parametrize(
    "options, environment, message",
    [
        (["--launch", "zero9"], {}, "known are ['ddp', 'fsdp', 'zero1'"),
        (["--launch", "ddp", "--num-processes", "0"], {}, "must be at least 1"),
        (["--num-processes", "2"], {}, "has no effect without --launch"),
        (["--launch", "ddp"], {"RANK": "0", "WORLD_SIZE": "2"}, "a launcher started this process already (RANK, WOR"),
    ],
)
def test_launches_that_make_no_sense(options, environment, message, launched, capsys):
    launched(environment)
    assert main(["train", "run.yaml", *options]) == 2
    assert message in capsys.readouterr().err


def test_overrides_may_follow_options(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(launcher, "launch", lambda *arguments: seen.append(arguments) or 0)
    assert main(["--local_rank=1", "check", "a.yaml", "b=1", "--launch", "fsdp", "--warm-up", "2", "c=2"]) == 0
    assert seen == [("fsdp", None, ["check", "a.yaml", "b=1", "c=2", "--warm-up", "2"])]
    for wrong in (["train", "a.yaml", "--lunch", "fsdp"], ["assets", "more"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "unrecognized arguments" in capsys.readouterr().err


SLEEPER = """
import pathlib, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path(sys.argv[1]).touch()
time.sleep(float(sys.argv[2]))
sys.exit(7)
"""


@pytest.mark.parametrize("seconds, stop, status", [(0, None, 7), (600, signal.SIGTERM, 143)])
def test_nothing_is_left_when_the_launcher_ends(tmp_path, seconds, stop, status):
    def interrupt():
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), stop)

    thread = threading.Thread(target=interrupt if stop else int)
    thread.start()
    # The fixture `leaves_nothing_behind` sees only descendants; an orphan must be looked for.
    assert launcher._run([sys.executable, "-c", SLEEPER, str(tmp_path / "started"), str(seconds)]) == status
    thread.join()
    sleepers = [
        p for p in psutil.process_iter(["cmdline"]) if "import time; time.sleep(600)" in (p.info["cmdline"] or [])
    ]
    assert psutil.wait_procs(sleepers, timeout=10)[1] == []


# ---- locks of the extension builder ----------------------------------------------------------------------------
def make_lock(folder, name, *, age_minutes):
    (folder / name).mkdir()
    (folder / name / "lock").touch()
    (folder / name / "adam.o").touch()
    long_ago = time.time() - 60 * age_minutes
    for path in (folder / name / "lock", folder / name / "adam.o", folder / name):
        os.utime(path, (long_ago, long_ago))
    return folder / name / "lock"


def test_left_over_locks_are_found_and_those_of_builds_are_not(tmp_path, monkeypatch):
    stale = make_lock(tmp_path, "cpu_adam", age_minutes=30)
    make_lock(tmp_path, "just_started", age_minutes=1)
    elsewhere = make_lock(tmp_path, "on_another_machine", age_minutes=30)
    (elsewhere.parent / "adam.o").touch()
    slow = make_lock(tmp_path, "one_slow_file", age_minutes=30)
    (tmp_path / "no_lock").mkdir()
    compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=slow.parent)
    try:
        assert jit_locks.stale_locks(tmp_path) == [stale]
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        with pytest.warns(RuntimeWarning, match=f"rm {stale}") as warned:
            jit_locks.warn_of_stale_locks()
        assert len(warned) == 1
    finally:
        compiler.kill()
        compiler.wait()
    assert jit_locks.stale_locks(tmp_path) == [stale, slow]


def test_the_folder_is_the_one_that_torch_builds_in(monkeypatch, tmp_path):
    from torch.utils import cpp_extension

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    assert Path(cpp_extension._get_build_directory("x", verbose=False)).parent == jit_locks.extensions_folder()
    assert jit_locks.stale_locks(tmp_path / "nothing") == []
