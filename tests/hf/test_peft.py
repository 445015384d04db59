"""Adapters: what the gated layer computes, orthogonality terms, conversions; and their derivatives on shards."""

from functools import partial

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import scalemlo as mlo
from scalemlo.autodiff.safety import find_foreign_kernel
from scalemlo.hf.models.models import LoraSpec
from scalemlo.hf.models.peft import (
    KINDS,
    GatedLinear,
    adapted_layers,
    add_adapters,
    add_orthogonality,
    chosen_ranks,
    direction_orthogonality,
    factor_orthogonality,
    gated_to_lora,
)
from tests.problems import BATCH, Vector, example_losses, full_tensors, llama, relative_error, token_batch
from tests.ranks import run_ranks
from tests.test_gradients import RMSNorm

SPEC = LoraSpec(r=4, alpha=8, target_modules=("q_proj", "v_proj"))
sgd = partial(torch.optim.SGD, lr=0.1)


def adapted(kind: str, dtype: torch.dtype = torch.float64, base: torch.dtype | None = None, **options) -> PeftModel:
    """A tiny Llama with adapters that do something, the same on every call."""
    torch.manual_seed(3)
    model = llama()
    for m in model.modules():
        if isinstance(m, LlamaRMSNorm):
            m.__class__ = RMSNorm  # transformers' goes through fp32 in any dtype
    model = moved(add_adapters(moved(model), SPEC, kind, **options))
    for p in model.parameters():
        p.data = p.data.to(dtype if p.requires_grad else base or dtype)
    return model


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """Away from zeros and symmetries, by draws in fp32, so that every dtype has the same numbers."""
    torch.manual_seed(4)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return module


# ---- closed forms ----------------------------------------------------------------------------------------------------
def test_gated_layer_equals_its_formula_and_lora_at_the_start():
    model = adapted("gated")
    layer = next(m for m in model.modules() if isinstance(m, GatedLinear))
    a, b, e = (p["default"] for p in (layer.lora_A, layer.lora_B, layer.lora_E))
    update = SPEC.alpha * b @ torch.diag(e.squeeze(1).softmax(0)) @ a
    x = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + update).T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.get_delta_weight("default"), update, rtol=1e-12, atol=1e-12)
    fresh = add_adapters(llama(), SPEC, "gated")
    with fresh.disable_adapter():
        pretrained = fresh(**token_batch(0)).logits
    torch.testing.assert_close(fresh(**token_batch(0)).logits, pretrained, rtol=0, atol=0)


def test_conversion_to_lora_computes_the_same():
    gated, lora = adapted("gated"), adapted("lora")
    state = gated_to_lora({n: p for n, p in gated.named_parameters() if p.requires_grad})
    assert set(state) == {n for n, p in lora.named_parameters() if p.requires_grad}
    lora.load_state_dict(state, strict=False)
    expected = gated(**token_batch(0)).logits
    torch.testing.assert_close(lora(**token_batch(0)).logits, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gated.merge_and_unload()(**token_batch(0)).logits, expected, rtol=1e-12, atol=1e-12)


def test_ranks_are_the_numbers_of_gates_above_the_mean():
    model = adapted("gated")
    logits = [[0.0, 0, 0, 0], [9, 0, 0, 0], [9, 9, 0, 0], [3, 2.9, 2.8, -9]]
    with torch.no_grad():
        for layer, values in zip(adapted_layers(model).values(), logits, strict=True):
            layer.lora_E["default"].copy_(torch.tensor(values).unsqueeze(1))
    ranks = chosen_ranks(model.state_dict())
    assert list(ranks.values()) == [4, 1, 2, 3]
    layers = adapted_layers(add_adapters(llama(), SPEC, "lora", ranks=ranks))
    assert [layer.lora_A["default"].weight.shape[0] for layer in layers.values()] == [4, 1, 2, 3]
    assert {layer.scaling["default"] for layer in layers.values()} == {SPEC.alpha / SPEC.r}


@pytest.mark.parametrize("kind", ["dora", "gated"])
def test_orthogonality_equals_its_formula(kind):
    model = adapted(kind)
    terms = []
    for layer in adapted_layers(model).values():
        if kind == "dora":
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            v = layer.base_layer.weight + 2 * b @ a
            d = v / v.norm(dim=1, keepdim=True)
            terms.append((d @ d.T - torch.eye(len(d))).square().sum().sqrt())
        else:
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            eye = torch.eye(SPEC.r)
            terms.append((b.T @ b - eye).square().sum() + (a @ a.T - eye).square().sum())
    before = model(**token_batch(0)).logits
    add_orthogonality(model, direction_orthogonality if kind == "dora" else factor_orthogonality)
    torch.testing.assert_close(model.orthogonality(), torch.stack(terms).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(model(**token_batch(0)).logits, before, rtol=0, atol=0)
    assert isinstance(model, PeftModel)


def test_orthogonal_factors_have_no_term():
    model = adapted("gated")
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            torch.nn.init.orthogonal_(layer.lora_A["default"])
            torch.nn.init.orthogonal_(layer.lora_B["default"])
    assert float(add_orthogonality(model, factor_orthogonality).orthogonality().detach()) < 1e-20


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="kind .'lorra'. must be one of lora, dora, adalora, gated"):
        add_adapters(llama(), SPEC, "lorra")
    with pytest.raises(ValueError, match="ranks .1 of them. need kind 'lora' or 'dora', not 'gated'"):
        add_adapters(llama(), SPEC, "gated", ranks={"q_proj": 2})


