"""Programs out of a grammar have the oracle's total gradients on every engine, and verification finds no fault."""

import importlib.util
import warnings
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

import scalemlo as mlo
from tests.generated import ProgramText, oracle_of, program_of, programs
from tests.oracle import NotPositiveDefinite
from tests.ranks import run_ranks

ENGINES = {"ddp": mlo.DDP, "fsdp": mlo.FSDP, "zero-1": partial(mlo.DeepSpeed, stage=1), "zero-3": mlo.DeepSpeed}
quiet = partial(
    settings,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
    report_multiple_bugs=False,
)


def gradients_of(program: mlo.Program) -> dict[str, list[torch.Tensor]]:
    """Whole, in the order of each level's parameters, equal on every rank."""
    found = {}
    for name, gradient in program.gradients().items():
        engine = program.trainers[name].engine
        whole = engine.gather(dict(gradient)) if engine.group is not None else gradient
        found[name] = [whole[n].double().cpu() for n in gradient]
    return found


def compare(text: ProgramText, found: dict[str, list[torch.Tensor]], limit: float) -> str | None:
    """What differs, in words."""
    expected = oracle_of(text).gradients()
    for name, gradients in expected.items():
        wanted, got = (torch.cat([g.reshape(-1) for g in x]) for x in (gradients, found[name]))
        error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-3))
        if not error <= limit:
            return f"level {name}: relative error {error:.1e}\n{text}"
    return None


def check(text: ProgramText, verify: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gradients_of(program_of(text, mlo.Single(), verify))
    try:
        wrong = compare(text, found, 1e-8)
    except NotPositiveDefinite:
        reject()
    assert wrong is None, wrong


@quiet(max_examples=200)
@given(programs(), st.sampled_from(("off", "first")))
def test_in_one_process(text, verify):
    check(text, verify)


@pytest.mark.full
@pytest.mark.timeout(7200)
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(), st.sampled_from(("off", "first")))
def test_many_in_one_process(text, verify):
    check(text, verify)


def on_engines(texts: list[ProgramText]) -> None:
    chosen = {n: e for n, e in ENGINES.items() if importlib.util.find_spec("deepspeed") or not n.startswith("zero")}

    def body(rank: int, world_size: int) -> list[str]:
        wrong = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for text in texts:
                for name, engine in chosen.items():
                    is_zero = name.startswith("zero")  # it keeps fp32 masters
                    dtype, limit = (torch.float32, 2e-4) if is_zero else (torch.float64, 1e-8)
                    found = gradients_of(program_of(text, engine(), "first", dtype))
                    try:
                        problem = compare(text, found, limit)
                    except NotPositiveDefinite:
                        continue
                    wrong += [f"{name}: {problem}"] if problem else []
        return wrong

    for wrong in run_ranks(body, 2, timeout_seconds=250):
        assert not wrong, "\n".join(wrong)


@quiet(max_examples=1)
@given(st.lists(programs(max_levels=3, engines=True), min_size=6, max_size=6))
def test_on_two_ranks(texts):
    on_engines(texts)


@pytest.mark.full
@pytest.mark.timeout(7200)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(programs(engines=True), min_size=5, max_size=5))
def test_many_on_two_ranks(texts):
    on_engines(texts)
