"""Every engine and world size goes on from the checkpoint of every other."""

import gc
import importlib
from functools import partial

import pytest
import torch

from tests.checkpoint.programs import differences, full, plain_problem
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

# Sizes that no world size divides. DeepSpeed's masters are fp32; a large eps keeps rounding from growing.
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-2, betas=(0.8, 0.9), eps=1e-3)
problem = partial(plain_problem, dtype=torch.float32, lower_optimizer=OPTIMIZER)

WITHOUT_DEEPSPEED = {1: ["single", "fsdp"], 2: ["ddp", "fsdp"], 4: ["fsdp"]}
SOME = {1: ["single", "zero3"], 2: ["fsdp", "zero1", "zero3"], 4: ["zero2"]}
ALL = {
    1: ["single", "fsdp", "zero1", "zero2", "zero3"],
    2: ["ddp", "fsdp", "zero1", "zero2", "zero3"],
    4: ["ddp", "fsdp", "zero1", "zero2", "zero3"],
}


def saved(rank, world_size, folder, engines):
    gc.freeze()  # DeepSpeed collects garbage for every engine
    found = {}
    for engine in engines:
        program = problem(engine)
        program.run(3, progress=False)
        program.save(folder / f"{engine}-{world_size}")
        found[f"{engine}-{world_size}"] = full(program)
    return found


def loaded(rank, world_size, folder, engines, sources):
    gc.freeze()
    found = {}
    for engine in engines:
        program = problem(engine)  # one for all sources: a load leaves nothing of what was before
        at_load = {}
        for source in sources:
            program.load(folder / source)
            at_load[source] = full(program)
        history = program.run(2, progress=False)
        found[engine] = at_load, history.column("loss/rater"), full(program)
    return found


def check_matrix(tmp_path, configurations):
    written = {}
    for world_size, engines in configurations.items():
        written |= run_ranks(saved, world_size, tmp_path, engines, init_process_group=world_size > 1)[0]
    straight = problem("single")
    straight.run(5, progress=False)
    losses, weights = straight.history.column("loss/rater"), full(straight)
    for world_size, engines in configurations.items():
        arguments = (tmp_path, engines, list(written))
        found = run_ranks(loaded, world_size, *arguments, init_process_group=world_size > 1, timeout_seconds=600)[0]
        for engine, (at_load, losses_after, weights_after) in found.items():
            case = f"{engine} on {world_size}"
            assert differences(written, at_load) == [], case
            assert losses_after == pytest.approx(losses, rel=1e-5), case
            for key, value in weights.items():
                torch.testing.assert_close(weights_after[key], value, rtol=1e-4, atol=1e-6, msg=f"{case}: {key}")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "configurations",
    [SOME, pytest.param(WITHOUT_DEEPSPEED, marks=pytest.mark.full), pytest.param(ALL, marks=pytest.mark.full)],
    ids=["some", "without deepspeed", "all"],
)
def test_every_engine_and_world_size_loads_every_other(configurations, tmp_path):
    if configurations is not WITHOUT_DEEPSPEED:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'scalemlo[deepspeed]'")
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # once for all ranks, which are forked
    check_matrix(tmp_path, configurations)
