"""Damaged and forged files are found and named, before anything is changed."""

import os
import pickle
import shutil

import pytest

from scalemlo.checkpoint.files import read_manifest, write_file, write_manifest
from scalemlo.distributed.group import barrier
from tests.checkpoint.programs import differences, full, plain_problem
from tests.ranks import run_ranks

FILES = ["__0_0.distcp", ".metadata", "shared.pt", "rank-00000.pt", "history.json", "extra.json"]


@pytest.mark.parametrize("file", FILES)
def test_truncated_files(file, tmp_path):
    program = plain_problem("single")
    for _ in range(2):
        program.run(1, progress=False)
        latest = program.save(tmp_path)
    size = (latest / file).stat().st_size
    os.truncate(latest / file, size - 1)
    message = rf"step-000002/{file} is damaged: it has {size - 1} bytes of {size}\. There is an older.*step-000001"
    before = full(program)
    with pytest.raises(ValueError, match=message):
        program.load(tmp_path)
    assert differences(before, full(program)) == []
    shutil.rmtree(tmp_path / "step-000001")
    (latest / file).unlink()
    with pytest.raises(ValueError, match=f"{file} is damaged: it is missing. There is no older checkpoint"):
        program.load(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")  # that of the forgery
def test_a_forged_checkpoint_runs_nothing(tmp_path):
    program = plain_problem("single")
    program.run(1, progress=False)
    path = program.save(tmp_path)

    class Forged:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for name in (".metadata", "shared.pt"):
        original = (path / name).read_bytes()
        _forge(path, name, pickle.dumps(Forged()))
        with pytest.raises(ValueError, match="does not belong|damaged"):
            program.load(path)
        assert not (tmp_path / "ran").exists()
        _forge(path, name, original)
    program.load(path)


def _forge(path, name, content):
    """Replace a file, and its entry in the manifest."""
    manifest = read_manifest(path)
    manifest["files"][name] = write_file(path / name, content)
    write_manifest(path, manifest)


def test_a_flipped_bit_is_found_in_every_file(tmp_path):
    program = plain_problem("single")
    for _ in range(2):
        program.run(1, progress=False)
        path = program.save(tmp_path)
    before = full(program)
    assert sorted(os.listdir(path)) == sorted([*FILES, "manifest.json"])
    for name in (*FILES, "manifest.json"):
        content = (path / name).read_bytes()
        for position in {0, len(content) // 3, len(content) - 1}:
            flipped = bytearray(content)
            flipped[position] ^= 1 << position % 8
            (path / name).write_bytes(flipped)
            with pytest.raises(ValueError, match=rf"step-000002/{name} is damaged.*There is an older.*step-000001"):
                program.load(tmp_path)
            assert differences(before, full(program)) == []
        (path / name).write_bytes(content)
    program.load(tmp_path)


def test_ranks_share_the_checks_and_all_fail(tmp_path):
    def body(rank, world_size):
        program = plain_problem("fsdp")
        program.run(1, progress=False)
        path = program.save(tmp_path)
        for name in ("__0_0.distcp", "__1_0.distcp", "rank-00001.pt"):
            barrier()
            if rank == 0:
                content = bytearray((path / name).read_bytes())
                content[len(content) // 2] ^= 4
                (path / name).write_bytes(content)
            barrier()
            with pytest.raises(ValueError, match=rf"{name} is damaged: its checksum"):
                program.load(tmp_path)
            barrier()
            if rank == 0:
                content[len(content) // 2] ^= 4
                (path / name).write_bytes(content)
        barrier()
        program.load(tmp_path)

    run_ranks(body, 2)
