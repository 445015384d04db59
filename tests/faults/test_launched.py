"""The command under torchrun, killed, hung or taken away in a phase: it ends soon, whole, and goes on bit for bit."""

import importlib.util

import pytest

from tests.faults.launched import ENGINES, OPTIONS, PHASES, RESUME, Fault, checkpoints, finish, launch, learnt
from tests.tiny_recipe import write_recipe

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]
END_SECONDS = 60  # for the launcher, from the fault on; some seconds where the machine is idle


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def uninterrupted(recipe):
    """What a run with an engine learns where nothing happens to it."""
    found = {}

    def of(engine):
        if engine not in found:
            out = recipe / f"{engine}-whole"
            finish(recipe, out, ENGINES[engine], *OPTIONS)
            found[engine] = learnt(out)
        return found[engine]

    return of


def check_ended(outcome):
    assert outcome.status != 0
    assert outcome.orphans == []
    assert outcome.seconds_to_end < END_SECONDS, outcome.output[-3000:]


def test_killed_then_taken_away_then_done(recipe, uninterrupted):
    """One run in three launches: the first loses a rank inside a solve, the second gets a scheduler's SIGTERM."""
    out = recipe / "chain"
    options = [ENGINES["fsdp"], *OPTIONS]
    killed = launch(recipe, out, *options, fault=Fault("kill", "finetune: solve", 3))
    check_ended(killed)
    assert checkpoints(out) == ["step-000001", "step-000002"]
    assert "on rank 0, in 'finetune: solve' of outer step 3" in killed.output  # the one that was left says where

    taken = launch(recipe, out, *options, RESUME, fault=Fault("terminate_launcher", "finetune: solve", 3))
    check_ended(taken)
    assert "SIGKILL" not in taken.output  # all ended by themselves, in the time they were given
    assert checkpoints(out) == ["step-000001", "step-000002", "step-000003"]  # of the iteration in hand

    finish(recipe, out, *options, RESUME)
    assert learnt(out) == uninterrupted("fsdp")


@pytest.mark.full
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_in_each_phase(recipe, uninterrupted, engine, phase):
    if engine == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    out, options = recipe / f"{engine}-{phase}", [ENGINES[engine], *OPTIONS]
    rank = 0 if PHASES[phase] == "rename" else 1
    check_ended(launch(recipe, out, *options, fault=Fault("kill", PHASES[phase], 3, rank)))
    left_over = ["step-000003.tmp"] if PHASES[phase] == "rename" else []
    assert checkpoints(out) == ["step-000001", "step-000002", *left_over]
    finish(recipe, out, *options, RESUME)
    assert learnt(out) == uninterrupted(engine)


@pytest.mark.full
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_rank_that_hangs(recipe, engine):
    fault = Fault("hang", "finetune: gradient", 2, phase_timeout_seconds=8.0)
    hung = launch(recipe, recipe / f"{engine}-hung", ENGINES[engine], *OPTIONS, fault=fault)
    check_ended(hung)
    for rank in (0, 1):
        assert f"scalemlo watchdog, rank {rank}: " in hung.output
        assert f"rank {rank} ends with status 124" in hung.output


@pytest.mark.full
def test_an_error_of_one_rank(recipe):
    fault = Fault("fail", "finetune: gradient", 2)
    failed = launch(recipe, recipe / "failed", ENGINES["ddp"], *OPTIONS, fault=fault)
    check_ended(failed)
    assert "a fault of this rank alone" in failed.output
