"""Programs as users run them: trajectories, hypergradients of every kind of level, interruption, records."""

import os
import signal
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import scalemlo as mlo
from scalemlo.precision import LossScaler
from tests.problems import BATCH, Finetune, Problem, Rate, build_modules, example_losses, relative_error, token_batch
from tests.ranks import run_ranks

ENGINES = {"ddp": mlo.DDP, "fsdp": mlo.FSDP}
sgd = partial(SGD, lr=0.1)


def full(program: mlo.Program, gradients) -> dict[str, Tensor]:
    return {
        f"{level}.{name}": t.clone()
        for level, gradient in gradients.items()
        for name, t in program.trainers[level].engine.gather(dict(gradient)).items()
    }


def weights(program: mlo.Program) -> dict[str, Tensor]:
    return {f"{level}.{n}": t for level in program.graph.order for n, t in program.state_dict(level).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- hypergradients of every kind of level ---------------------------------------------------------------------------
class Parts(nn.Module):
    """Has methods beside forward, one of them with keyword arguments and several outputs, and blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head = nn.Linear(5, 1)

    def encode(self, x):  # [B, 5] -> [B, 5]
        for block in self.blocks:
            x = x + block(x).tanh()
        return x

    def forward(self, x):  # [B, 5] -> [B]
        return self.head(self.encode(x)).squeeze(-1)

    def score(self, x, *, power=2):
        out = self(x)
        return {"scores": out**power, "features": (self.encode(x), power)}

    def penalty(self):
        return self.head.weight.square().sum() + self.head.bias.square().sum()


class Gate(nn.Module):
    def __init__(self, width=1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 1))
        self.log_penalty = nn.Parameter(torch.randn(1))

    def forward(self, x):  # [B, width] -> [B]
        return self.net(x).sigmoid().squeeze(-1)

    def decay(self):
        return self.log_penalty.exp().sum()


class ByForward(mlo.Level):
    def loss(self, batch, top):
        losses = (self.module(batch) - 1).square()
        return mlo.weighted_mean(losses, top(losses.detach().unsqueeze(-1))) + top.decay() * self.module.penalty()


class ByMethods(mlo.Level):
    """Uses methods only, of both modules, one of them twice, and reads what depends on weights."""

    def loss(self, batch, top):
        out = self.module.score(batch, power=3)
        features, power = out["features"]
        assert power == 3
        again = self.module.encode(batch.flip(1))
        losses = (out["scores"] - 1).square() + (features * again).mean(1)
        return mlo.mean(losses * top(features[:, :1])) + top.decay() * self.module.penalty()


class UnderNoGrad(mlo.Level):
    def loss(self, batch, top):
        with torch.no_grad():
            features = (self.module(batch) - 1).square()
        losses = (self.module(batch) - 1).square()
        return mlo.weighted_mean(losses, top(features.unsqueeze(-1))) + top.decay() * self.module.penalty()


class Judge(mlo.Level):
    """An upper loss with a direct gradient too."""

    def loss(self, batch, low):
        return mlo.mean((low(batch) + 0.5).square()) + 0.1 * self.module.decay()


class JudgeByMethods(mlo.Level):
    def loss(self, batch, low):
        return mlo.mean(low.encode(batch).square().mean(1)) + 0.1 * self.module.decay() + 0.1 * low.penalty()


def numbers(seed: int) -> Tensor:
    return torch.randn(BATCH, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small(low: type[mlo.Level], top: type[mlo.Level] = Judge, mixed="forward") -> list[mlo.Level]:
    torch.manual_seed(4)
    net, gate = Parts().double(), Gate().double()
    return [
        top("top", gate, data=[numbers(1)], optimizer=sgd),
        low("low", net, data=[numbers(2)], optimizer=sgd, hypergradient=mlo.Identity(mixed=mixed)),
    ]


class Below(mlo.Level):
    def loss(self, batch, top):
        return mlo.mean(example_losses(self.module, batch))


class Above(mlo.Level):
    def loss(self, batch, low):
        return mlo.mean(example_losses(low, batch))


class RMSNorm(LlamaRMSNorm):
    """Without the detour over fp32 that transformers takes in any dtype: its derivatives are good to 1e-8 only."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def shared(kind: str, above: str, below: str) -> list[mlo.Level]:
    """Two levels that own parts of one module."""
    module, _ = build_modules(kind, torch.float64)
    for m in module.modules():
        if isinstance(m, LlamaRMSNorm):
            m.__class__ = RMSNorm
    return [
        Above("top", module, data=[token_batch(1)], optimizer=sgd, parameters=above),
        Below("low", module, data=[token_batch(2)], optimizer=sgd, parameters=below),
    ]


CASES: dict[str, Callable[[], list[mlo.Level]]] = {
    "forward": partial(small, ByForward),
    "methods": partial(small, ByMethods, JudgeByMethods),
    "no_grad": partial(small, UnderNoGrad),
    "lora A above lora B": partial(shared, "llama_lora", "*lora_A*", "*lora_B*"),
    "embedding above blocks": partial(shared, "mlp", "embed*", "blocks*"),
    "norms above everything else": partial(shared, "llama", "*norm*", "*proj*"),
}


def measured(case: str, spec: mlo.engines.EngineSpec) -> dict[str, Tensor]:
    program = mlo.Program(CASES[case](), engine=spec)
    return full(program, program.gradients())


def double_backward(case: str) -> dict[str, Tensor]:
    """``dF/dlambda - d/dlambda <dL/dw, dF/dw>`` and dL/dw with plain autograd on the plain modules."""
    top, low = CASES[case]()
    w = {n: p for n, p in low._module.named_parameters() if n in low.owned_parameters()}
    x = {n: p for n, p in top._module.named_parameters() if n in top.owned_parameters()}
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(low.loss(low.data[0], top._module), list(w.values()), create_graph=True)
        outer = top.loss(top.data[0], low._module)
        v = torch.autograd.grad(outer, list(w.values()), retain_graph=True, allow_unused=True)
        direct = torch.autograd.grad(outer, list(x.values()), allow_unused=True)
        product = sum((g * u).sum() for g, u in zip(gradients, v, strict=True) if u is not None)
        mixed = torch.autograd.grad(product, list(x.values()), materialize_grads=True, allow_unused=True)
    expected = {f"top.{n}": (d if d is not None else 0) - m for n, d, m in zip(x, direct, mixed, strict=True)}
    return expected | {f"low.{n}": g.detach() for n, g in zip(w, gradients, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_double_backward(case):
    assert_same(measured(case, mlo.Single()), double_backward(case))


def test_gradients_equal_double_backward_on_two_ranks():
    def body(rank, world_size):
        return {(case, name): measured(case, spec()) for case in CASES for name, spec in ENGINES.items()}

    expected = {case: double_backward(case) for case in CASES}
    for by_rank in run_ranks(body, 2):
        for (case, _), found in by_rank.items():
            assert_same(found, expected[case])


def test_values_under_no_grad_are_constants_as_detached_ones_are():
    """In both ways of taking the mixed partial; and the derivative without this rule is another one."""

    def of(low, mixed):
        program = mlo.Program(small(low, mixed=mixed))
        return full(program, program.gradients())

    class Moving(mlo.Level):
        def loss(self, batch, top):
            losses = (self.module(batch) - 1).square()
            return mlo.weighted_mean(losses, top(losses.unsqueeze(-1))) + top.decay() * self.module.penalty()

    exact = of(ByForward, "forward")
    assert_same(of(UnderNoGrad, "forward"), exact)
    assert relative_error(of(ByForward, "finite_difference"), exact) < 1e-7
    assert relative_error(of(UnderNoGrad, "finite_difference"), exact) < 1e-7
    assert relative_error({n: t for n, t in of(Moving, "forward").items() if "net" in n},
                          {n: t for n, t in exact.items() if "net" in n}) > 1e-2  # fmt: skip


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


# ---- random numbers and buffers --------------------------------------------------------------------------------------
def direction(trainer) -> mlo.Shards:
    """A fixed v, laid out like the weights of a level."""
    return trainer.weights().map(lambda t: torch.ones_like(t) / 10)


class Dropped(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.dropout = module, nn.Dropout(0.4)

    def forward(self, input_ids):
        x = self.dropout(self.module.embed(input_ids))
        for block in self.module.blocks:
            x = x + self.dropout(block(x))
        return self.module.head(x)


def dropping_program(hypergradient: mlo.Hypergradient) -> mlo.Program:
    lower, upper = build_modules("mlp", torch.float64)
    finetune = Finetune("finetune", Dropped(lower), data=[token_batch(i) for i in range(4)], optimizer=sgd,
                        hypergradient=hypergradient)  # fmt: skip
    finetune.normalize = False
    return mlo.Program([Rate("rater", upper, data=[token_batch(9)], optimizer=sgd), finetune])


def test_masks_are_those_of_the_step():
    """Exact derivatives and central differences agree only if all their passes drop the same units."""
    program = dropping_program(mlo.Identity())
    program.run(1, progress=False)
    trainer, rater = program.trainers["finetune"], program.trainers["rater"]
    found = {}
    for method in ("forward", "finite_difference"):
        trainer.estimator = mlo.Identity(mixed=method)
        found[method] = trainer.compute_mixed(direction(trainer), [rater])["rater"]
    assert relative_error(found["finite_difference"], found["forward"]) < 1e-6
    again = trainer.compute_mixed(direction(trainer), [rater])["rater"]
    assert_same(dict(again), dict(found["finite_difference"]), 0.0)
    trainer._seed += 1  # other masks
    other = trainer.compute_mixed(direction(trainer), [rater])["rater"]
    assert relative_error(other, found["forward"]) > 1e-2


def test_hypergradients_in_between_change_no_trajectory():
    def run(*callbacks):
        program = dropping_program(mlo.SAMA())
        before = torch.get_rng_state()
        history = program.run(4, callbacks=callbacks, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        return history.column("loss/finetune"), weights(program)

    def peek(program, record):
        trainer, rater = program.trainers["finetune"], program.trainers["rater"]
        trainer.compute_mixed(direction(trainer), [rater])
        rater.compute_gradient([trainer])

    losses, state = run()
    peeked_losses, peeked = run(peek)
    assert peeked_losses == losses
    assert_same(peeked, state, 0.0)
    torch.rand(7)  # the seed of the program decides, not the state of the global generator
    assert run()[0] == losses


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)

    def forward(self, x):
        return self.head(self.norm(self.first(x)).tanh()).squeeze(-1)


class NormedLow(mlo.Level):
    def loss(self, batch, top):
        losses = (self.module(batch) - 1).square()
        return mlo.weighted_mean(losses, top(losses.detach().unsqueeze(-1)))


def normed() -> list[mlo.Level]:
    torch.manual_seed(4)
    net, gate = Normed().double(), Gate().double()
    return [
        Judge("top", gate, data=[numbers(1)], optimizer=sgd),
        NormedLow("low", net, data=[numbers(2)], optimizer=sgd),
    ]


def test_mixed_partials_leave_running_statistics_alone():
    def body(rank, world_size):
        changed = {}
        for name, spec in ENGINES.items() if world_size > 1 else [("single", mlo.Single)]:
            program = mlo.Program(normed(), engine=spec())
            program.run(2, progress=False)
            trainer = program.trainers["low"]
            assert int(trainer.engine.module.norm.num_batches_tracked) > 0
            for method in ("forward", "finite_difference"):
                trainer.estimator = mlo.Identity(mixed=method)
                before = {n: b.clone() for n, b in trainer.engine.module.named_buffers()}
                trainer.compute_mixed(direction(trainer), [program.trainers["top"]])
                after = dict(trainer.engine.module.named_buffers())
                changed[name, method] = [n for n in before if not torch.equal(before[n], after[n])]
        return changed

    for by_case in (body(0, 1), *run_ranks(body, 2)):
        assert by_case and all(names == [] for names in by_case.values()), by_case


def test_derivatives_of_batch_statistics():
    """In training mode the statistics of the batch depend on the weights."""
    CASES["normed"] = normed
    try:
        found, expected = measured("normed", mlo.Single()), double_backward("normed")
    finally:
        del CASES["normed"]
    assert_same(found, expected)


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


# ---- running ---------------------------------------------------------------------------------------------------------
def test_ctrl_c_ends_after_the_iteration():
    problem = Problem(kind="mlp")

    def interrupt(program, record):
        if program.num_steps == 2:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    program = problem.program(mlo.Identity(), mlo.Single())
    history = program.run(6, callbacks=[interrupt], progress=False)
    assert history.interrupted and len(history.steps) == program.num_steps == 2
    assert signal.getsignal(signal.SIGINT) is handler
    module, _ = build_modules("mlp", torch.float64)
    module.load_state_dict(program.state_dict("finetune"))
    uninterrupted = problem.program(mlo.Identity(), mlo.Single())
    uninterrupted.run(2, progress=False)
    assert_same(weights(program), weights(uninterrupted), 0.0)
    program.run(2, progress=False)  # it can go on
    uninterrupted.run(2, progress=False)
    assert_same(weights(program), weights(uninterrupted), 0.0)
    assert not program.history.interrupted


def test_a_second_ctrl_c_ends_at_once():
    def impatient(program, record):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    program = Problem().program(mlo.Identity(), mlo.Single())
    with pytest.raises(KeyboardInterrupt):
        program.run(6, callbacks=[impatient], progress=False)
    assert program.num_steps == 1


def test_ctrl_c_on_one_rank_ends_all():
    def body(rank, world_size):
        def interrupt(program, record):
            if rank == 1 and program.num_steps == 2:
                os.kill(os.getpid(), signal.SIGINT)

        program = Problem().program(mlo.Identity(), mlo.FSDP())
        history = program.run(6, callbacks=[interrupt], progress=False)
        return history.interrupted, program.num_steps, len(program.state_dict("finetune"))

    module, _ = build_modules("mlp", torch.float64)
    assert run_ranks(body, 2) == [(True, 2, len(module.state_dict())), (True, 2, 0)]


def test_history(tmp_path):
    program = Problem().program(mlo.SAMA(), mlo.Single())
    seen = []
    history = program.run(3, callbacks=[lambda program, record: seen.append(dict(record))], progress=False)
    assert seen == history.steps
    columns = {f"{kind}/{level}" for kind in ("loss", "gradient_norm", "lr") for level in ("rater", "finetune")}
    for row in history.steps:
        assert set(row) == {"step"} | columns
    assert history.column("step") == [1, 2, 3]
    assert history.column("lr/finetune") == [1e-2] * 3
    assert all(norm > 0 for norm in history.column("gradient_norm/rater"))
    assert history.column("no such column") == []
    phases = {
        "rater/data", "finetune/data", "rater/direct gradient", "finetune/gradient",
        "finetune/hypergradient", "rater/step", "finetune/step",
    }  # fmt: skip
    assert set(history.phases) == phases
    assert all(stats.num_calls == 3 and stats.peak_bytes > 0 for stats in history.phases.values())
    history.save(tmp_path)
    assert (tmp_path / "history.csv").read_text().splitlines()[0].startswith("step,")
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 4
    assert not history.interrupted and history.skipped == {}


def test_history_means_over_the_steps_of_an_iteration():
    lower, upper = build_modules("mlp", torch.float64)
    finetune = Finetune("finetune", lower, data=[token_batch(i) for i in range(6)], optimizer=sgd, unroll_steps=3)
    program = mlo.Program([Rate("rater", upper, data=[token_batch(9)], optimizer=sgd), finetune])
    losses: list[float] = []
    compute = program.trainers["finetune"].compute_gradient

    def spy(*args, **kwargs):
        result = compute(*args, **kwargs)
        losses.append(result.loss)
        return result

    program.trainers["finetune"].compute_gradient = spy
    program.run(2, progress=False)
    assert len(losses) == 6 and program.trainers["rater"].num_steps == 2
    assert program.history.column("loss/finetune") == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])


def test_loss_scaling_changes_nothing_but_the_range():
    """fp16's loss scaling, exercised in fp64: scaled gradients and hypergradients are unscaled again, exactly."""
    found = {}
    for scale in (1.0, 2.0**16):
        program = Problem().program(mlo.SAMA(), mlo.Single())
        for trainer in program.trainers.values():
            trainer.scaler = LossScaler(scale=scale, enabled=scale != 1.0, growth_interval=1)
        found[scale] = program.gradients()
    for level in ("rater", "finetune"):
        for name, t in found[1.0][level].items():
            torch.testing.assert_close(found[2.0**16][level][name], t, rtol=1e-12, atol=1e-15)
    assert program.trainers["rater"].scaler.scale == 2.0**17  # one good gradient, growth_interval 1


def test_an_overflow_halves_the_scale_and_skips_the_step():
    program = Problem(dtype=torch.float32).program(mlo.Identity(), mlo.Single())
    lower = program.trainers["finetune"]
    lower.scaler = LossScaler(scale=2.0**140)  # beyond fp32's range: overflows whatever it multiplies
    before = {n: t.clone() for n, t in lower.weights().items()}
    program.step()
    assert lower.scaler.scale == 2.0**139
    assert all(torch.equal(t, before[n]) for n, t in lower.weights().items())
    assert program.history.skipped == {}  # part of loss scaling, not an error
