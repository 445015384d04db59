"""A crash while saving leaves the checkpoint before."""

import errno
import os
import shutil
import signal

import pytest

import scalemlo as mlo
from scalemlo.checkpoint import files, saving, state
from scalemlo.distributed.group import barrier
from tests.checkpoint.programs import differences, full, plain_problem
from tests.ranks import RankFailure, run_ranks


def killed_at(program, folder, call):
    """Die right before the n-th call that reaches the disk, while saving; False where there are fewer."""

    def body(rank, world_size):
        count = 0

        def counted(original):
            def wrapper(*args, **kwargs):
                nonlocal count
                count += 1
                if count == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return wrapper

        for name in ("fsync", "rename", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        program.run(1, progress=False, checkpoint=mlo.Checkpointing(folder, every=1, save_total_limit=1))

    try:
        run_ranks(body, 1, init_process_group=False)
    except RankFailure as failure:
        assert failure.kind == "died"
        return True
    return False


def test_killed_at_any_point_of_a_save(tmp_path):
    program = plain_problem("single")
    program.run(1, progress=False)
    program.save(tmp_path / "first")
    before = full(program)
    later = plain_problem("single")
    later.run(2, progress=False)
    after, num_old, call = full(later), 0, 0
    while True:
        call += 1
        folder = tmp_path / str(call)
        shutil.copytree(tmp_path / "first", folder)
        died = killed_at(program, folder, call)
        again = plain_problem("single")
        path = again.load(folder)
        is_old = path.name == "step-000001"
        num_old += is_old
        assert differences(before if is_old else after, full(again)) == []
        again.run(3, progress=False, checkpoint=mlo.Checkpointing(folder, save_total_limit=1), resume=True)
        assert os.listdir(folder) == ["step-000003"]  # what was left over is gone
        if not died:
            break
    assert num_old >= 8 and call - num_old >= 8  # both sides of the rename were tried


def test_one_rank_dies_while_writing(tmp_path):
    def body(rank, world_size):
        program = plain_problem("fsdp")
        program.run(1, progress=False)
        program.save(tmp_path)
        program.run(1, progress=False)
        if rank == 1:
            state.own = lambda program: os._exit(3)
        program.save(tmp_path)

    with pytest.raises(RankFailure):
        run_ranks(body, 2)
    assert plain_saved(tmp_path) == 1


def test_one_rank_cannot_write(tmp_path):
    def body(rank, world_size):
        program = plain_problem("ddp")
        program.run(1, progress=False)
        program.save(tmp_path)
        program.run(1, progress=False)
        if rank == 1:

            def refuse(program):
                raise OSError("no space left")

            state.own = refuse
        with pytest.raises((ValueError, OSError), match="no space left"):
            program.save(tmp_path)

    run_ranks(body, 2)
    assert plain_saved(tmp_path) == 1


def plain_saved(folder):
    program = plain_problem("single")
    with pytest.warns(UserWarning, match=r"written by 2 rank\(s\), 1 are running"):
        program.load(folder)
    return program.num_steps


# ---- the disk is full ----------------------------------------------------------------------------------------------
class FullDisk:
    """Every write to a file of a checkpoint fails from the n-th on."""

    def __init__(self, monkeypatch, call):
        self.num_calls, self._call = 0, call
        original = files.Summed.__init__
        monkeypatch.setattr(files.Summed, "__init__", lambda summed, file: original(summed, _File(file, self)))

    def check(self):
        self.num_calls += 1
        if self.num_calls >= self._call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _File:
    def __init__(self, file, disk):
        self._file, self._disk = file, disk

    def write(self, content):
        self._disk.check()
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_disk_full_at_any_write(tmp_path, monkeypatch):
    program = plain_problem("single")
    program.run(1, progress=False)
    program.save(tmp_path)
    program.run(1, progress=False)
    with monkeypatch.context() as patch:
        count = FullDisk(patch, call=10**9)
        program.save(tmp_path / "count")
    calls = count.num_calls
    assert calls > 50
    for call in [*range(1, calls, 7), *range(calls - 4, calls + 1)]:
        with monkeypatch.context() as patch:
            FullDisk(patch, call)
            message = r"writing .*step-000002 failed: .*\d+ bytes, \d+ are free .*There is an older.*step-000001"
            with pytest.raises(ValueError, match=message) as failure:
                program.save(tmp_path)
        assert "No space left on device" in str(failure.value)
        assert sorted(os.listdir(tmp_path)) == ["count", "step-000001"]
    plain_problem("single").load(tmp_path)
    assert program.save(tmp_path).name == "step-000002"


def test_disk_full_on_one_rank(tmp_path, monkeypatch):
    def body(rank, world_size):
        program = plain_problem("fsdp")
        program.run(1, progress=False)
        program.save(tmp_path)
        program.run(1, progress=False)
        for asynchronous in (False, True):
            checkpoint = mlo.Checkpointing(tmp_path, asynchronous=asynchronous)
            with monkeypatch.context() as patch:
                if rank == 1:
                    FullDisk(patch, call=3)
                with pytest.raises(ValueError, match="writing .*step-000002 failed: .*There is an older"):
                    with saving(checkpoint) as save:
                        save(program.iteration)
            barrier()
            assert os.listdir(tmp_path) == ["step-000001"]
            barrier()

    run_ranks(body, 2)
    assert plain_saved(tmp_path) == 1
