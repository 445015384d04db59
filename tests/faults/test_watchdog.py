"""A rank that hangs or fails is named by every rank, with level, phase and step."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

import scalemlo as mlo
from scalemlo.distributed.group import rank
from scalemlo.distributed.watchdog import EXIT_STATUS, Watchdog, _ranges
from tests.faults.faulty import install
from tests.faults.launched import Fault
from tests.problems import Problem
from tests.ranks import RankFailure, run_ranks


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_the_time_must_be_positive(seconds):
    with pytest.raises(ValueError, match=r"phase_timeout_seconds=.* must be positive; None waits for ever"):
        Watchdog(seconds)


def test_an_error_says_where_it_came_up():
    watchdog = Watchdog(None)
    with pytest.raises(RuntimeError) as caught, watchdog.phase(3, "low: solve"), watchdog.phase(3, "low: gradient"):
        raise RuntimeError("Connection closed by peer")
    notes = ["on rank 0, in 'low: gradient' of outer step 3", "on rank 0, in 'low: solve' of outer step 3"]
    assert caught.value.__notes__ == notes


def test_one_process_has_nothing_to_watch():
    before = threading.active_count()
    with Watchdog(0.01).watching():
        assert threading.active_count() == before
        time.sleep(0.1)


def test_ranges_of_ranks():
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert _ranges([4]) == "4"


def run_with(fault, folder):
    """Two outer steps as a rehearsal, for what is slow once, and two with the fault in them."""
    for name, to_install in (("rehearsal", None), ("run", fault.__dict__)):
        install(to_install)
        program = Problem().program(mlo.Neumann(num_terms=2, step_size=0.1), mlo.FSDP())
        program.run(2, progress=False, checkpoint=mlo.Checkpointing(folder / name, every=1))


@pytest.mark.parametrize(
    ("phase", "waits_in"),
    [("finetune: solve", "finetune: solve"), pytest.param("rename", "save checkpoint", marks=pytest.mark.full)],
)
def test_a_rank_that_hangs_is_reported_by_all(phase, waits_in, tmp_path, capfd):
    hung = 0 if phase == "rename" else 1

    def body(rank, world_size):
        run_with(Fault("hang", phase, 2, hung, phase_timeout_seconds=4.0), tmp_path)

    start = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        run_ranks(body, 2)
    assert caught.value.kind == "died" and f"exit code {EXIT_STATUS}" in str(caught.value)
    assert time.monotonic() - start < 60
    said = capfd.readouterr().err
    for reporter in (0, 1):
        assert f"scalemlo watchdog, rank {reporter}: " in said
        assert f"stack of rank {reporter}, innermost call last" in said
    where = {line.split(":")[0].strip(): line for line in said.splitlines() if line.startswith("  rank ")}
    assert " in hang (" in where[f"rank {hung}"] and f"in {waits_in!r} of outer step 2" in where[f"rank {hung}"]
    assert "/torch/distributed/" in where[f"rank {1 - hung}"]


def test_a_phase_that_ends_in_time_is_let_be():
    """Longer in all than the time-out, and many runs in one process."""

    def body(rank, world_size):
        program = Problem().program(mlo.Identity(), mlo.DDP())
        program.run(1, progress=False)  # what is slow once
        program.iteration.watchdog = program.iteration.gradients._watchdog = Watchdog(3.0)
        for _ in range(2):
            program.run(2, progress=False, callbacks=[lambda program, record: time.sleep(1)])
        return program.num_steps, [t.name for t in threading.enumerate() if "watchdog" in t.name]

    assert run_ranks(body, 2) == [(5, [])] * 2


def test_an_error_of_one_rank_ends_the_other(tmp_path):
    """Where the one that failed leaves, the one that waits for it is told, and says in which phase it waited."""

    def body(this, world_size):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            run_with(Fault("fail", "rater: direct gradient", 2), tmp_path)
        dist.destroy_process_group()  # as the end of the process does
        return type(caught.value).__name__, str(caught.value), caught.value.__notes__

    waited, failed = run_ranks(body, 2)
    assert failed[1] == "a fault of this rank alone"
    assert "on rank 1, in 'rater: direct gradient' of outer step 2" in failed[2]
    assert "Connection closed by peer" in waited[1], waited
    assert "on rank 0, in 'rater: direct gradient' of outer step 2" in waited[2]


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all():
    """What is raised and counted then is in ``test_bad_input``; here, that the ranks go on as equals."""

    class SpoiledOnce(mlo.Level):
        num_losses = 0

        def loss(self, batch, rater):
            self.num_losses += 1
            losses = (self.module(batch).squeeze(-1) - 1).square()
            losses = losses * (torch.nan if rank() == 1 and self.num_losses == 3 else 1.0)
            return mlo.weighted_mean(losses, rater(losses.detach().nan_to_num().unsqueeze(-1)).squeeze(-1))

    class Above(mlo.Level):
        def loss(self, batch, low):
            return low(batch).square().mean()

    def body(this, world_size):
        torch.manual_seed(0)
        batches = list(torch.randn(4, 6, 3))
        levels = [
            Above("rater", torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Sigmoid()), data=batches,
                  optimizer=lambda p: torch.optim.SGD(p, lr=0.1)),
            SpoiledOnce("low", torch.nn.Linear(3, 1), data=batches, optimizer=lambda p: torch.optim.Adam(p, lr=0.1),
                        unroll_steps=2, hypergradient=mlo.Identity(mixed="forward")),
        ]  # fmt: skip
        program = mlo.Program(levels, engine=mlo.DDP(), nonfinite="skip")
        program.run(5, progress=False)
        weights = {n: t.clone() for name in ("rater", "low") for n, t in program.trainers[name].weights().items()}
        return program.history.skipped, {n: t.num_steps for n, t in program.trainers.items()}, weights

    (skipped, steps, weights), others = run_ranks(body, 2)
    assert skipped == others[0] == {"low/loss": 1} and steps == others[1]
    assert steps["low"] == 9
    assert all(torch.equal(t, others[2][n]) and t.isfinite().all() for n, t in weights.items())
