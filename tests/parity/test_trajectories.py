"""One trajectory, whatever holds the model: the same YAML by the command line on every engine.

Compared are all losses, gradient and hypergradient norms of four outer steps (eight fine-tuning steps), and the weights
at the end, each relative to the largest entry of its kind. The fine-tune takes SGD with momentum: Adam divides by the
square root of small second moments, which blows rounding up to 1e-4 within these steps (`tests/test_cli.py` has it).

By default two engines run; ``--full`` runs all, ``--rotate N`` one more, another for each N.
"""

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from tests.tiny_recipe import ENVIRONMENT, write_recipe

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]

SGD = ["finetune.type=sgd", "finetune.momentum=0.9", "finetune.learning_rate=0.3"]
OVER_DATASET = ["train.weight_normalization=dataset"]
FP32 = 1e-5
BF16 = 0.05  # of losses and norms; a step of bf16 is 2^-8 = 0.004 of a value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def reference(folder):
    return train(folder, "single")


@pytest.fixture(scope="module")
def whole_batches(folder):
    return train(folder, "whole", *OVER_DATASET)


def train(folder, name, *overrides, launch=None):
    """What a run did: columns of its history, example weights, adapter weights."""
    out = folder / name
    launched = [] if launch is None else ["--launch", launch, "--num-processes", "2"]
    command = [sys.executable, "-m", "scalemlo", "train", str(folder / "run.yaml"), *launched, f"output_dir={out}"]
    done = subprocess.run(
        [*command, *SGD, *overrides], capture_output=True, text=True, timeout=600, env=os.environ | ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    history = pd.read_csv(out / "reweighted/history.csv").drop(columns="step")
    found = {column: history[column].to_numpy() for column in history}
    found["example weights"] = pd.read_csv(out / "weights.csv").sort_values("example_id")["weight"].to_numpy()
    return found | load_file(out / "reweighted/adapter_model.safetensors")


def differences(found, expected):
    """Largest difference of each kind, relative to its largest entry."""
    assert found.keys() == expected.keys()
    return {k: float(np.abs(found[k] - x).max() / np.abs(x).max()) for k, x in expected.items()}


def assert_equal(found, expected, limit):
    wrong = {k: error for k, error in differences(found, expected).items() if not error <= limit}
    assert not wrong, wrong


def test_the_weights_moved(reference):
    """Else everything below would hold of programs that do nothing."""
    assert reference["example weights"].std() > 1e-3
    assert reference["gradient_norm/rater"].min() > 0
    assert max(np.abs(t).max() for name, t in reference.items() if "lora_B" in name) > 1e-3


ENGINES = ["fsdp", "zero3", "ddp", "zero1", "zero2", "zero3_offload"]


@pytest.mark.parametrize("engine", [*ENGINES[:2], *(pytest.param(e, marks=pytest.mark.full) for e in ENGINES[2:])])
def test_two_ranks_follow_one_process(folder, reference, engine):
    assert_equal(train(folder, engine, launch=engine), reference, FP32)


@pytest.mark.full
@pytest.mark.parametrize("engine, batch_size, accumulation", [("single", 1, 8), ("fsdp", 2, 4), ("zero2", 2, 4)])
def test_accumulated_batches_are_one_batch(folder, whole_batches, engine, batch_size, accumulation):
    options = [f"train.batch_size={batch_size}", f"train.gradient_accumulation_steps={accumulation}", *OVER_DATASET]
    launch = None if engine == "single" else engine
    assert_equal(train(folder, f"accumulated-{engine}", *options, launch=launch), whole_batches, FP32)


@pytest.mark.full
@pytest.mark.parametrize("engine", ["fsdp", "zero1", "zero3"])
def test_a_resumed_run_is_the_uninterrupted_one(folder, engine):
    """Bit for bit; the last checkpoint is taken away, as if the run had been killed before it."""
    saving = ["train.save_every=2", "train.save_total_limit=9"]
    whole = train(folder, f"whole-{engine}", *saving, launch=engine)
    shutil.copytree(folder / f"whole-{engine}", folder / f"resumed-{engine}")
    shutil.rmtree(folder / f"resumed-{engine}/checkpoints/step-000004")
    resumed = train(folder, f"resumed-{engine}", *saving, "train.resume=true", launch=engine)
    assert set(differences(resumed, whole).values()) == {0.0}


@pytest.mark.full
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2", "zero3"])
def test_bf16_stays_in_its_band(folder, reference, engine):
    found = train(folder, f"bf16-{engine}", "engine.dtype=bf16", launch=engine)
    losses = {k: x for k, x in reference.items() if k.startswith(("loss/", "gradient_norm/"))}
    assert_equal({k: found[k] for k in losses}, losses, BF16)


@pytest.mark.full
@pytest.mark.parametrize("estimator", ["sama", "neumann", "conjugate_gradient", "unrolled"])
def test_other_estimators_on_zero3(folder, estimator):
    options = [f"hypergradient.type={estimator}"]
    expected = train(folder, f"single-{estimator}", *options)
    assert_equal(train(folder, f"zero3-{estimator}", *options, launch="zero3"), expected, FP32)
