"""Plans: sizes, the tracker in closed form, simulated ranks against arithmetic and against real ones."""

import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import scalemlo as mlo
from scalemlo.cli.main import main
from scalemlo.derivatives.products import LossAt
from scalemlo.memory.bytes_tracker import MemoryTracker, PhaseUse
from scalemlo.memory.sizes import format_bytes, parse_bytes
from scalemlo.planning import simulate
from scalemlo.planning.advice import Change, cheapest_fit
from scalemlo.planning.depth import at_depth
from scalemlo.planning.plan import simulated_layers
from scalemlo.planning.planner import plan
from scalemlo.planning.simulate import run_iterations
from tests.problems import Finetune, Rate, weight_net
from tests.ranks import run_ranks
from tests.tiny_recipe import write_recipe

WIDTH, VOCAB, LENGTH, BATCH = 32, 64, 8, 8


def build_model(num_layers):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=4, use_cache=False,
            num_hidden_layers=num_layers, num_key_value_heads=2, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip


def build_adapters(num_layers):
    """LayerNorms that nothing moves, behind adapters that something does."""
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_head=4, n_layer=num_layers, n_positions=LENGTH, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True))


def build(engine=mlo.FSDP, estimator=mlo.Identity, num_layers=2, batch=BATCH, build_model=build_model, **options):
    model = build_model(simulated_layers(num_layers))
    data = [{"input_ids": torch.randint(1, VOCAB, (batch, LENGTH))}]
    rate = Rate("rater", weight_net(), data=data, optimizer=partial(torch.optim.SGD, lr=0.1))
    lower = Finetune(
        "finetune",
        model,
        data=data,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        hypergradient=estimator(),
        **options,
    )
    return mlo.Program([rate, lower], engine=engine())


# ---- sizes ---------------------------------------------------------------------------------------------------------
def test_sizes_are_read_and_written():
    assert [parse_bytes(x) for x in ("80GiB", "70 gb", "1.5e3", 12)] == [80 * 2**30, 70 * 10**9, 1500, 12]
    assert format_bytes(22.3 * 2**30) == "22.3 GiB" and format_bytes(17) == "17 B"
    with pytest.raises(ValueError, match="memory='3 GX' has an unknown unit; the units are B, kB, .*TiB"):
        parse_bytes("3 GX", "memory")
    for wrong in ("much", "-1GiB", 0, True):
        with pytest.raises(ValueError, match="positive size"):
            parse_bytes(wrong)


# ---- the tracker -----------------------------------------------------------------------------------------------------
def test_tracker_counts_each_storage_from_birth_to_death():
    tracker = MemoryTracker()
    with tracker:
        kept = torch.zeros(100)  # 400 B
        tracker.tag(kept, "weights")
        left = torch.zeros(10)  # 40 B
        with tracker.phase("level/phase") as phase:
            a = torch.zeros(250)  # 1000 B
            a.view(10, 25).add_(1)
            del a
            b = torch.zeros(50) + 0  # 200 B, twice for a moment
        assert tracker.total == 400 + 40 + 200
        b.untyped_storage().resize_(0)
        assert tracker.total == 400 + 40
    peak = phase.peak
    assert (peak["weights"], peak["carried"], peak["working"]) == (400, 40, 1000)
    assert (phase.persistent_bytes, phase.transient_bytes, phase.peak_bytes) == (400, 1040, 1440)
    assert torch.UntypedStorage.resize_.__name__ == "resize_" and left.sum() == 0


def test_tracker_counts_matrix_products_forwards_and_backwards():
    tracker = MemoryTracker()
    with tracker, tracker.phase("p") as phase:
        (torch.ones(4, 5) @ nn.Parameter(torch.ones(5, 6))).sum().backward()
    assert phase.flops == 2 * 2 * 4 * 5 * 6  # the input has no gradient


