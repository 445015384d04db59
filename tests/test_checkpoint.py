"""Checkpoints: resume is bit-identical, other engines and world sizes load them, and a crash leaves the one before."""

import json
import os
import pickle
import random
import shutil
import signal
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

import scalemlo as mlo
from scalemlo import state
from scalemlo.checkpoint import complete_checkpoints
from scalemlo.data import BatchStream
from scalemlo.precision import LossScaler
from tests.problems import LENGTH, VOCAB, Finetune, Problem, Rate, weight_net
from tests.ranks import RankFailure, run_ranks

ENGINES = {"single": mlo.Single(), "ddp": mlo.DDP(), "fsdp": mlo.FSDP()}
WORLD_SIZES = {"single": 1, "ddp": 2, "fsdp": 2}
ESTIMATORS = {
    "soba": mlo.SOBA(step_size=0.1),
    "unrolled": mlo.Unrolled(),
    "nystrom": mlo.Nystrom(rank=3, damping=0.1, refresh_every=4),
    "penalty": mlo.Penalty(penalty=10.0, learning_rate=0.01),
    "forward_gradient": mlo.ForwardGradient(),
}


# ---- a program with everything that has a state ---------------------------------------------------------------------
class Tokens(Dataset):
    """Examples with an augmentation that draws from torch's, Python's and numpy's global generators."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        ids = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(i))
        ids[random.randrange(LENGTH)] = int(torch.randint(0, VOCAB, ()))
        ids[np.random.randint(LENGTH)] = 0
        return {"input_ids": ids}


class Net(nn.Module):
    """Dropout, odd sizes, a frozen parameter, and a buffer that differs between ranks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 9)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2))
        self.head = nn.Linear(9, VOCAB)
        self.head.bias.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def build(engine="single", estimator="soba", seed=0, net=Net, **changes):
    """Two levels; the lower one's optimizer has two groups, both have schedulers and shuffled loaders."""
    torch.manual_seed(seed)
    net, rater = net().double(), weight_net().double()
    decayed = [p for p in net.parameters() if p.requires_grad and p.dim() > 1]
    rest = [p for p in net.parameters() if p.requires_grad and p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=1e-2)
    options = dict(
        data=DataLoader(Tokens(), batch_size=4, shuffle=True),
        optimizer=optimizer,
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, T_0=5),
        unroll_steps=3,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        hypergradient=ESTIMATORS.get(estimator, estimator),
    )
    finetune = Finetune("finetune", net, **(options | changes))
    rate = Rate(
        "rater",
        rater,
        data=DataLoader(Tokens(), batch_size=4, shuffle=True),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        scheduler=partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2, 4]),
    )
    program = mlo.Program([rate, finetune], engine=ENGINES[engine], seed=5)
    program.trainers["finetune"].engine.module.seen.fill_(state.rank() + 1.0)
    return program


def start_random():
    random.seed(1 + state.rank())
    np.random.seed(2 + state.rank())
    torch.manual_seed(3 + state.rank())


def everything(program):
    """All the state of a rank: local tensors, numbers, history without times."""
    local = {k: (v.to_local() if isinstance(v, DTensor) else v).clone() for k, v in state.vectors(program).items()}
    history = (program.history.steps, program.history.skipped, program.history.solves)
    return {"vectors": local, "shared": state.shared(program), "own": state.own(program), "history": history}


