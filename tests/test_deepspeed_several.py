"""Several engines in one program, of one kind or of different ones, are one process."""

import gc
import importlib
from functools import partial

import pytest
import torch

import scalemlo as mlo
from tests.problems import Finetune, Vector, build_modules, example_losses, full_tensors, relative_error, token_batch
from tests.ranks import run_ranks
from tests.test_deepspeed import ADAMW

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'scalemlo[deepspeed]'")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

ZERO = {stage: mlo.DeepSpeed(stage=stage) for stage in (1, 2, 3)}
OFFLOADED = mlo.DeepSpeed(stage=3, offload_optimizer=True)
COMBINATIONS = [  # top to bottom
    (mlo.DDP(), ZERO[3]),
    (ZERO[2], mlo.FSDP()),
    (ZERO[3], ZERO[1]),
    (ZERO[1], ZERO[2], ZERO[3]),
    (mlo.DDP(), OFFLOADED, mlo.FSDP()),
]


class Top(mlo.Level):
    """How much the rater's weights cost, so that the fine-tuned model does well."""

    def loss(self, batch, finetune):
        return mlo.mean(example_losses(finetune, batch))


class Rate(mlo.Level):
    def loss(self, batch, finetune):
        return mlo.mean(example_losses(finetune, batch))


class CostlyRate(mlo.Level):
    def loss(self, batch, finetune, top):
        weights = self.module(torch.linspace(3, 4, 5).unsqueeze(-1))
        return mlo.mean(example_losses(finetune, batch)) + (top() * weights).square().mean()


def trained(rank, world_size, combinations) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """Losses and weights of three outer iterations."""
    gc.freeze()  # DeepSpeed collects garbage for every engine
    found = []
    for specs in combinations:
        lower, upper = build_modules("mlp", torch.float32)
        common = dict(hypergradient=mlo.Identity(mixed="forward"))
        train, meta = [token_batch(i) for i in range(12)], [token_batch(100 + i) for i in range(6)]
        finetune = Finetune("finetune", lower, data=train, optimizer=ADAMW, engine=specs[-1], **common)
        sgd = partial(torch.optim.SGD, lr=0.1)
        if len(specs) == 2:
            levels = [Rate("rater", upper, data=meta, optimizer=sgd, engine=specs[0]), finetune]
        else:
            rater = CostlyRate("rater", upper, data=meta, optimizer=sgd, engine=specs[1], **common)
            levels = [Top("top", Vector(torch.ones(1)), data=meta, optimizer=sgd, engine=specs[0]), rater, finetune]
        program = mlo.Program(levels)
        history = program.run(3, progress=False)
        weights = {
            f"{name}/{n}": t
            for name, trainer in program.trainers.items()
            for n, t in full_tensors(trainer, trainer.weights()).items()
        }
        found.append(([r[f"loss/{n}"] for r in history.steps for n in program.trainers], weights))
    return found


def test_any_mixture_of_engines_is_one_process():
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # late, and once for all ranks
    two, three = run_ranks(trained, 1, [(mlo.Single(),) * 2, (mlo.Single(),) * 3])[0]
    for found in run_ranks(trained, 2, COMBINATIONS, timeout_seconds=300):
        for specs, (losses, weights) in zip(COMBINATIONS, found, strict=True):
            expected_losses, expected = two if len(specs) == 2 else three
            assert losses == pytest.approx(expected_losses, rel=1e-5), specs
            assert relative_error(weights, expected) < 1e-5, specs