# ---- plans -----------------------------------------------------------------------------------------------------------
def test_persistent_bytes_are_three_copies_of_the_shards():
    found = plan(build, world_size=8, device_memory="1GiB")
    parameters = list(build_model(2).parameters())
    upper = sum(p[0].numel() * -(-p.shape[0] // 8) for p in weight_net().parameters())  # rows, padded
    expected = 4 * (3 * sum(p.numel() for p in parameters) // 8 + upper)
    assert 0 <= found.persistent_bytes - expected <= 4 * len(parameters) + 256  # step counters, rotary frequencies
    assert found.fits and found.peak_bytes > found.persistent_bytes
    assert found.first_peak_bytes <= found.peak_phase.peak_bytes  # nothing of whole shapes, as DTensor tries once
    assert max(phase.num_collectives.get("all-gather", 0) for phase in found.phases) > 0
    assert not dist.is_initialized() and nn.Module._apply.__module__ == "torch.nn.modules.module"


@pytest.mark.parametrize("build_model", [build_model, build_adapters])
def test_phases_and_peaks_are_those_of_a_real_run_on_two_ranks(build_model):
    program = partial(build, estimator=partial(mlo.Identity, mixed="forward"), build_model=build_model)

    def iterations(rank, world_size):
        found = []
        for _ in range(4):
            tracker = MemoryTracker()
            with tracker:
                found.append(run_iterations(program(), tracker)[1])
        return found

    planned = plan(program, world_size=2, accelerator=False).phases
    # A thread of gloo that is late holds a gathered buffer beyond the collective's end: of some runs, the least.
    real = [min(runs, key=lambda p: p.peak_bytes) for runs in zip(*run_ranks(iterations, 2)[0], strict=True)]
    for phase, measured in zip(planned, real, strict=True):
        for field in ("name", "persistent_bytes", "flops", "num_collectives"):
            assert getattr(phase, field) == getattr(measured, field), (phase.name, field)
        assert phase.peak_bytes == pytest.approx(measured.peak_bytes, abs=2048)  # batches: the run's stood there before


@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(mlo.Identity, marks=pytest.mark.full),
        pytest.param(mlo.SAMA, marks=pytest.mark.full),
        pytest.param(partial(mlo.Neumann, num_terms=2), marks=pytest.mark.full),
    ],
)
def test_deep_plans_are_those_of_all_layers(estimator, monkeypatch):
    monkeypatch.setattr("scalemlo.planning.plan.DEPTHS", (2, 3, 4))
    shallow = plan(partial(build, num_layers=7, estimator=estimator), world_size=2, num_layers=7)
    full = plan(partial(build, num_layers=7, estimator=estimator), world_size=2)
    assert shallow.depths and not full.depths
    for a, b in zip(shallow.phases, full.phases, strict=True):
        assert (a.name, a.flops, a.sent_bytes) == (b.name, pytest.approx(b.flops), pytest.approx(b.sent_bytes))
        assert dict(a.num_collectives) == pytest.approx(dict(b.num_collectives))
        assert a.peak_bytes == pytest.approx(b.peak_bytes, rel=1e-3)


@pytest.mark.parametrize(
    "estimator, unroll_steps",
    [
        (partial(mlo.Neumann, num_terms=3), 1),
        (mlo.Unrolled, 3),
        # Keeps what each product gives.
        pytest.param(partial(mlo.Nystrom, rank=4), 1, marks=pytest.mark.full),
        pytest.param(partial(mlo.ConjugateGradient, max_steps=4, damping=1.0), 1, marks=pytest.mark.full),
    ],
)
def test_derivatives_that_are_alike_need_be_simulated_only_twice(estimator, unroll_steps, monkeypatch):
    differentiate, calls = LossAt._differentiate, []
    monkeypatch.setattr(LossAt, "_differentiate", lambda *args: calls.append(1) or differentiate(*args))
    program = partial(build, estimator=estimator, unroll_steps=unroll_steps, num_layers=1)
    replayed, num_run = plan(program, world_size=2), len(calls)
    monkeypatch.setattr(simulate, "replayed_derivatives", lambda tracker: nullcontext())
    each = plan(program, world_size=2)
    assert num_run < len(calls) - num_run
    numbers, expected = replayed.as_dict(), each.as_dict()
    for phase in (*numbers["phases"], *expected["phases"]):  # an earlier phase's bytes may die in either of the calls
        phase["transient_bytes"] = phase.pop("carried_bytes") + phase.pop("working_bytes")
    assert numbers == expected


def test_what_is_no_line_is_not_extrapolated():
    phases = [PhaseUse("p", flops=f) for f in (1.0, 2.0, 4.0)]
    with pytest.raises(ValueError, match="FLOPs of p is 1, 2, 4"):
        at_depth(9, (1, 2, 3), [[p] for p in phases])


def test_wrong_input_is_refused_as_in_a_run():
    with pytest.raises(ValueError, match="cannot be split evenly over 3 ranks"):
        plan(build, world_size=3)
    with pytest.raises(ValueError, match="world_size=0"):
        plan(build, world_size=0)
    assert not dist.is_initialized()


# ---- the command -----------------------------------------------------------------------------------------------------
def test_command_plans_advises_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    run = str(write_recipe(tmp_path) / "run.yaml")
    words = [run, "model.lora=null", "train.unroll_steps=1", "--world-size", "2"]
    out = tmp_path / "plan.json"
    assert main(["plan", *words, "--device-memory", "1GiB", "--json", str(out), "--show", "phases"]) == 0
    assert "fits: peak" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["fits"] and {p["name"] for p in found["phases"]} > {"rater/direct gradient", "finetune/step"}
    assert (tmp_path / "run" / "plan_phases.png").read_bytes()[:4] == b"\x89PNG"
    too_small = str(int(found["peak_bytes"] * 0.9))
    assert main(["plan", *words, "--device-memory", too_small]) == 1
    said = capsys.readouterr().out
    assert "does not fit" in said and "it fits: peak" in said and "of the time" in said
    assert main(["plan", *words, "--device-memory", "3 GX"]) == 2
    assert "unknown unit" in capsys.readouterr().err


def test_advice_takes_the_fastest_that_fits_and_pairs_where_no_single_change_does():
    class Fake:
        def __init__(self, peak, seconds):
            self.peak_bytes, self.seconds, self.fits = peak, seconds, peak <= 10

    a, b, c = (Change(((key, 1),)) for key in "abc")
    sizes = {a: (12, 1.0), b: (15, 2.0), c: (16, 1.0), a + b: (9, 3.0), a + c: (8, 2.0)}

    def simulate(change):
        if change not in sizes:
            raise ValueError
        return Fake(*sizes[change])

    best, tried = cheapest_fit(simulate, [a, b, c])
    assert best.change == a + c and len(tried) == 5
