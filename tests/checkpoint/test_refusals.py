"""What cannot be loaded or stored is refused in words."""

import json
from functools import partial

import pytest
import torch
from torch import nn

import scalemlo as mlo
from scalemlo.checkpoint import complete_checkpoints
from tests.checkpoint.programs import Net, build
from tests.problems import VOCAB


@pytest.fixture
def checkpoint(tmp_path):
    program = build()
    program.run(1, progress=False)
    return program.save(tmp_path)


class Deeper(Net):
    def __init__(self):
        super().__init__()
        self.tail = nn.Linear(9, 9)


class SinglePrecision(Net):
    def double(self):
        super().double()
        self.blocks.float()
        return self


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB + 1, 9)


def test_another_program(checkpoint):
    with pytest.raises(ValueError, match=r"'finetune', parameters: 'tail.weight' is absent there and \[9, 9\] float64"):
        build(net=Deeper).load(checkpoint)
    with pytest.raises(
        ValueError, match=r"parameters: 'embed.weight' is \[37, 9\] float64 there and \[38, 9\] float64"
    ):
        build(net=Wider).load(checkpoint)
    with pytest.raises(ValueError, match=r"its levels are \['rater', 'finetune'\], this program's are \['only'\]"):
        _alone().load(checkpoint)
    with pytest.raises(ValueError, match=r"'blocks.0.0.weight' is \[9, 9\] float64 there and \[9, 9\] float32 here"):
        build(net=SinglePrecision).load(checkpoint)
    with pytest.raises(ValueError, match="level 'finetune', optimizer: AdamW there and SGD here"):
        build(optimizer=partial(torch.optim.SGD, lr=0.1)).load(checkpoint)
    with pytest.raises(ValueError, match="scheduler: CosineAnnealingWarmRestarts there and None here"):
        build(scheduler=None).load(checkpoint)
    with pytest.raises(ValueError, match=r"parameter groups of \[4, 2\] parameters there and of \[6\] here"):
        build(optimizer=partial(torch.optim.AdamW, lr=0.1)).load(checkpoint)


def test_frozen_parameters_must_exist(checkpoint):
    program = build()
    parameters = dict(program.trainers["finetune"].engine.parameters)
    del parameters["head.bias"]
    program.trainers["finetune"].engine.parameters = parameters
    with pytest.raises(ValueError, match=r"frozen parameters: 'head.bias' is \[37\] float64 there and absent here"):
        program.load(checkpoint)


def test_another_estimator_starts_anew(checkpoint):
    program = build(estimator="nystrom")
    with pytest.warns(UserWarning, match=r"hypergradient=SOBA\(.*this program has Nystrom\(.*; it starts anew"):
        program.load(checkpoint)
    assert program.trainers["finetune"].memory == {}
    program.run(1, progress=False)
    program = build(estimator=mlo.SOBA(step_size=0.2))
    with pytest.warns(UserWarning, match=r"step_size=0.1.*step_size=0.2"):
        program.load(checkpoint)
    assert "s" in program.trainers["finetune"].memory["rater"]


def test_newer_format(checkpoint):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest |= {"format_version": 99, "scalemlo": "7.0"}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="format version 99, of scalemlo 7.0; this scalemlo reads up to 2. Upgrade"):
        build().load(checkpoint)


def test_nothing_to_load(tmp_path):
    program = build()
    with pytest.raises(ValueError, match="nowhere' is no folder"):
        program.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        program.load(tmp_path)
    (tmp_path / "step-000004.tmp").mkdir()
    (tmp_path / "step-000004.tmp/manifest.json").touch()
    for path in (tmp_path, tmp_path / "step-000004.tmp"):
        with pytest.raises(ValueError, match="no complete checkpoint in"):
            program.load(path)
    with pytest.raises(ValueError, match="resume=True needs checkpoint=Checkpointing"):
        program.run(1, progress=False, resume=True)


def test_folder_of_another_run(checkpoint):
    program = build()
    with pytest.raises(
        ValueError, match="has checkpoints up to step-000001, but the program is at step 0. Give resume"
    ):
        program.run(1, progress=False, checkpoint=mlo.Checkpointing(checkpoint.parent))
    program.run(1, progress=False)
    with pytest.raises(ValueError, match="step-000001 exists already"):
        program.save(checkpoint.parent)


@pytest.mark.parametrize("field, value", [("every", 0), ("every", 1.5), ("save_total_limit", 0), ("every", True)])
def test_checkpointing_fields(field, value):
    with pytest.raises(ValueError, match=f"Checkpointing: {field}={value!r} must be an integer of at least 1"):
        mlo.Checkpointing("somewhere", **{field: value})


def test_states_that_cannot_be_stored(tmp_path):
    class Factor:
        def __call__(self, step):
            return 1.0

    program = build(scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, [Factor(), Factor()]))
    program.run(1, progress=False)
    program.trainers["finetune"].scheduler.lr_lambdas[0].something = Factor()
    with pytest.raises(ValueError, match="cannot be stored.*LambdaLR with a callable object"):
        program.save(tmp_path)
    assert complete_checkpoints(tmp_path) == []


def test_extra_state_that_cannot_be_stored(tmp_path):
    program = build()
    program.extra_state["curve"] = torch.zeros(3)
    with pytest.raises(ValueError, match="extra_state cannot be stored: .*Tensor.* must be those of JSON"):
        program.save(tmp_path)
    assert complete_checkpoints(tmp_path) == []


def _alone():
    class Only(mlo.Level):
        def loss(self):
            return self.module().sum()

    return mlo.Program([Only("only", nn.Linear(1, 1), optimizer=partial(torch.optim.SGD, lr=0.1))])
