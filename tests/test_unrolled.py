"""Differentiating through K optimizer steps equals torch's own differentiable optimizers in one fp64 process."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import scalemlo as mlo
from scalemlo.derivatives.update_rules import UPDATE_RULES
from tests.problems import BATCH, Problem, Snapshot, build_modules, example_losses, full_tensors, relative_error
from tests.problems import token_batch as tokens
from tests.ranks import run_ranks

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS: dict[str, Callable] = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.05),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "maximize": partial(SGD, lr=0.1, maximize=True, weight_decay=0.1),
    "adam": partial(ADAM, lr=1e-2, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1),
    "adamw": partial(ADAMW, lr=1e-2, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1),
    "amsgrad": partial(ADAMW, lr=1e-2, betas=(0.8, 0.5), eps=1e-4, amsgrad=True),
}


# ---- the rules ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rules_repeat_torch(name):
    torch.set_default_dtype(torch.float64)  # the optimizer keeps its step count in it
    try:
        weight = nn.Parameter(torch.randn(50))
        optimizer = OPTIMIZERS[name]([weight])
        state, w = {}, weight.detach().clone()
        for _ in range(6):
            gradient = torch.randn(50)
            gradient[:5] = 0.0  # entries without a gradient
            state, w = UPDATE_RULES[type(optimizer)](optimizer.param_groups[0], state, w, gradient)
            weight.grad = gradient
            optimizer.step()
            torch.testing.assert_close(w, weight.detach(), rtol=1e-12, atol=1e-14)
        for key, t in optimizer.state[weight].items():
            if t is not None:
                torch.testing.assert_close(state[key], t, rtol=1e-12, atol=1e-14)
    finally:
        torch.set_default_dtype(torch.float32)


def test_adam_has_a_finite_derivative_at_an_entry_that_never_had_a_gradient():
    optimizer = OPTIMIZERS["adam"]([nn.Parameter(torch.zeros(3))])
    g = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    _, w = UPDATE_RULES[ADAM](optimizer.param_groups[0] | {"weight_decay": 0.0}, {}, torch.zeros_like(g), g)
    (slope,) = torch.autograd.grad(w.sum(), g)
    torch.testing.assert_close(slope, torch.full_like(g, -1e-2 / 1e-4).detach())  # of lr g / (|g| + eps)


# ---- whole trajectories ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """One unrolled problem: ``warm_up`` outer iterations, then one whose hypergradient is compared."""

    problem: Problem
    num_steps: int = 3
    unroll_steps: int = 3
    max_grad_norm: float | None = None
    decay: float | None = None  # of the learning rate per step

    def program(self, spec) -> mlo.Program:
        lower, upper = build_modules(self.problem.kind, self.problem.dtype)
        finetune, rater = self.problem.levels(lower, upper, mlo.Unrolled(num_steps=self.num_steps))
        finetune.unroll_steps = self.unroll_steps
        finetune.max_grad_norm = self.max_grad_norm
        if self.decay is not None:
            finetune.scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=self.decay)
        return mlo.Program([rater, finetune], engine=spec)

    def reference(self, state: Snapshot, steps_before: int) -> dict[str, Tensor]:
        """d F(w_K(lambda)) / d lambda by autograd through everything; only the last num_steps depend on lambda."""
        lower, upper = build_modules(self.problem.kind, torch.float64)
        lower.load_state_dict(state.lower, strict=False)
        upper.load_state_dict(state.upper)
        names = [n for n, p in lower.named_parameters() if p.requires_grad]
        weights = [dict(lower.named_parameters())[n].detach().clone().requires_grad_() for n in names]
        optimizer = self.problem.lower_optimizer(weights, differentiable=True)
        if self.decay is not None:
            optimizer.param_groups[0]["lr"] *= self.decay**steps_before
        for w, n in zip(weights, names, strict=True):
            optimizer.state[w] = {k: t.clone() for k, t in state.optimizer[n].items()}
        size = BATCH // self.problem.accumulation
        with sdpa_kernel(SDPBackend.MATH):
            for k in range(self.unroll_steps):
                first = (steps_before + k) * self.problem.accumulation
                micro = [tokens((first + i) % 40, size) for i in range(self.problem.accumulation)]
                model = partial(_call, lower, dict(zip(names, weights, strict=True)))
                loss = sum(self.problem._lower_loss(model, upper, b) for b in micro) / self.problem.accumulation
                gradients = list(torch.autograd.grad(loss, weights, create_graph=True))
                if k < self.unroll_steps - self.num_steps:  # before the part that is differentiated
                    gradients = [g.detach() for g in gradients]
                if self.max_grad_norm is not None:
                    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
                    gradients = [g * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) for g in gradients]
                moved = [w.clone() for w in weights]
                for old, new, g in zip(weights, moved, gradients, strict=True):
                    optimizer.state[new] = {
                        key: t.clone() if isinstance(t, Tensor) else t for key, t in optimizer.state.pop(old).items()
                    }
                    new.grad = g
                optimizer.param_groups[0]["params"] = moved
                with torch.enable_grad():
                    optimizer.step()
                if self.decay is not None:
                    optimizer.param_groups[0]["lr"] *= self.decay
                weights = moved
            model = partial(_call, lower, dict(zip(names, weights, strict=True)))
            outer = example_losses(model, tokens(100 + state.num_steps % 10)).mean()
            found = torch.autograd.grad(outer, list(upper.parameters()))
        return dict(zip(dict(upper.named_parameters()), found, strict=True))


def _call(module: nn.Module, weights: dict[str, Tensor], **inputs):
    return functional_call(module, weights, (), inputs)


def errors(rank, world_size, cases, spec):
    found = []
    for case in cases:
        program = case.program(spec)
        program.run(1, progress=False)
        lower = program.trainers["finetune"]
        state, steps_before = Snapshot.of(program), lower.num_steps
        before = lower.state().copied(torch.device("cpu"))
        lr = lower.optimizer.param_groups[0]["lr"]
        gradient = full_tensors(program.trainers["rater"], program.gradients()["rater"])
        after = lower.state()
        assert all(torch.equal(t, after.weights[n]) for n, t in before.weights.items())
        assert all(torch.equal(t, after.optimizer[n][k]) for n, s in before.optimizer.items() for k, t in s.items())
        assert lower.optimizer.param_groups[0]["lr"] == lr and lower.num_steps == steps_before
        found.append(relative_error(gradient, case.reference(state, steps_before)))
    return found


CASES = {
    **{name: Case(Problem(lower_optimizer=optimizer)) for name, optimizer in OPTIMIZERS.items()},
    "one step": Case(Problem(lower_optimizer=OPTIMIZERS["adamw"]), 1, 1),
    "truncated": Case(Problem(lower_optimizer=OPTIMIZERS["adamw"]), 2, 5),
    "seven steps": Case(Problem(lower_optimizer=OPTIMIZERS["momentum"]), 7, 7),
    "clipped": Case(Problem(lower_optimizer=OPTIMIZERS["adamw"]), max_grad_norm=1e-2),
    "clipped sgd": Case(Problem(lower_optimizer=OPTIMIZERS["sgd"]), max_grad_norm=1e-2),
    "accumulated": Case(Problem(lower_optimizer=OPTIMIZERS["adamw"], accumulation=4)),
    "schedule": Case(Problem(lower_optimizer=OPTIMIZERS["sgd"]), decay=0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_single_process_equals_autograd_through_everything(name):
    (error,) = errors(0, 1, [CASES[name]], mlo.Single())
    assert error < 1e-10


@pytest.mark.parametrize("spec", [mlo.DDP(), mlo.FSDP()], ids=["ddp", "fsdp"])
def test_two_ranks_equal_autograd_through_everything(spec):
    cases = [CASES[n] for n in ("momentum", "adamw", "clipped", "accumulated", "truncated")]
    cases += [Case(Problem(kind="gpt2_tied"), 2, 2)]
    single = [Case(Problem(kind=k, dtype=torch.float32, normalize=False), 2, 2) for k in ("mlp", "llama_lora")]
    for by_rank in run_ranks(errors, 2, cases, spec):
        assert max(by_rank) < 1e-10, by_rank
    for by_rank in run_ranks(errors, 2, single, spec):
        assert max(by_rank) < 1e-5, by_rank


def test_live_run_moves_the_upper_level_along_what_was_measured():
    """`run` and `gradients` agree: the upper level's first plain SGD step is minus its rate times the gradient."""
    measured = CASES["adamw"].program(mlo.Single())
    gradient = measured.gradients()["rater"]
    program = CASES["adamw"].program(mlo.Single())
    before = {n: t.clone() for n, t in program.trainers["rater"].weights().items()}
    program.run(1, progress=False)
    for n, t in program.trainers["rater"].weights().items():
        torch.testing.assert_close(before[n] - t, 0.1 * gradient[n], rtol=1e-9, atol=1e-15)
    assert program.trainers["finetune"].num_steps == 3


