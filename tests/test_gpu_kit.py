"""The proof kit (`make gpu`) in its shortest form on the CPU, and what it says where it cannot run."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

KIT = Path(__file__).parents[1] / "benchmarks" / "gpu"


@pytest.fixture
def kit(monkeypatch):
    """Imports a module of the kit; none stays."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(KIT))
    monkeypatch.syspath_prepend(str(KIT.parent))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(KIT) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(KIT / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


# ---- the whole, in short ---------------------------------------------------------------------------------------------
def test_the_quick_form(tmp_path):
    result = launch("--out", str(tmp_path), "--quick", "--minutes", "4")
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert all(isinstance(value, float) and math.isfinite(value) for value in figures.values())
    checks = [value for name, value in figures.items() if name.startswith("check/")]
    assert len(checks) == 7 and set(checks) == {1.0}
    assert f"{len(checks)} of {len(checks)} checks passed" in result.stdout
    assert 0 < figures["error/remat/fsdp/fp32"] < 1e-5
    assert figures["speed/tiny/ghost/over_plain"] > 1
    assert figures["speed/tiny/hvp_remat/over_plain"] > 1
    assert figures["plan/tiny/ghost/peak_gib"] > 0
    assert "skipped test_derivatives.py/test_hypergradients[ghost-fp16]: fp16 needs an accelerator" in result.stdout
    tables = (tmp_path / "gpu.md").read_text()
    for title in ("Checks", "Relative errors", "Llama tiny", "Planned and measured peaks", "Skipped", "Stages"):
        assert f"\n## {title}" in tables
    assert "## Failed" not in tables
    assert {p.stem for p in (tmp_path / "logs").glob("*.log")} == {"checks", "speed-tiny", "plan-tiny"}


# ---- stages ----------------------------------------------------------------------------------------------------------
def run_stages(kit, folder: Path, *stages, seconds: float = 60.0):
    """Status of the kit with these stages, and its results."""
    (folder / "logs").mkdir()
    results = kit("results").Results(folder, ["a machine"])
    run = kit("run")
    status = run.run(results, stages, run.environment_of("cpu", [str(KIT)]), time.monotonic() + seconds)
    return status, results


def says(kit, name: str, code: str, limit: float = 30.0, **options):
    return kit("stages").Stage(name, ["-c", f"from results import say; {code}"], limit, **options)


def test_a_check_that_fails_is_told_after_all_stages_have_run(kit, tmp_path, capsys):
    check = tmp_path / "test_wrong.py"
    check.write_text("def test_right():\n    pass\n\n\ndef test_wrong():\n    assert 1 + 1 == 3\n")
    own = kit("stages")._checks("checks", [str(check)], 60.0)
    status, results = run_stages(kit, tmp_path, own, says(kit, "later", "say(figures={'speed/a/b/batch': 2})"))
    assert status == 1
    assert results.figures["speed/a/b/batch"] == 2.0
    passed = {name: value for name, value in results.figures.items() if name.startswith("check/")}
    assert sorted(passed.values()) == [0.0, 1.0]
    assert "FAILED" in capsys.readouterr().out
    assert "assert (1 + 1) == 3" in (tmp_path / "gpu.md").read_text()


def test_what_a_stage_found_before_its_end_is_kept(kit, tmp_path):
    status, results = run_stages(
        kit,
        tmp_path,
        says(kit, "good", "say(figures={'check/good': 1})", is_check=True),
        says(kit, "endless", "say(figures={'a': 1}); import time; time.sleep(60)", limit=2.0),
        says(kit, "crash", "say(figures={'b': 2}); import os; os.kill(os.getpid(), 11)"),
        says(kit, "absent", "", obstacle="it is not installed"),
        says(kit, "background", "say(figures={'c': 3})", beside=True),
        says(kit, "late", "", least_seconds=1000.0),
    )
    assert status == 1
    assert json.loads((tmp_path / "gpu.json").read_text()) == {"check/good": 1.0, "a": 1.0, "b": 2.0, "c": 3.0}
    assert [what for what, _ in results.failed] == ["crash"]
    assert "SIGSEGV" in results.failed[0][1]
    assert {what for what, _ in results.skipped} == {"endless", "absent", "late"}


@pytest.mark.parametrize("options", [{"least_seconds": 1000.0}, {"limit": 1.0}])
def test_checks_that_had_no_time_have_not_passed(kit, tmp_path, options):
    status, results = run_stages(
        kit,
        tmp_path,
        says(kit, "first", "say(figures={'check/first': 1})", is_check=True),
        says(kit, "second", "import time; time.sleep(60)", is_check=True, **options),
    )
    assert status == 1
    assert [what for what, _ in results.failed] == ["second"]


# ---- bad input -------------------------------------------------------------------------------------------------------
def test_too_few_minutes(tmp_path):
    result = launch("--out", str(tmp_path / "out"), "--minutes", "0")
    assert result.returncode == 2
    assert "--minutes 0 is too small: the checks alone take about three minutes on a GPU" in result.stderr
    assert not (tmp_path / "out").exists()


def test_no_gpu(kit, tmp_path, monkeypatch):
    result = launch("--out", str(tmp_path), "--device", "abacus")
    assert result.returncode == 2
    assert "no 'abacus' to run on: torch" in result.stderr
    device = kit("device")
    monkeypatch.setattr(device, "accelerator", lambda: None)
    why = device.choose("auto")
    assert why.startswith("no GPU to run on: torch") and "finds the CPU alone here" in why
    assert "make gpu DEVICE=cpu" in why
    assert device.choose("cpu") == torch.device("cpu")


def test_a_size_that_does_not_fit_is_named(kit):
    sizes = kit("models").SIZES
    assert sizes["1B"].fitted(8 * 2**30) == "it needs 20.5 GiB at least, and 8.0 GiB are free"
    assert "GiB at least, and 23.0 GiB are free" in sizes["8B width"].fitted(23 * 2**30)
    assert 2 <= sizes["8B width"].fitted(139 * 2**30).shape["num_hidden_layers"] < 32
    assert sizes["135M"].fitted(23 * 2**30) is sizes["135M"]


def test_missing_packages(kit, tmp_path, monkeypatch):
    run = kit("run")
    monkeypatch.setattr(run, "NEEDED", ("torch", "no_such_package"))
    why = run.add_packages(tmp_path / "none", tmp_path / "target", [])
    assert why.startswith("not installed: no_such_package. Install them") and "pack.sh 3." in why


def test_pack_refuses_what_is_no_version(tmp_path):
    command = ["bash", str(KIT / "pack.sh"), "cp312", str(tmp_path / "wheels")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "PYTHON_VERSION must look like 3.12, not 'cp312'" in result.stderr
