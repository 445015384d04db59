"""The command line end to end on a tiny model and made data: one process, two ranks, wrong input, Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.utils.other import get_free_port
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_recipe import ENVIRONMENT, TORCHRUN, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("cli"))


def scalemlo(folder, *arguments, launcher=(), config="run.yaml", **options):
    flag = "--module" if launcher == DEEPSPEED else "-m"
    command = [*(launcher or [sys.executable]), flag, "scalemlo", "train", str(folder / config), *arguments]
    environment = os.environ | ENVIRONMENT
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, **options)


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file"]
LAUNCHED = ["--num-processes", "2", "--launch"]
DEEPSPEED = [
    *(sys.executable, "-m", "deepspeed.launcher.runner"),
    *("--num_gpus", "2", "--master_port", str(get_free_port())),
]


def trajectory(folder):
    """Everything a run learned: losses and norms per step, and the weights of the examples."""
    weights = pd.read_csv(folder / "weights.csv").sort_values("example_id")
    histories = [pd.read_csv(folder / run / "history.csv") for run in ("reweighted", "plain")]
    return np.concatenate([weights["weight"], *(h.to_numpy().ravel() for h in histories)])


@pytest.mark.launch
def test_one_process_reports_everything_and_two_ranks_follow_it(folder):
    done = scalemlo(folder)
    assert done.returncode == 0, done.stderr
    run = folder / "run"
    for word in ("pretrained", "plain fine-tune", "reweighted", "AUROC", "gradient and mixed partial", "peak MiB"):
        assert word in done.stdout
    assert "rater=" in done.stderr and "finetune=" in done.stderr  # one bar with a loss per level
    assert (run / "report.png").read_bytes()[:4] == b"\x89PNG"
    frame = pd.read_parquet(run / "weights.parquet")
    assert len(frame) == 48 and frame["corrupted"].sum() == 24 and frame["weight"].std() > 1e-3

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapted = PeftModel.from_pretrained(model, run / "reweighted")
    assert any(p.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
    AutoTokenizer.from_pretrained(run / "reweighted")

    expected = trajectory(run)
    for launcher, arguments, engine in (
        (TORCHRUN, ["engine=fsdp"], "FSDP"),
        ([*ACCELERATE, "launch/zero3.yaml"], [], "DeepSpeed"),
        ([], [*LAUNCHED, "ddp"], "DDP"),
    ):
        other = folder / engine
        done = scalemlo(folder, *arguments, f"output_dir={other}", "num_processes=2", launcher=launcher)
        assert done.returncode == 0, done.stderr
        assert f"{engine}(dtype='fp32'" in done.stdout and "on 2 process(es)" in done.stdout
        np.testing.assert_allclose(trajectory(other), expected, rtol=2e-4, atol=2e-5)
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), other / "reweighted")


@pytest.mark.full
@pytest.mark.launch
@pytest.mark.parametrize(
    "launcher, arguments",
    [
        ([*ACCELERATE, "launch/fsdp.yaml"], ["engine.units=[LlamaDecoderLayer]"]),
        ([], [*LAUNCHED, "zero1"]),
        ([], [*LAUNCHED, "zero2"]),
        ([], [*LAUNCHED, "zero3_offload"]),
        (DEEPSPEED, ["engine=zero3"]),
    ],
    ids=["accelerate fsdp", "zero1", "zero2", "zero3_offload", "deepspeed"],
)
def test_every_launcher_gives_one_trajectory(folder, launcher, arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    one, two = tmp_path / "one", tmp_path / "two"
    assert scalemlo(folder, f"output_dir={one}", "train.steps=2").returncode == 0
    done = scalemlo(folder, *arguments, f"output_dir={two}", "train.steps=2", "num_processes=2", launcher=launcher)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(trajectory(two), trajectory(one), rtol=2e-4, atol=2e-5)


@pytest.mark.launch
def test_a_run_replays_from_what_it_wrote(folder):
    first, second = folder / "first", folder / "second"
    assert scalemlo(folder, "train.steps=2", f"output_dir={first}").returncode == 0
    again = scalemlo(folder, f"output_dir={second}", config="first/run.yaml")
    assert again.returncode == 0, again.stderr
    np.testing.assert_array_equal(trajectory(first), trajectory(second))


@pytest.mark.launch
def test_full_fine_tuning_saves_a_model_under_fsdp(folder):
    out = folder / "full"
    done = scalemlo(folder, "model.lora=null", "engine=fsdp", "train.steps=1", f"output_dir={out}", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    loaded, info = AutoModelForCausalLM.from_pretrained(out / "reweighted", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert any(not torch.equal(t, before[n]) for n, t in loaded.state_dict().items())


@pytest.mark.launch
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ctrl_c_leaves_adapter_and_table(folder, num_ranks):
    out = folder / f"interrupted-{num_ranks}"
    launch = [*LAUNCHED, "fsdp"] if num_ranks == 2 else []
    overrides = ["train.steps=100000", f"output_dir={out}"]
    command = [sys.executable, "-m", "scalemlo", "train", str(folder / "run.yaml"), *launch, *overrides]
    environment = os.environ | ENVIRONMENT
    log = folder / f"interrupted-{num_ranks}.log"
    with open(log, "w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 200
        while "finetune=" not in log.read_text() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        stdout, _ = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    stderr = log.read_text()
    assert process.returncode == 130
    assert "not run" in stdout and "reweighted" in stdout, stderr
    assert len(pd.read_csv(out / "weights.csv")) == 48
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), out / "reweighted")


@pytest.mark.launch
def test_a_run_goes_on_from_its_checkpoint(folder):
    """Bit for bit the run that was not interrupted; its last checkpoint is taken away to make it one that was."""
    whole, resumed = folder / "whole", folder / "resumed"
    options = ["train.save_every=2", "train.save_total_limit=9"]
    for out in (whole, resumed):
        done = scalemlo(folder, f"output_dir={out}", *options)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(resumed / "checkpoints/step-000004")
    done = scalemlo(folder, f"output_dir={resumed}", *options, "train.resume=true")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (resumed / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert np.array_equal(trajectory(resumed), trajectory(whole))
    again = scalemlo(folder, f"output_dir={folder}/nothing", "train.resume=true")
    assert again.returncode == 2 and "there is no checkpoint" in again.stderr


@pytest.mark.launch
def test_check_prints_a_verdict_and_draws(folder, capsys, monkeypatch):
    from scalemlo.cli.main import main

    monkeypatch.chdir(folder)
    command = ["check", str(folder / "run.yaml"), f"output_dir={folder}/checked", "hypergradient.type=sama"]
    assert main([*command, "--warm-up", "2"]) == 0
    out = capsys.readouterr().out
    words = "Two ways to the same number", "mixed partial by rater", "* SAMA()", "Unrolled()", "Derivatives are right"
    for word in words:
        assert word in out, out
    found = json.loads((folder / "checked/check.json").read_text())
    assert found["passed"] and len(found["comparisons"]) == 7
    own = next(c for c in found["comparisons"] if c["is_configured"])
    assert own["estimator"] == "SAMA()" and -1 <= own["cosine"] <= 1
    assert (folder / "checked/check.png").stat().st_size > 10_000


WRONG = {
    "unknown key": (["train.stepz=3"], "train.stepz: unknown key. Did you mean 'steps'"),
    "wrong type": (["train.steps=many"], "train.steps"),
    "out of range": (["finetune.learning_rate=-1"], "learning_rate=-1"),
    "unknown estimator": (["hypergradient.type=newton"], "'newton'"),
    "unknown key of an estimator": (
        ["hypergradient.type=neumann", "hypergradient.num_term=3"],
        "hypergradient.num_term: unknown key. Did you mean 'num_terms'",
    ),
    "an estimator's value out of range": (
        ["hypergradient.type=neumann", "hypergradient.num_terms=0"],
        "num_terms=0 must be an integer of at least 1",
    ),
    "unknown recipe": (["recipe=reweigh"], "recipes are"),
    "no value": (["steps"], "key=value"),
    "too few rows": (["data.num_train=1000"], "num_train (1000)"),
    "another number of processes": (["num_processes=2"], "1 process(es) are running"),
    "a batch larger than the data": (["train.batch_size=64"], "data is empty"),
    "micro-batches normalised one by one": (
        ["train.gradient_accumulation_steps=8", "train.batch_size=1"],
        "Use weight_normalization=dataset",
    ),
    "fp16 on a CPU": (["engine.dtype=fp16"], "needs a GPU"),
}


@pytest.mark.launch
@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_line(folder, case, capsys, monkeypatch):
    from scalemlo.cli.main import main

    overrides, message = WRONG[case]
    monkeypatch.chdir(folder)
    assert main(["train", str(folder / "run.yaml"), f"output_dir={folder}/wrong", *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_accelerate_that_starts_one_process_is_noticed(folder, monkeypatch, capsys):
    from scalemlo.cli.main import main

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what `accelerate launch --num_processes 2` sets on a CPU
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["train", str(folder / "run.yaml")]) == 2
    assert "started one" in capsys.readouterr().err
