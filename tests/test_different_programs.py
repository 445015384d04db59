"""Ranks that were given different programs are told at once, instead of waiting for each other for ever."""

import pytest
import torch

import scalemlo as mlo
from tests.problems import Problem, build_modules
from tests.ranks import run_ranks


def build(**changes) -> mlo.Program:
    finetune, rater = Problem().levels(*build_modules("mlp", torch.float64), mlo.Identity())
    for name, value in changes.items():
        setattr(finetune, name, value)
    return mlo.Program([rater, finetune], engine=mlo.FSDP())


DIFFERENCES = {
    "estimator": (lambda: build(hypergradient=mlo.SAMA()), "hypergradient=Identity.*rank 1 has.*SAMA"),
    "unroll steps": (lambda: build(unroll_steps=2), "unroll_steps=1.*rank 1 has.*unroll_steps=2"),
    "parameters": (lambda: build(parameters=["head.*"]), "parameter embed.weight.*rank 1 has.*parameter head"),
    "precision": (lambda: build(engine=mlo.FSDP(dtype="bf16")), "fp32.*rank 1 has.*bf16"),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_every_rank_says_what_differs(case):
    make, message = DIFFERENCES[case]

    def body(rank, world_size):
        with pytest.raises(ValueError, match="the ranks run different programs: rank 0 has.*" + message):
            make() if rank == 1 else build()

    run_ranks(body, 2)