def test_quantised_base_is_refused_with_the_way_out():
    """A stand-in for bitsandbytes' layer, whose module is what the check goes by."""
    model = adapted("lora")
    layer = next(iter(adapted_layers(model).values())).base_layer
    layer.__class__ = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    message = find_foreign_kernel(model)
    assert "q_proj.base_layer (Linear4bit) computes in kernels of 'bitsandbytes'" in message
    assert "bf16 instead of quantised; with LoRA, the base may stay frozen in bf16" in message


# ---- derivatives: reweighting above adapters, and levels inside them -------------------------------------------------
class Reweighted(mlo.Level):
    def loss(self, batch, top):
        return mlo.weighted_mean(example_losses(self.module, batch), top()[batch["index"]].sigmoid())


class Rate(mlo.Level):
    def loss(self, batch, low):
        return mlo.mean(example_losses(low, batch))


class Inside(mlo.Level):
    def loss(self, batch, top):
        return mlo.mean(example_losses(self.module, batch)) + 0.3 * self.module.orthogonality()


def reweighting(kind: str, dtype: torch.dtype, base: torch.dtype | None = None) -> list[mlo.Level]:
    """A table of weights above an adapted model."""
    lower = adapted(kind, dtype, base)
    table = Vector(torch.linspace(-1, 1, BATCH, dtype=dtype))
    return [
        Rate("top", table, data=[token_batch(1)], optimizer=sgd),
        Reweighted("low", lower, data=[token_batch(2) | {"index": torch.arange(BATCH)}], optimizer=sgd),
    ]


def divided(kind: str, owned: str, term, dtype: torch.dtype) -> list[mlo.Level]:
    """Two levels in one adapted model, with an orthogonality term."""
    model = add_orthogonality(adapted(kind, dtype), term)
    low = Inside("low", model, data=[token_batch(2)], optimizer=sgd, parameters=lambda n: owned not in n)
    return [Rate("top", model, data=[token_batch(1)], optimizer=sgd, parameters=f"*{owned}*"), low]


def cases(dtype: torch.dtype):
    found = {kind: partial(reweighting, kind, dtype) for kind in KINDS}
    found["magnitudes above directions"] = partial(
        divided, "dora", "lora_magnitude_vector", direction_orthogonality, dtype
    )
    found["gates above factors"] = partial(divided, "gated", "lora_E", factor_orthogonality, dtype)
    return found


def measured(levels: list[mlo.Level], spec: mlo.engines.EngineSpec) -> dict[str, Tensor]:
    program = mlo.Program(levels, engine=spec)
    gradients = program.gradients()
    return {f"{k}.{n}": t for k, v in gradients.items() for n, t in full_tensors(program.trainers[k], v).items()}


def reference(levels: list[mlo.Level]) -> dict[str, Tensor]:
    """``dF/dx - d/dx <dL/dw, dF/dw>`` and ``dL/dw``, by double backward on the plain modules in one process."""
    top, low = levels
    w = {n: p for n, p in low._module.named_parameters() if n in low.owned_parameters()}
    x = {n: p for n, p in top._module.named_parameters() if n in top.owned_parameters()}
    optional = dict(allow_unused=True, materialize_grads=True)
    with sdpa_kernel(SDPBackend.MATH):
        inner = low.loss(low.data[0], top._module)
        gradient = torch.autograd.grad(inner, list(w.values()), create_graph=True)
        outer = top.loss(top.data[0], low._module)
        v = torch.autograd.grad(outer, list(w.values()), retain_graph=True)
        direct = torch.autograd.grad(outer, list(x.values()), **optional)
        product = sum((g * u).sum() for g, u in zip(gradient, v, strict=True))
        mixed = torch.autograd.grad(product, list(x.values()), **optional)
    expected = {f"top.{n}": d - m for n, d, m in zip(x, direct, mixed, strict=True)}
    return expected | {f"low.{n}": g.detach() for n, g in zip(w, gradient, strict=True)}


def part(tensors: dict[str, Tensor], level: str) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if n.startswith(level)}


def check(found: dict[str, dict[str, Tensor]], tolerance: float) -> None:
    for case, make in cases(torch.float64).items():
        expected = reference(make())
        assert set(found[case]) == set(expected), case
        for level in ("top", "low"):
            assert relative_error(part(found[case], level), part(expected, level)) < tolerance, (case, level)


def all_cases(spec: mlo.engines.EngineSpec) -> dict[torch.dtype, dict[str, dict[str, Tensor]]]:
    return {
        dtype: {case: measured(make(), spec) for case, make in cases(dtype).items()}
        for dtype in (torch.float64, torch.float32)
    }


def test_gradients_equal_double_backward_in_one_process():
    found = all_cases(mlo.Single())
    check(found[torch.float64], 1e-10)
    check(found[torch.float32], 1e-5)


def test_gradients_equal_double_backward_on_two_ranks():
    """And a frozen bf16 base: two ranks as one process, the same up to the rounding of bf16."""

    def body(rank, world_size):
        bf16 = measured(reweighting("lora", torch.float32, torch.bfloat16), mlo.FSDP())
        return all_cases(mlo.FSDP()), bf16

    single = measured(reweighting("lora", torch.float32, torch.bfloat16), mlo.Single())
    for found, bf16 in run_ranks(body, 2, timeout_seconds=300):
        check(found[torch.float64], 1e-10)
        check(found[torch.float32], 1e-5)
        assert all(t.dtype == torch.float32 for t in bf16.values())
        assert relative_error(part(bf16, "low"), part(single, "low")) < 2e-2
        assert relative_error(part(bf16, "top"), part(single, "top")) < 2e-2
