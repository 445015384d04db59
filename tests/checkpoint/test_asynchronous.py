"""Checkpoints that a thread writes while the run goes on."""

import os
import signal
import threading

import pytest

import scalemlo as mlo
from scalemlo.checkpoint import complete_checkpoints, vectors
from scalemlo.checkpoint.files import read_manifest
from tests.checkpoint.programs import build, differences, full, plain_problem, start_random
from tests.ranks import RankFailure, run_ranks


def files_of(path):
    """Sums of all files but of those that hold times, or the time of saving."""
    files = read_manifest(path)["files"]
    return {name: entry for name, entry in files.items() if name not in ("history.json", ".metadata")}


def compare(engine, folder):
    for asynchronous in (False, True):
        start_random()
        program = build(engine)
        checkpoint = mlo.Checkpointing(folder / str(asynchronous), every=1, asynchronous=asynchronous)
        program.run(3, progress=False, checkpoint=checkpoint)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("saving")]
    paths = [complete_checkpoints(folder / name) for name in ("False", "True")]
    assert len(paths[0]) == len(paths[1]) == 3
    for synchronous, other in zip(*paths, strict=True):  # the run went on and changed the weights meanwhile
        assert files_of(synchronous) == files_of(other)


def test_bits_are_those_of_a_synchronous_save(tmp_path):
    compare("single", tmp_path / "one")
    run_ranks(lambda rank, world_size: compare("fsdp", tmp_path / "two"), 2)


def test_a_failure_is_raised_at_the_next_save_and_at_the_end(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    for every, last in ((1, 2), (5, 1)):  # at the next one; at the end of the run
        program = plain_problem("single")
        with monkeypatch.context() as patch:
            patch.setattr(vectors._Writer, "write_data", refuse)
            with pytest.raises(ValueError, match="writing .*step-00000. failed: .*No space left"):
                checkpoint = mlo.Checkpointing(tmp_path / str(every), every=every, asynchronous=True)
                program.run(3 if every == 1 else 1, progress=False, checkpoint=checkpoint)
        assert program.num_steps == last
        assert os.listdir(tmp_path / str(every)) == []


def test_killed_while_the_thread_writes(tmp_path):
    program = plain_problem("single")
    program.run(1, progress=False)
    program.save(tmp_path)
    before = full(program)

    def body(rank, world_size):
        vectors._Writer.finish = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        program.run(3, progress=False, checkpoint=mlo.Checkpointing(tmp_path, every=1, asynchronous=True))

    with pytest.raises(RankFailure):
        run_ranks(body, 1, init_process_group=False)
    assert sorted(os.listdir(tmp_path)) == ["step-000001", "step-000002.tmp"]
    again = plain_problem("single")
    again.load(tmp_path)
    assert differences(before, full(again)) == []
