"""The same for models of transformers and adapters of PEFT, and for what comes on top of a step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

import scalemlo as mlo
from scalemlo.loop.listener import Listener
from tests.test_ghost import in_own_dtype
from tests.wrong.reference import ESTIMATORS, Case, Net, compare, program_of, squared, weight_net, weighted

SIZES = dict(
    vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, use_cache=False,
)  # fmt: skip
ADAPTERS = ["default", "b", "b", "__base__"]


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def checkpointed() -> nn.Module:
    model = llama()
    model.gradient_checkpointing_enable()
    return model.train()


def mixtral() -> nn.Module:
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    return model


def with_adapter(config: peft.PeftConfig) -> nn.Module:
    return peft.get_peft_model(llama(), config)


def mixed_adapters() -> nn.Module:
    def lora() -> peft.LoraConfig:
        return peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")

    model = with_adapter(lora())
    model.add_adapter("b", lora())
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return model.eval()


def activated() -> nn.Module:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], alora_invocation_tokens=[7, 8], task_type="CAUSAL_LM", init_lora_weights=False
    )
    return with_adapter(config)


ATTENTION = ["q_proj", "v_proj"]
MODELS = {
    "activation checkpointing of transformers": (checkpointed, {}),
    "auxiliary loss of a mixture of experts": (mixtral, {}),
    "adapters mixed in a batch": (mixed_adapters, {"adapter_names": ADAPTERS}),
    "activated LoRA": (activated, {}),
    "VeRA": (lambda: with_adapter(peft.VeraConfig(r=3, target_modules=["q_proj"])), {}),
    "VB-LoRA": (
        lambda: with_adapter(peft.VBLoRAConfig(r=2, topk=2, num_vectors=5, vector_length=8, target_modules=ATTENTION)),
        {},
    ),
    "DoRA": (lambda: with_adapter(peft.LoraConfig(r=2, target_modules=ATTENTION, use_dora=True)), {}),
}


def example_losses(net: Any, data: tuple[Tensor, Tensor], options: dict) -> Tensor:
    ids = ((data[0].flatten(1)[:, :9] + data[1][:, None]) * 7).abs().long() % 29
    ids[:, 3:5] = torch.tensor([7, 8])  # the tokens that activate an adapter
    out = net(input_ids=ids, **options)
    losses = F.cross_entropy(out.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    extra = getattr(out, "aux_loss", None)
    return losses if extra is None else losses + 0.5 * extra


def case_of(build: Callable[[], nn.Module], options: dict) -> Case:
    def make() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(1)
        net, top = build().double(), weight_net().double()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.2 * torch.randn(p.shape, dtype=p.dtype))
        return net, top

    def lower(net: Any, top: Any, data: tuple[Tensor, Tensor]) -> Tensor:
        return mlo.weighted_mean(example_losses(net, data, options), top(data[1].unsqueeze(-1)).squeeze(-1))

    return Case(make, lower, lambda net, data: example_losses(net, data, options).mean())


@pytest.fixture(autouse=True)
def norms_in_their_own_dtype(monkeypatch):
    """They compute in fp32 inside, whose rounding would be all that small differences show."""
    for kind in (LlamaRMSNorm, MixtralRMSNorm):
        monkeypatch.setattr(kind, "forward", in_own_dtype)


ROUGH = ("auxiliary loss of a mixture of experts",)
"""Its router computes in fp32."""
HELD = ("DoRA",)
"""Its norms are stop-gradients: held by second derivatives, moved by differences over a step."""


@pytest.mark.parametrize("way", ["products", "forward derivative", "unrolled"])
@pytest.mark.parametrize("name", MODELS)
def test_against_live_differences(name, way):
    if name in HELD and way == "unrolled":
        return
    radius, limit = (1e-2, 2e-3) if name in ROUGH else (1e-3, 2e-5)
    found, expected = compare(case_of(*MODELS[name]), ESTIMATORS[way], radius=radius)
    assert abs(expected) > 1e-6, "a program that shows nothing"
    assert found == pytest.approx(expected, rel=limit)


def test_randlora_is_refused_by_the_name_of_its_function():
    case = case_of(lambda: with_adapter(peft.RandLoraConfig(r=3, target_modules=["q_proj"])), {})
    with pytest.raises(mlo.DerivativeError, match="without a forward derivative.*It came from .*randlora"):
        program_of(case, mlo.Identity(mixed="forward")).gradients()
    program_of(case, mlo.Penalty(learning_rate=0.1)).step()


# ---- what comes on top of a step -------------------------------------------------------------------------------------
def program_with(**changes: Any) -> mlo.Program:
    def make() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(1)
        return Net().double(), weight_net().double()

    return program_of(Case(make, weighted, squared), mlo.Identity(), **changes)


def test_a_hook_that_changes_gradients_before_the_step_is_refused():
    program = program_with()
    optimizer = program.trainers["low"].optimizer

    def mask(*_: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)

    handle = optimizer.register_step_pre_hook(mask)
    before = [p.clone() for p in program.trainers["low"].engine.module.parameters()]
    with pytest.raises(mlo.DerivativeError, match="level 'low': a step_pre_hook.*weight.register_hook"):
        program.step()
    assert all(map(torch.equal, before, program.trainers["low"].engine.module.parameters()))
    handle.remove()
    program.step()


def test_a_hook_that_changes_weights_after_the_step_is_refused():
    program = program_with()
    optimizer = program.trainers["low"].optimizer

    def clamp(*_: Any) -> None:
        with torch.no_grad():
            for p in optimizer.param_groups[0]["params"]:
                p.clamp_(-0.1, 0.1)

    optimizer.register_step_post_hook(clamp)
    with pytest.raises(mlo.DerivativeError, match="level 'low': a step_post_hook.*torch.nn.utils.parametrize"):
        program.step()


def test_hooks_that_only_look_are_fine():
    program, seen = program_with(), []
    for trainer in program.trainers.values():
        trainer.optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
        trainer.optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    program.step()
    assert sorted(seen) == ["post", "post", "pre", "pre"]


# ---- values that steps carry in buffers ------------------------------------------------------------------------------
def spectral() -> nn.Module:
    net = Net()
    net.head = torch.nn.utils.parametrizations.spectral_norm(net.head)
    return net


def test_buffers_that_carry_weights_from_step_to_step_are_refused_by_unrolling():
    def make() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(1)
        return spectral().double(), weight_net().double()

    case = Case(make, weighted, squared)
    with pytest.raises(mlo.DerivativeError, match="writes values that depend on the weights into.*holds_buffers"):
        program_of(case, mlo.Unrolled()).gradients()
    program_of(case, mlo.Unrolled(holds_buffers=True)).gradients()
    found, expected = compare(case, mlo.Identity(mixed="forward"))
    assert found == pytest.approx(expected, rel=2e-6)


# ---- reduced precision -----------------------------------------------------------------------------------------------
def test_blocks_run_again_under_autocast():
    """In bf16 a block that is run again in fp32 gives another loss: the comparison with the live one would say so."""

    def make() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(1)
        return Net(), weight_net()

    seen = []

    class Low(mlo.Level):
        def loss(self, batch, top):
            out = self.module(batch[0].float())
            seen.append(out.dtype)
            losses = (out.flatten(1).mean(1).float() - batch[1].float()).square()
            return mlo.weighted_mean(losses, top(batch[1].float().unsqueeze(-1)).squeeze(-1))

    class Top(mlo.Level):
        def loss(self, batch, low):
            return low(batch[0].float()).float().square().mean()

    net, top = make()
    data = [(torch.randn(4, 3, 5), torch.randn(4))]
    sgd = partial(torch.optim.SGD, lr=0.1)
    levels = [
        Top("top", top, data=data, optimizer=sgd),
        Low(
            "low",
            net,
            data=data,
            optimizer=sgd,
            hypergradient=mlo.Neumann(num_terms=2, step_size=0.1, products="remat"),
        ),
    ]
    mlo.Program(levels, engine=mlo.Single(dtype="bf16"), verify="always").run(2, progress=False)
    assert set(seen) == {torch.bfloat16}


# ---- steps that are taken again --------------------------------------------------------------------------------------
def test_replayed_steps_end_where_the_live_ones_did():
    """A callback that writes into weights between two steps is no part of what is differentiated."""

    def make() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(1)
        return Net().double(), weight_net().double()

    program = program_of(Case(make, weighted, squared), mlo.Unrolled())
    program.step()

    class Writes(Listener):
        def on_level_step(self, level: str, loss: float) -> None:
            if level == "low":
                with torch.no_grad():
                    program.trainers["low"].engine.module.head.bias.add_(0.1)

    program.listener = Writes()
    with pytest.raises(mlo.DerivativeError, match=r"'low': its last 2 step\(s\), taken again.*a callback writes"):
        program.step()
