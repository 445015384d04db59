"""Training follows one process on every engine: trajectories, accumulation, optimizers as given, names of weights."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

import scalemlo as mlo
from tests.problems import (
    BATCH,
    ENGINES,
    Finetune,
    Problem,
    Rate,
    assert_same,
    build_modules,
    example_losses,
    sgd,
    token_batch,
    weights,
)
from tests.ranks import run_ranks
from tests.test_gradients import normed, shared


# ---- trajectories ----------------------------------------------------------------------------------------------------
def trajectory(problem: Problem, spec: mlo.engines.EngineSpec, hypergradient=None):
    program = problem.program(hypergradient or mlo.SAMA(), spec)
    history = program.run(4, progress=False)
    return {k: history.column(f"loss/{k}") for k in ("rater", "finetune")}, weights(program)


def accumulated(spec: mlo.engines.EngineSpec, num_parts: int):
    """The same eight examples per step, in one batch or in several; upper level and all."""
    lower, upper = build_modules("mlp", torch.float64)
    whole = [token_batch(i) for i in range(4)]
    size = BATCH // num_parts
    parts = [{k: t[i : i + size] for k, t in b.items()} for b in whole for i in range(0, BATCH, size)]
    finetune = Finetune("finetune", lower, data=parts, optimizer=partial(AdamW, lr=1e-2), hypergradient=mlo.SAMA(),
                        gradient_accumulation_steps=num_parts)  # fmt: skip
    finetune.normalize = False
    rate = Rate("rater", upper, data=parts[::-1], optimizer=sgd, gradient_accumulation_steps=num_parts)
    program = mlo.Program([rate, finetune], engine=spec)
    history = program.run(4, progress=False)
    return {k: history.column(f"loss/{k}") for k in ("rater", "finetune")}, weights(program)


def all_trajectories(rank, world_size):
    found = {}
    for name, spec in ENGINES.items():
        found[name, "plain"] = trajectory(Problem(), spec())
        found[name, "identity"] = trajectory(Problem(lower_optimizer=partial(SGD, lr=0.1)), spec(), mlo.Identity())
        found[name, "accumulated"] = accumulated(spec(), 4)
        found[name, "grouped"] = grouped(spec())
    return found


@pytest.fixture(scope="module")
def on_ranks():
    return run_ranks(all_trajectories, 2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["plain", "identity", "accumulated"])
def test_trajectories_are_those_of_one_process(on_ranks, engine, kind):
    if kind == "plain":
        losses, state = trajectory(Problem(), mlo.Single())
    elif kind == "identity":
        losses, state = trajectory(Problem(lower_optimizer=partial(SGD, lr=0.1)), mlo.Single(), mlo.Identity())
    else:
        losses, state = accumulated(mlo.Single(), 1)
    for rank, by_rank in enumerate(on_ranks):
        found_losses, found_state = by_rank[engine, kind]
        for level in losses:
            assert len(losses[level]) == 4
            assert found_losses[level] == pytest.approx(losses[level], rel=1e-10)
        assert_same(found_state, state if rank == 0 else {})


def test_accumulation_eight_times_one_is_one_times_eight():
    (many_losses, many), (losses, once) = accumulated(mlo.Single(), 8), accumulated(mlo.Single(), 1)
    assert_same(many, once)
    for level in losses:
        assert many_losses[level] == pytest.approx(losses[level], rel=1e-10)


BF16_BAND = 0.02  # of a loss, relative: bf16 has 8 bits, and four steps of AdamW do not amplify that


def test_bf16_stays_near_fp32():
    problem = Problem(kind="llama", dtype=torch.float32, normalize=False)
    losses, _ = trajectory(problem, mlo.Single())

    def body(rank, world_size):
        runs = {}
        for spec in (mlo.DDP, mlo.FSDP) if world_size > 1 else (mlo.Single,):
            runs[spec.__name__] = trajectory(problem, spec(dtype="bf16"))
        return runs

    for runs in (body(0, 1), run_ranks(body, 2)[0]):
        for found, state in runs.values():
            assert all(t.dtype == torch.float32 for t in state.values() if t.is_floating_point())  # master weights
            for level in losses:
                assert found[level] == pytest.approx(losses[level], rel=BF16_BAND)
                assert found[level] != losses[level]


# ---- optimizers ------------------------------------------------------------------------------------------------------
class Train(mlo.Level):
    def loss(self, batch):
        return mlo.mean(example_losses(self.module, batch))


GROUPS = ((0.02, 0.3), (0.005, 0.0))  # learning rate, weight decay


def two_groups(module: nn.Module):
    """AdamW over matrices and vectors, and its schedule."""
    matrices = [p for p in module.parameters() if p.dim() > 1]
    vectors = [p for p in module.parameters() if p.dim() == 1]
    optimizer = AdamW([{"params": ps, "lr": lr, "weight_decay": decay}
                       for ps, (lr, decay) in zip((matrices, vectors), GROUPS, strict=True)])  # fmt: skip
    return optimizer, LambdaLR(optimizer, lambda step: 0.5**step)


def grouped(spec: mlo.engines.EngineSpec):
    """Train with an optimizer instance; returns what became of the instance, and the weights."""
    module, _ = build_modules("mlp", torch.float64)
    optimizer, scheduler = two_groups(module)
    level = Train("model", module, data=[token_batch(i) for i in range(3)], optimizer=optimizer, scheduler=scheduler,
                  max_grad_norm=0.05)  # fmt: skip
    program = mlo.Program([level], engine=spec)
    trainer = program.trainers["model"]
    program.run(3, progress=False)
    assert trainer.optimizer is optimizer and trainer.scheduler is scheduler
    engine_parameters = {id(p): n for n, p in trainer.engine.parameters.items()}
    names = [[engine_parameters[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert program.history.column("lr/model") == [GROUPS[0][0] * 0.5**k for k in (1, 2, 3)]
    return names, [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups], weights(program)


def plain_training():
    module, _ = build_modules("mlp", torch.float64)
    optimizer, scheduler = two_groups(module)
    for i in range(3):
        optimizer.zero_grad()
        example_losses(module, token_batch(i)).mean().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.05)
        optimizer.step()
        scheduler.step()
    return {f"model.{n}": t.detach() for n, t in module.state_dict().items()}


@pytest.mark.parametrize("engine", ["single", *ENGINES])
def test_an_optimizer_instance_is_used_as_it_is(on_ranks, engine):
    names, options, state = grouped(mlo.Single()) if engine == "single" else on_ranks[0][engine, "grouped"]
    module, _ = build_modules("mlp", torch.float64)
    expected = dict(module.named_parameters())
    assert names == [[n for n, p in expected.items() if (p.dim() > 1) is matrix] for matrix in (True, False)]
    assert options == [pytest.approx((lr * 0.125, decay)) for lr, decay in GROUPS]
    assert_same(state, plain_training())


def test_frozen_parameters_stay():
    def body(rank, world_size):
        frozen = {}
        for name, spec in ENGINES.items() if world_size > 1 else [("single", mlo.Single)]:
            problem = Problem(kind="llama_lora", lower_optimizer=partial(AdamW, lr=0.1, weight_decay=0.5))
            program = problem.program(mlo.SAMA(), spec())
            before = program.state_dict("finetune")
            program.run(2, progress=False)
            after, trainable = program.state_dict("finetune"), program.state_dict("finetune", trainable_only=True)
            if rank == 0:
                assert all("lora" in n for n in trainable) and len(trainable) == 8
                assert all(torch.equal(after[n], t) for n, t in trainable.items())
            frozen[name] = {n: torch.equal(before[n], after[n]) for n in before}
        return frozen

    for by_engine in (body(0, 1), run_ranks(body, 2)[0]):
        for same in by_engine.values():
            assert {n for n in same if not same[n]} == {n for n in same if "lora" in n}


def test_parameters_outside_a_subset_stay():
    program = mlo.Program(shared("mlp", "embed*", "blocks*"))
    before = program.state_dict("low")
    program.run(2, progress=False)
    after = program.state_dict("low")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if n.startswith(("embed", "blocks"))}
    trainable = {n for n, p in program.trainers["low"].engine.parameters.items() if p.requires_grad}
    assert trainable == moved  # no gradient is computed for the others


# ---- names of weights ------------------------------------------------------------------------------------------------
def test_state_dicts_have_the_same_names_on_every_engine():
    def body(rank, world_size):
        names = {}
        for name, spec in ENGINES.items() if world_size > 1 else [("single", mlo.Single)]:
            program = mlo.Program(normed(), engine=spec())
            names[name] = [sorted(program.state_dict("low", trainable_only=only)) for only in (False, True)]
            program = Problem(kind="gpt2_tied").program(mlo.Identity(), spec())
            names[name] += [sorted(program.state_dict("finetune", trainable_only=only)) for only in (False, True)]
        return names

    expected = body(0, 1)["single"]
    assert "norm.running_mean" in expected[0] and "norm.running_mean" not in expected[1]
    first, second = run_ranks(body, 2)
    for engine in ENGINES:
        assert first[engine] == expected, engine
        assert second[engine] == [[], [], [], []]