def differences(a, b, path=""):
    """Where two states differ in a bit."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        found = [] if list(a) == list(b) else [f"{path}: {list(a)} {list(b)}"]
        return found + [d for key in a if key in b for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        found = [] if len(a) == len(b) else [f"{path}: {len(a)} {len(b)}"]
        return found + [d for i, (x, y) in enumerate(zip(a, b, strict=False)) for d in differences(x, y, f"{path}/{i}")]
    return [] if a == b and type(a) is type(b) else [f"{path}: {a} {b}"]


def full(program):
    """Whole vectors, equal on every rank."""
    return {
        k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in sorted(state.vectors(program).items())
    }


# ---- resume ----------------------------------------------------------------------------------------------------------
def resumed_and_not(rank, world_size, folder, engine, estimators):
    found = {}
    for estimator in estimators:
        start_random()
        straight = build(engine, estimator)
        straight.run(6, progress=False)

        start_random()
        first = build(engine, estimator)
        first.run(3, progress=False)
        at_save = everything(first)
        first.save(f"{folder}/{estimator}")
        torch.rand(5), random.random(), np.random.rand()
        second = build(engine, estimator, seed=17 + rank)  # other weights: all of them must come from the checkpoint
        second.trainers["finetune"].engine.module.head.bias.copy_(first.trainers["finetune"].engine.module.head.bias)
        second.load(f"{folder}/{estimator}")
        loaded = differences(at_save, everything(second))
        second.run(3, progress=False)
        moments = [k for k in state.vectors(second) if "/optimizer/exp_avg" in k]
        found[estimator] = (loaded, differences(everything(straight), everything(second)), len(moments))
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_is_bit_identical(engine, tmp_path):
    world_size = WORLD_SIZES[engine]
    estimators = list(ESTIMATORS) if engine == "single" else ["soba", "unrolled", "nystrom"]
    for found in run_ranks(
        resumed_and_not, world_size, tmp_path, engine, estimators, init_process_group=world_size > 1
    ):
        for estimator, (loaded, trained, num_moments) in found.items():
            assert loaded == [], estimator
            assert trained == [], estimator
            assert num_moments == 12  # exp_avg and exp_avg_sq of six parameters
    if engine == "fsdp":
        shards = list((tmp_path / "soba/step-000003").glob("__*.distcp"))
        assert len(shards) == 2  # each rank wrote its own


def test_run_writes_and_resumes(tmp_path):
    start_random()
    straight = build()
    straight.run(7, progress=False)

    start_random()
    checkpoint = mlo.Checkpointing(tmp_path, every=2, save_total_limit=2)
    build().run(5, progress=False, checkpoint=checkpoint)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000004", "step-000005"]
    program = build(seed=9)
    bias = straight.trainers["finetune"].engine.module.head.bias
    program.trainers["finetune"].engine.module.head.bias.copy_(bias)
    history = program.run(7, progress=False, checkpoint=checkpoint, resume=True)
    assert program.num_steps == len(history.steps) == 7
    assert differences(everything(straight), everything(program)) == []
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000006", "step-000007"]
    again = build()
    assert len(again.run(7, progress=False, checkpoint=checkpoint, resume=True).steps) == 7  # nothing is left to do
    earlier = build()
    earlier.run(7, progress=False, resume=tmp_path / "step-000006")
    assert [r["step"] for r in earlier.history.steps] == list(range(1, 8))


def test_run_writes_and_resumes_on_two_ranks(tmp_path):
    def body(rank, world_size):
        checkpoint = mlo.Checkpointing(tmp_path, every=1, save_total_limit=1)
        straight = plain_problem("fsdp")
        straight.run(3, progress=False, checkpoint=checkpoint)
        resumed = plain_problem("fsdp")
        resumed.run(4, progress=False, checkpoint=checkpoint, resume=True)
        straight.run(1, progress=False)
        assert differences(full(straight), full(resumed)) == []
        assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000004"]
        resumed.run(1, progress=False)
        trainer = resumed.trainers["finetune"]
        moments = trainer.optimizer.state[trainer.engine.parameters["head.weight"]]
        moments["rows"] = moments["exp_avg"][:, :3]
        with pytest.raises(ValueError, match=r"AdamW keeps 'rows' of shape \[37, 3\] for parameter 'head.weight'"):
            resumed.save(tmp_path)
        del moments["rows"]
        resumed.save(tmp_path)

    run_ranks(body, 2)


def test_state_of_another_shape_than_the_parameter(tmp_path):
    problem = Problem(lower_optimizer=partial(torch.optim.Adafactor, lr=1e-2))
    programs = [problem.program(mlo.SOBA(step_size=0.1), mlo.Single()) for _ in range(2)]
    programs[0].run(2, progress=False)
    programs[0].save(tmp_path)
    programs[1].load(tmp_path)
    for program in programs:
        program.run(2, progress=False)
    assert differences(everything(programs[0]), everything(programs[1])) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves(tmp_path, number):
    def interrupt(program, record):
        if record["step"] == 2:
            os.kill(os.getpid(), number)

    program = build()
    history = program.run(9, callbacks=[interrupt], progress=False, checkpoint=mlo.Checkpointing(tmp_path))
    assert history.interrupted
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000002"]
    resumed = build()
    resumed.load(tmp_path)
    assert resumed.num_steps == 2 and not resumed.history.interrupted


class Head(mlo.Level):
    def loss(self, batch, body):
        return mlo.mean(body(batch["input_ids"])[..., 0] ** 2)


class Body(mlo.Level):
    def loss(self, batch, head):
        return mlo.mean((self.module(batch["input_ids"]) ** 2).sum(-1))


def test_levels_that_share_a_module(tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        net, data = Net().double(), DataLoader(Tokens(), batch_size=4, shuffle=True)
        options = dict(data=data, optimizer=partial(torch.optim.Adam, lr=1e-2))
        head = Head("head", net, parameters="head.weight", **options)
        return mlo.Program([head, Body("body", net, parameters=["embed.*", "blocks.*"], **options)])

    program = make(0)
    program.run(2, progress=False)
    program.save(tmp_path)
    other = make(1)
    net = program.trainers["head"].engine.module
    other.trainers["head"].engine.module.head.bias.copy_(net.head.bias)
    other.load(tmp_path)
    at_load = differences(everything(program), everything(other))
    assert at_load == []
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in other.state_dict("head").items())


def test_loss_scales(tmp_path):
    program = build()
    program.trainers["finetune"].scaler = LossScaler(scale=8.0, num_good=3)
    program.save(tmp_path)
    other = build()
    other.load(tmp_path)  # in full precision there is nothing to scale
    assert other.trainers["finetune"].scaler == LossScaler(scale=1.0, enabled=False)
    other.trainers["finetune"].scaler = LossScaler()
    other.load(tmp_path)
    assert other.trainers["finetune"].scaler == LossScaler(scale=8.0, num_good=3)


# ---- other engines and world sizes ---------------------------------------------------------------------------------
def plain_problem(engine):
    return Problem().program(mlo.SOBA(step_size=0.1), ENGINES[engine])


def saved(rank, world_size, folder, engine):
    program = plain_problem(engine)
    program.run(3, progress=False)
    program.save(f"{folder}/{engine}{world_size}")
    return full(program)


def loaded_elsewhere(rank, world_size, folder, engine, sources):
    found = {}
    for source in sources:
        program = plain_problem(engine)
        warned = rank == 0 and int(source[-1]) != world_size
        with pytest.warns(UserWarning, match="was written by . rank.*random states") if warned else nullcontext():
            program.load(f"{folder}/{source}")
        at_load = full(program)
        history = program.run(2, progress=False)
        found[source] = at_load, history.column("loss/rater"), full(program)
    return found


CONFIGURATIONS = [("single", 1), ("fsdp", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4)]


def test_every_engine_and_world_size_loads_every_other(tmp_path):
    def run(body, engine, world_size, *args):
        return run_ranks(body, world_size, tmp_path, engine, *args, init_process_group=world_size > 1)[0]

    written = {f"{e}{w}": run(saved, e, w) for e, w in CONFIGURATIONS}
    straight = plain_problem("single")
    straight.run(5, progress=False)
    for engine, world_size in CONFIGURATIONS:
        for source, (at_load, losses, after) in (
            run(loaded_elsewhere, engine, world_size, list(written)) or {}
        ).items():
            assert differences(written[source], at_load) == [], (source, engine, world_size)
            assert losses == pytest.approx(straight.history.column("loss/rater"), rel=1e-10)
            for key, value in full(straight).items():
                torch.testing.assert_close(after[key], value, rtol=1e-9, atol=1e-12)


# ---- crashes -------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "shared.pt", "rank-00000.pt", "history.json"])
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
        forged = pickle.dumps(Forged())
        (path / name).write_bytes(forged)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = len(forged)
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="does not belong|damaged"):
            program.load(path)
        assert not (tmp_path / "ran").exists()
        (path / name).write_bytes(original)
        manifest["files"][name] = len(original)
        (path / "manifest.json").write_text(json.dumps(manifest))
    program.load(path)


# ---- refusals ------------------------------------------------------------------------------------------------------
@pytest.fixture
def checkpoint(tmp_path):
    program = build()
    program.run(1, progress=False)
    return program.save(tmp_path)


class Deeper(Net):
    def __init__(self):
        super().__init__()
        self.tail = nn.Linear(9, 9)


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
        program = build()
        program.trainers["finetune"].engine.module.blocks.float()
        program.load(checkpoint)
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
    with pytest.raises(ValueError, match="format version 99, of scalemlo 7.0; this scalemlo reads up to 1. Upgrade"):
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


def _alone():
    class Only(mlo.Level):
        def loss(self):
            return self.module().sum()

    return mlo.Program([Only("only", nn.Linear(1, 1), optimizer=partial(torch.optim.SGD, lr=0.1))])


# ---- positions in the data -----------------------------------------------------------------------------------------
class Numbers(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.tensor(i)


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(20))


class Stateful:
    """Keeps its position itself."""

    def __init__(self):
        self.at, self.num_given = 0, 0

    def __iter__(self):
        while self.at < 5:
            self.at += 1
            self.num_given += 1
            yield torch.tensor([self.at, self.at])
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


LOADERS = {
    "shuffled": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True),
    "generator": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "replacement": lambda: DataLoader(Numbers(), batch_size=4, sampler=RandomSampler(range(20), replacement=True)),
    "batch sampler": lambda: DataLoader(Numbers(), batch_sampler=BatchSampler(RandomSampler(range(20)), 4, True)),
    "workers": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=2),
    "iterable dataset": lambda: DataLoader(Streamed(), batch_size=4),
    "list": lambda: [torch.tensor([i, i]) for i in range(5)],
    "stateful": Stateful,
    "distributed": lambda: DataLoader(Numbers(), batch_size=4, sampler=DistributedSampler(Numbers(), 2, 0, seed=1)),
}


def stream(kind, seed=7):
    return BatchStream(LOADERS[kind](), level="low", device=torch.device("cpu"), seed=seed)


@pytest.mark.parametrize("kind", LOADERS)
def test_positions(kind):
    num = 4 if kind == "workers" else 17
    straight = stream(kind)
    states, batches = [straight.state_dict()], []
    for _ in range(num):
        batches.append(straight.next().tolist())
        states.append(straight.state_dict())
    for position in (0, 1, 3) if kind == "workers" else range(12):
        fresh = stream(kind, seed=99)
        fresh.next()
        fresh.load_state_dict(states[position])
        assert [fresh.next().tolist() for _ in range(num - position)] == batches[position:]
        assert differences(states[num], fresh.state_dict()) == []
    assert len({str(b) for b in batches}) > 3


def test_going_forward_loads_nothing():
    class Counted(Numbers):
        num_loaded = 0

        def __getitem__(self, i):
            Counted.num_loaded += 1
            return super().__getitem__(i)

    def make():
        loader = DataLoader(Counted(), batch_size=4, shuffle=True)
        return BatchStream(loader, level="low", device=torch.device("cpu"), seed=7)

    straight = make()
    for _ in range(4):
        straight.next()
    kept, Counted.num_loaded = straight.state_dict(), 0
    fresh = make()
    fresh.load_state_dict(kept)
    assert Counted.num_loaded == 0
    assert torch.equal(fresh.next(), straight.next())


def test_stateful_data_is_not_iterated_again():
    straight, fresh = stream("stateful"), stream("stateful")
    for _ in range(3):
        straight.next()
    fresh.load_state_dict(straight.state_dict())
    assert fresh.next().tolist() == [4, 4]
    assert fresh._data.num_given == 1


def test_positions_on_other_world_sizes():
    def body(rank, world_size, kept, num):
        batches = BatchStream(LOADERS["shuffled"](), level="low", device=torch.device("cpu"), seed=7)
        for _ in range(3 if kept is None else 0):
            batches.next()
        if kept is not None:
            batches.load_state_dict(kept)
        return batches.state_dict(), [batches.next().tolist() for _ in range(num)]

    kept, expected = run_ranks(body, 1, None, 5, init_process_group=False)[0]
    found = [part for _, part in run_ranks(body, 2, kept, 5)]
    assert [a + b for a, b in zip(*found, strict=True)] == expected
    kept = run_ranks(body, 2, None, 0)[0][0]
    assert run_ranks(body, 1, kept, 5, init_process_group=False)[0][1] == expected
