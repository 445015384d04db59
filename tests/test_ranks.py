"""Running ranks, and the ways in which a rank can fail."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests import conftest, ranks
from tests.ranks import RankFailure, run_ranks

ROOT = Path(__file__).parents[1]


def add_ranks(rank, world_size, scale=1.0):
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    return scale * total


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_values_come_back_by_rank(world_size):
    values = run_ranks(add_ranks, world_size, 10.0)
    assert len(values) == world_size
    for value in values:
        torch.testing.assert_close(value, torch.tensor([10.0 * world_size * (world_size + 1) / 2]))


def test_keyword_arguments_and_closures():
    offset = 5
    assert run_ranks(lambda rank, world_size, factor: factor * rank + offset, factor=2) == [5, 7]


def test_spawned_ranks_give_the_same_values():
    scale = 10.0
    spawned = run_ranks(lambda rank, world_size: add_ranks(rank, world_size, scale), start_method="spawn")
    torch.testing.assert_close(spawned, run_ranks(add_ranks, 2, scale))


def test_ranks_see_what_torchrun_sets():
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    assert run_ranks(lambda rank, world_size: [os.environ[name] for name in names]) == [
        ["0", "2", "0", "2", "127.0.0.1", "1"],
        ["1", "2", "1", "2", "127.0.0.1", "1"],
    ]
    assert not set(names[:-1]) & os.environ.keys()


def test_the_body_may_make_its_own_process_group():
    def body(rank, world_size):
        assert not dist.is_initialized()
        dist.init_process_group("gloo")
        return add_ranks(rank, world_size).item()

    assert run_ranks(body, init_process_group=False) == [3.0, 3.0]


def test_ranks_share_one_seed():
    values = run_ranks(lambda rank, world_size: torch.rand(3))
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)


def test_large_values_come_back():
    values = run_ranks(lambda rank, world_size: torch.full((1 << 20,), float(rank)))
    assert [value.sum().item() for value in values] == [0.0, float(1 << 20)]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="autograd's device threads do not survive a fork")
def test_fork_after_the_parent_has_used_several_threads():
    """OpenMP's threads do not survive a fork; ranks work all the same because they use one thread."""
    torch.set_num_threads(2)
    try:
        matrix = torch.randn(512, 512, requires_grad=True)
        (matrix @ matrix).sum().backward()

        def body(rank, world_size):
            assert torch.get_num_threads() == 1
            weight = torch.randn(512, 512, requires_grad=True)
            (weight @ weight).relu().sum().backward()
            dist.all_reduce(weight.grad)
            return weight.grad.isfinite().all().item()

        assert run_ranks(body, timeout_seconds=60) == [True, True]
    finally:
        torch.set_num_threads(1)


def test_the_first_failing_rank_is_reported():
    def body(rank, world_size):
        if rank == 1:
            raise ValueError("rank one has no data")
        dist.barrier()  # waits for a rank that never comes

    start = time.monotonic()
    with pytest.raises(RankFailure, match="rank 1 of 2 raised") as failure:
        run_ranks(body)
    assert time.monotonic() - start < 30
    assert (failure.value.rank, failure.value.kind) == (1, "raised")
    assert "ValueError: rank one has no data" in str(failure.value)
    assert "in body" in str(failure.value) and "_rank_main" not in str(failure.value)


def test_a_failed_assertion_is_reported():
    def body(rank, world_size):
        pytest.fail("not what we wanted")

    with pytest.raises(RankFailure, match="not what we wanted"):
        run_ranks(body)


def test_a_skip_in_a_rank_skips_the_test():
    with pytest.raises(pytest.skip.Exception, match="no such package"):
        run_ranks(lambda rank, world_size: pytest.skip("no such package"))


def test_a_value_that_does_not_pickle_is_reported():
    with pytest.raises(RankFailure, match="(?i)pickle"):
        run_ranks(lambda rank, world_size: lambda: rank)


def test_a_dead_rank_is_reported():
    def body(rank, world_size):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        dist.barrier()

    with pytest.raises(RankFailure, match="rank 1 was killed by SIGSEGV") as failure:
        run_ranks(body)
    assert failure.value.kind == "died"
    assert "in body" in str(failure.value)


def test_a_hung_rank_is_killed_and_reported():
    def body(rank, world_size):
        if rank == 0:
            subprocess.Popen(["sleep", "60"])
            time.sleep(60)
        elif rank == 1:
            dist.barrier()
        return rank

    start = time.monotonic()
    with pytest.raises(RankFailure, match="2 of 3 ranks still ran after 2 s") as failure:
        run_ranks(body, 3, timeout_seconds=2)
    assert time.monotonic() - start < 20
    assert (failure.value.rank, failure.value.kind) == (0, "hung")
    assert "finished: rank 2" in str(failure.value)
    assert "barrier" in str(failure.value) and "in body" in str(failure.value)
    assert not [process for process in psutil.Process().children(recursive=True) if "sleep" in process.name()]


def test_a_rank_that_returns_early_does_not_hang_the_others(monkeypatch):
    monkeypatch.setattr(ranks, "LINGER_SECONDS", 0.2)

    def body(rank, world_size):
        if rank == 1:
            dist.barrier()

    start = time.monotonic()
    with pytest.raises(RankFailure, match="rank 1 of 2 raised"):
        run_ranks(body)
    assert time.monotonic() - start < 30


def test_ranks_may_take_different_times(monkeypatch):
    monkeypatch.setattr(ranks, "LINGER_SECONDS", 0.1)
    assert run_ranks(lambda rank, world_size: time.sleep(rank)) == [None, None]


def test_leaks_are_found_and_cleaned_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conftest, "PROCESS_EXIT_SECONDS", 0.1)
    before = conftest.Surroundings.look()
    assert conftest.clean_up(before) == []

    dist.init_process_group("gloo", init_method=f"file://{tmp_path.parent}/meet", rank=0, world_size=1)
    child = subprocess.Popen(["sleep", "60"])
    os.environ["SCALEMLO_LEAKED"] = "1"
    (tmp_path / "leaked.txt").write_text("")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    leaks = conftest.clean_up(before)

    expected = ["process group", "'sleep 60'", "leaked.txt", "SCALEMLO_LEAKED", "float64", "grad mode False"]
    assert len(leaks) == len(expected)
    for leak, words in zip(leaks, expected, strict=True):
        assert words in leak
    child.wait(1)
    (tmp_path / "leaked.txt").unlink()
    assert conftest.clean_up(before) == []


PROBE = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: sum {total.item():g}", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.launch
def test_a_launch_config_starts_two_ranks_on_a_cpu(tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one process only; the config file is what starts two."""
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch/ddp.yaml")]
    done = subprocess.run(
        [*launch, "--num_processes", "2", str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank} of 2: sum 3" in done.stdout
