"""Ghost products equal the reference where they apply, and are refused where they do not."""

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scalemlo as mlo
from tests.problems import Problem, errors
from tests.ranks import run_ranks

GHOST = mlo.Identity(mixed="ghost")
KINDS = ["mlp", "llama", "llama_lora"]
ENGINES = {"single-1": (mlo.Single, 1), "ddp-2": (mlo.DDP, 2), "fsdp-2": (mlo.FSDP, 2)}


@pytest.mark.parametrize("engine", ENGINES)
def test_products_equal_the_reference(engine):
    spec, world_size = ENGINES[engine]
    exact = [Problem(kind="mlp", accumulation=a) for a in (1, 4)]
    single = [
        Problem(kind=kind, dtype=torch.float32, normalize=False, accumulation=a) for kind in KINDS for a in (1, 4)
    ]
    # transformers' RMSNorm computes in fp32 whatever the dtype, and so does its output's tangent
    llamas = [Problem(kind=kind) for kind in ("llama", "llama_lora")]
    for by_rank in run_ranks(errors, world_size, exact + single + llamas, GHOST, False, spec()):
        assert max(by_rank[: len(exact)]) < 1e-10, by_rank
        assert max(by_rank[len(exact) : -len(llamas)]) < 1e-5, by_rank
        assert max(by_rank[-len(llamas) :]) < 1e-6, by_rank


@pytest.mark.parametrize("engine", ENGINES)
def test_the_run_is_that_of_the_forward_derivative(engine):
    """The same losses, norms and weights over several steps: the lower gradient comes out of the same pass."""
    spec, world_size = ENGINES[engine]

    def body(rank, world_size):
        runs = []
        for mixed in ("forward", "ghost"):
            program = Problem(kind="mlp").program(mlo.Identity(mixed=mixed), spec())
            history = program.run(4, progress=False)
            runs.append([[row[key] for key in sorted(row)] for row in history.steps])
        return runs

    for forward, ghost in run_ranks(body, world_size):
        torch.testing.assert_close(torch.tensor(ghost), torch.tensor(forward), rtol=1e-9, atol=1e-12)


def test_bf16_agrees_with_its_forward_derivative():
    measured = Problem(kind="llama", dtype=torch.float32, normalize=False).hypergradient(
        GHOST, mlo.Single(dtype="bf16")
    )
    problem = Problem(kind="llama", dtype=torch.float32, normalize=False)
    expected = problem.reference(measured.state, adaptive=False)
    a, b = (torch.cat([t[n].double().flatten() for n in expected]) for t in (measured.gradient, expected))
    assert torch.cosine_similarity(a, b, dim=0) > 0.99


def test_the_graph_is_freed():
    """Taps in the graph refer to the collector; a reference back would keep every step's graph alive."""
    program = Problem(kind="mlp").program(GHOST, mlo.Single())
    gc.collect()
    gc.disable()
    try:
        sizes = []
        for _ in range(4):
            program.step()
            sizes.append(sum(1 for o in gc.get_objects() if isinstance(o, torch.Tensor)))
    finally:
        gc.enable()
    assert sizes[-1] <= sizes[1], sizes


# ---- where they do not apply ---------------------------------------------------------------------------------------
class Train(mlo.Level):
    weigh = staticmethod(lambda losses, rater: torch.sigmoid(rater(losses.detach()[:, None])[:, 0]))
    finish = staticmethod(lambda loss: loss)

    def loss(self, batch, rater):
        losses = F.cross_entropy(self.module(batch[0]), batch[1], reduction="none")
        return self.finish(mlo.weighted_mean(losses, self.weigh(losses, rater)))


class Rate(mlo.Level):
    def loss(self, batch, train):
        return F.cross_entropy(train(batch[0]), batch[1])


def step(module: nn.Module, **attributes) -> mlo.Program:
    torch.manual_seed(0)
    data = [(torch.randn(8, 5), torch.randint(0, 3, (8,)))]
    sgd = partial(torch.optim.SGD, lr=0.1)
    train = Train("train", module, data=data, optimizer=sgd, hypergradient=GHOST)
    for name, value in attributes.items():
        setattr(train, name, value)
    program = mlo.Program([Rate("rater", nn.Linear(1, 1), data=data, optimizer=sgd), train])
    program.step()
    return program


def test_a_plain_classifier_is_fine():
    assert step(nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3))).num_steps == 1


def test_losses_that_mix_examples_are_found_out():
    with pytest.raises(mlo.DerivativeError, match="differ from the forward derivative"):
        step(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)))


def test_broadcast_position_embeddings_are_refused():
    with pytest.raises(mlo.DerivativeError, match="wpe.*first dimension 1"):
        Problem(kind="gpt2_tied").hypergradient(GHOST, mlo.Single())


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        return x @ self.linear.weight.T + self.linear.bias


REFUSED = {
    "a factor": (dict(finish=lambda loss: 2 * loss), "nothing added and no factor"),
    "a regulariser": (dict(finish=lambda loss: loss + 1.0), "nothing added"),
    "weights of attached losses": (
        dict(weigh=lambda losses, rater: torch.sigmoid(rater(losses[:, None])[:, 0])),
        "detach the losses",
    ),
    "a weight of zero": (
        dict(weigh=lambda losses, rater: torch.sigmoid(rater(losses.detach()[:, None])[:, 0]) * (torch.arange(8) > 0)),
        "exactly 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_losses_are_refused_by_name(case):
    attributes, message = REFUSED[case]
    with pytest.raises(mlo.DerivativeError, match=message):
        step(nn.Linear(5, 3), **attributes)


def test_weights_used_directly_are_refused():
    with pytest.raises(mlo.DerivativeError, match="linear.weight.*not called"):
        step(Direct())


def test_sama_needs_the_gradient_first():
    with pytest.raises(ValueError, match="SAMA needs that gradient first"):
        mlo.SAMA(mixed="ghost")
