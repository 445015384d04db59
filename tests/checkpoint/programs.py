"""Programs with everything that has a state, and how their states are compared."""

import random
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

import scalemlo as mlo
from scalemlo.checkpoint import state
from tests.problems import LENGTH, VOCAB, Finetune, Problem, Rate, weight_net

ENGINES = {"single": mlo.Single(), "ddp": mlo.DDP(), "fsdp": mlo.FSDP()} | {
    f"zero{stage}": mlo.DeepSpeed(stage=stage) for stage in (1, 2, 3)
}
ESTIMATORS = {
    "soba": mlo.SOBA(step_size=0.1),
    "unrolled": mlo.Unrolled(),
    "nystrom": mlo.Nystrom(rank=3, damping=0.1, refresh_every=4),
    "penalty": mlo.Penalty(penalty=10.0, learning_rate=0.01),
    "forward_gradient": mlo.ForwardGradient(),
}


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


def plain_problem(engine, **options):
    """A program whose batches depend on the step alone, so that all engines and world sizes train alike."""
    return Problem(**options).program(mlo.SOBA(step_size=0.1), ENGINES[engine])


def everything(program):
    """All the state of a rank: its entries of every vector, numbers, history without times."""
    entries = {key: piece.flat.clone() for key, piece in state.vectors(program.iteration).items()}
    history = (program.history.steps, program.history.skipped, program.history.solves)
    shared = state.shared(program.iteration)
    return {"vectors": entries, "shared": shared, "own": state.own(program.iteration), "history": history}


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
    """Whole flattened vectors, equal on every rank; collective."""
    mine = {
        key: (piece.numel, piece.start, piece.flat) for key, piece in sorted(state.vectors(program.iteration).items())
    }
    everyone = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    whole = {key: torch.full((numel,), torch.nan, dtype=flat.dtype) for key, (numel, _, flat) in mine.items()}
    for pieces in everyone:
        for key, (_, start, flat) in pieces.items():
            whole[key][start : start + len(flat)] = flat
    return whole
