"""Plans of built programs, of programs within a memory budget, and beside a run."""

import json
import multiprocessing
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import scalemlo as mlo
from scalemlo.cli.main import main
from scalemlo.planning import planner
from scalemlo.planning.planner import plan
from tests.ranks import run_ranks
from tests.tiny_recipe import write_recipe

WIDTH = 64
ROOT = Path(__file__).parent.parent


class Above(mlo.Level):
    def loss(self, batch, below):
        return (below(batch) - self.module(batch)).square().mean()


class Below(mlo.Level):
    def loss(self, batch, above):
        return (self.module(batch) - above(batch)).square().mean()


def build(engine=mlo.Single, memory=None):
    def net():
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    data = [torch.randn(8, WIDTH)]
    adam = partial(torch.optim.Adam, lr=1e-3)
    levels = [
        Above("above", net(), data=data, optimizer=adam),
        Below("below", net(), data=data, optimizer=adam, hypergradient=mlo.Identity(mixed="forward")),
    ]
    return mlo.Program(levels, engine=engine(), memory=memory)


def counted(found):
    """What two plans of one program must have in common."""
    return [(p.name, p.persistent_bytes, p.flops, p.sent_bytes, p.moved_bytes) for p in found.phases]


@pytest.mark.parametrize("engine", [mlo.Single, mlo.DDP, mlo.FSDP])
def test_program_plans_itself_as_the_function_that_built_it_is_planned(engine):
    def itself(rank, world_size):
        program = build(engine)
        program.step()
        module = program.trainers["below"].engine.module
        before = [p.detach().clone() for p in module.parameters()]
        found = mlo.plan(program, device_memory="1GiB")
        same = all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
        program.step()  # goes on as if nothing had been
        return counted(found), found.peak_bytes, found.fits, same

    expected = plan(partial(build, engine), world_size=1, accelerator=False)
    phases, peak, fits, same = run_ranks(itself, 1)[0]
    assert phases == counted(expected) and fits and same
    assert peak == pytest.approx(expected.peak_bytes, rel=0.01)


def test_program_plans_itself_on_other_engines_and_ranks():
    def itself(rank, world_size):
        return counted(mlo.plan(build(), world_size=4, engine=mlo.FSDP()))

    expected = plan(partial(build, mlo.FSDP), world_size=4, accelerator=False)
    assert run_ranks(itself, 1) == [counted(expected)]
    with pytest.raises(ValueError, match="cannot be split evenly over 3 ranks"):
        mlo.plan(build(), world_size=3, engine=mlo.FSDP())


def test_a_plan_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(planner, "plan_build", lambda build, **options: time.sleep(600))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"no plan after timeout_seconds=0.5 and was ended. .*mlo.plan\(build"):
        mlo.plan(build(), timeout_seconds=0.5)
    assert time.perf_counter() - start < 60 and not multiprocessing.active_children()


def test_planned_moves_are_those_of_a_run_within_the_budget(tmp_path):
    memory = mlo.Memory(device="270KiB", disk=tmp_path)
    program = build(memory=memory)
    for _ in range(3):
        program.step()
    before = {name: stats.moved_bytes for name, stats in program.history.phases.items()}
    program.step()
    moved = {name: stats.moved_bytes - before[name] for name, stats in program.history.phases.items()}
    found = plan(partial(build, memory=memory), world_size=1, accelerator=False)
    planned: dict[str, float] = dict.fromkeys(moved, 0.0)
    for phase in found.phases:
        planned[phase.name] += phase.moved_bytes
    assert planned == moved and found.moved_bytes > 0
    assert found.peak_bytes <= memory.device_bytes < plan(build, world_size=1, accelerator=False).peak_bytes
    assert found.away_bytes > 0 and "optimizer of" in " ".join(map(str, found.move_rows))


def test_budget_below_one_phase_is_refused_in_a_plan_too(tmp_path):
    with pytest.raises(ValueError, match=r"weights of 'below'.*KiB|weights of 'above'.*KiB"):
        plan(partial(build, memory=mlo.Memory(device="20KiB", disk=tmp_path)), world_size=1, accelerator=False)


def test_run_prints_planned_beside_measured_peaks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    run = str(write_recipe(tmp_path) / "run.yaml")
    assert main(["train", run, "plan=true", "train.eval_every=0"]) == 0
    assert "planned MiB" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert found["program"] == "reweighted" and found["peak_by_phase"]["finetune/step"] > 0
    assert "planned MiB" in (tmp_path / "run" / "report.md").read_text()


# ---- the recipes of comparisons --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "overrides", "collectives"),
    [
        ("label_noise", ["data=digits", "engine=fsdp"], {"all-gather", "reduce-scatter"}),
        ("federated", [], {"all-reduce"}),
        *(
            pytest.param(name, [], {"all-reduce"}, marks=pytest.mark.full)
            for name in ("hyperparameters", "reward_domains", "few_shot", "prompted_segmentation")
        ),
    ],
)
def test_comparisons_are_planned_though_their_data_code_looks_at_values(tmp_path, name, overrides, collectives):
    command = [sys.executable, "-m", "scalemlo", "plan", str(ROOT / "configs" / f"{name}.yaml"), *overrides]
    command += ["--world-size", "2", "--device-memory", "1GiB", "--json", str(tmp_path / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["world_size"] == 2 and found["peak_bytes"] > found["persistent_bytes"] > 0
    assert collectives <= {kind for phase in found["phases"] for kind in phase["num_collectives"]}
    assert any(phase["name"].endswith("/step") for phase in found["phases"])