@pytest.mark.parametrize("num_steps", [8, 32, 128])
def test_memory_grows_with_the_square_root_of_the_steps(num_steps):
    program = Case(Problem(lower_optimizer=OPTIMIZERS["sgd"]), num_steps, num_steps).program(mlo.Single())
    lower = program.trainers["finetune"]
    program.gradients  # noqa: B018  # the method exists; the trajectory below is what it makes
    seen = []
    original = type(lower.estimator).pull_back

    def pull_back(self, v, problem):
        found = original(self, v, problem)
        seen.append(problem.trajectory.peak_bytes)
        return found

    type(lower.estimator).pull_back = pull_back
    try:
        program.gradients()
    finally:
        type(lower.estimator).pull_back = original
    copies = seen[0] / lower.weights().nbytes
    root = num_steps**0.5
    assert 2 * root <= copies <= 3 * root + 3  # kept states, and one segment's states and gradients


# ---- bad input ---------------------------------------------------------------------------------------------------
def test_more_steps_than_there_are_is_refused():
    with pytest.raises(ValueError, match="num_steps=4 of Unrolled is more than the level's unroll_steps=3"):
        Case(Problem(), 4, 3).program(mlo.Single())
    with pytest.raises(ValueError, match="num_steps=0 must be an integer of at least 1"):
        mlo.Unrolled(num_steps=0)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="update of Adagrad is not known.*AdamW.*UPDATE_RULES"):
        Case(Problem(lower_optimizer=partial(torch.optim.Adagrad, lr=0.1))).program(mlo.Single())
