"""Everything that has no second derivative, or a wrong one, is switched to a safe form or refused by name."""

import copy
import sys
import types
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from scalemlo.autodiff.attention import NAMES
from scalemlo.autodiff.errors import DerivativeError
from scalemlo.autodiff.operations import evaluation
from scalemlo.autodiff.remat import remat
from scalemlo.autodiff.safety import FOREIGN_KERNELS, find_foreign_kernel, make_safe
from scalemlo.autodiff.skeleton import Lender, Skeleton

SMALL = dict(
    vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=24, pad_token_id=0,
)  # fmt: skip


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL))


def mixtral() -> nn.Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1))


# ---- switched on the skeleton --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("live", "safe"),
    [
        ("flash_attention_2", NAMES["sdpa"]),
        ("flash_attention_3", NAMES["sdpa"]),
        ("flex_attention", NAMES["sdpa"]),
        ("paged|flash_attention_2", NAMES["sdpa"]),
        ("kernels-community/flash-attn", NAMES["sdpa"]),
        ("sdpa", NAMES["sdpa"]),
        ("eager", NAMES["eager"]),
    ],
)
def test_attention_is_switched_on_the_skeleton_alone(live: str, safe: str) -> None:
    model = llama()
    model.config._attn_implementation_internal = live  # its kernel need not be installed
    skeleton = Skeleton(model)
    assert skeleton.module.config._attn_implementation == safe
    assert skeleton.module.model.layers[0].self_attn.config._attn_implementation == safe
    assert model.config._attn_implementation == live


def test_attention_registered_by_the_user_is_left_alone() -> None:
    tf.AttentionInterface.register("of_a_user", lambda *args, **kwargs: None)
    try:
        model = llama()
        model.config._attn_implementation_internal = "of_a_user"
        assert Skeleton(model).module.config._attn_implementation == "of_a_user"
    finally:
        del tf.AttentionInterface._global_mapping["of_a_user"]


def test_models_without_sdpa_become_eager() -> None:
    model = tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL))
    model.config._attn_implementation_internal = "flash_attention_2"
    assert Skeleton(model).module.config._attn_implementation == NAMES["eager"]


@pytest.mark.parametrize(
    ("live", "safe"), [("grouped_mm", "eager"), ("deepgemm", "eager"), ("eager", "eager"), ("batched_mm", "batched_mm")]
)
def test_experts_are_switched_on_the_skeleton_alone(live: str, safe: str) -> None:
    model = mixtral()
    model.config._experts_implementation_internal = live
    assert Skeleton(model).module.config._experts_implementation == safe
    assert model.config._experts_implementation == live


def test_checkpointing_and_compilation_are_switched_off_on_the_skeleton_alone() -> None:
    model = llama()
    model.gradient_checkpointing_enable()
    model.compile()
    safe = Skeleton(model).module
    assert not any(getattr(m, "gradient_checkpointing", False) for m in safe.modules())
    assert all(m._compiled_call_impl is None for m in safe.modules())
    assert model.is_gradient_checkpointing and model._compiled_call_impl is not None


# ---- refused -------------------------------------------------------------------------------------------------------
def test_a_module_wrapped_by_compile_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"net is wrapped by torch.compile.*module.compile\(\)"):
        Skeleton(nn.ModuleDict({"net": torch.compile(nn.Linear(2, 2))}))


def foreign_class() -> nn.Module:
    """A layer out of a package of kernels."""
    return nn.Sequential(type("RMSNorm", (nn.Linear,), {"__module__": "liger_kernel.transformers.rms_norm"})(2, 2))


def foreign_forward() -> nn.Module:
    """A layer whose forward was replaced, as patches of instances do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    forward.__module__ = "liger_kernel.transformers.swiglu"
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].forward = types.MethodType(forward, net[0])
    return net


def quantised_layer() -> nn.Module:
    return nn.Sequential(type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})(2, 2))


def quantised_weight() -> nn.Module:
    net = nn.Linear(2, 2)
    net.weight.__class__ = type("Params4bit", (nn.Parameter,), {"__module__": "bitsandbytes.nn.modules"})
    return net


def flagged(name: str) -> nn.Module:
    net = nn.Linear(2, 2)
    setattr(net, name, True)
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign_class, "0 .RMSNorm. computes in kernels of 'liger_kernel'.*use_liger_kernel=False"),
        (foreign_forward, "0 .Linear. computes in kernels of 'liger_kernel'"),
        (quantised_layer, "Linear4bit.*'bitsandbytes'.*bf16 instead of quantised"),
        (quantised_weight, "'bitsandbytes'"),
        (lambda: flagged("is_quantized"), "is_quantized=True.*bf16"),
        (lambda: flagged("_use_kernels"), "use_kernels=False"),
    ],
)
def test_kernels_without_derivatives_are_refused_in_derivatives_but_not_for_values(
    make: Callable[[], nn.Module], message: str
) -> None:
    model = make()
    skeleton = Skeleton(model)
    shards = {n: p.detach() for n, p in model.named_parameters()}
    for form in ("dual", "graph"):
        with pytest.raises(DerivativeError, match=message), skeleton.lent(Lender(shards, dict, form=form)):
            pass
    with torch.no_grad(), skeleton.lent(Lender(shards, dict)):
        torch.testing.assert_close(skeleton.call("forward", (torch.eye(2),), {}), model(torch.eye(2)))


def test_ordinary_models_are_not_refused() -> None:
    assert not FOREIGN_KERNELS.keys() & {"torch", "transformers", "peft"}
    assert all(find_foreign_kernel(model) is None for model in (llama(), mixtral(), nn.Linear(2, 2)))


# ---- single operations ---------------------------------------------------------------------------------------------
def hvp(function: Callable[[Tensor], Tensor], x: Tensor, d: Tensor) -> Tensor:
    def watched(x: Tensor) -> Tensor:
        with evaluation("dual").active():
            return function(x)

    with fwAD.dual_level():
        return fwAD.unpack_dual(torch.func.grad(watched)(fwAD.make_dual(x, d))).tangent.detach()


def hvp_retained(function: Callable[[Tensor], Tensor], x: Tensor, d: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    with evaluation("graph").active():
        value = function(x)
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    return torch.autograd.grad(gradient, x, d)[0]


def difference(function: Callable[[Tensor], Tensor], x: Tensor, d: Tensor) -> Tensor:
    h = 1e-5
    gradient = torch.func.grad(function)
    return (gradient(x + h * d) - gradient(x - h * d)) / (2 * h)


TARGET = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mse_loss": lambda x: F.mse_loss(x**2, TARGET),
    "mse_loss, sum": lambda x: F.mse_loss(TARGET, x**2, reduction="sum"),
    "mse_loss, none": lambda x: nn.MSELoss(reduction="none")(x**2, TARGET).sin().sum(),
    "weight_norm": lambda x: torch._weight_norm(x, x[:, :1].exp(), 0).sin().sum(),
    "weight_norm, last": lambda x: torch._weight_norm(x, x[:1].exp(), 1).sin().sum(),
    "weight_norm, whole": lambda x: torch._weight_norm(x, x[0, 0].exp(), -1).sin().sum(),
}


@pytest.mark.parametrize("product", [hvp, hvp_retained])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_put_right(name: str, product: Callable) -> None:
    function = OPERATIONS[name]
    torch.manual_seed(0)
    x, d = torch.randn(2, 5, 3, dtype=torch.float64)
    with evaluation("dual").active():
        watched_value = function(x)
    torch.testing.assert_close(watched_value, function(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(product(function, x, d), difference(function, x, d), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("drop", [F.dropout, F.alpha_dropout])
def test_masks_of_transposed_tensors_are_replayed_and_those_of_the_live_pass(drop: Callable, inplace: bool) -> None:
    """Inside torch.func masks are filled in the order of indices, outside in that of memory."""

    def unit(x: Tensor) -> Tensor:
        return drop((2 * x).t(), 0.5, True, inplace)

    x = torch.randn(40, 30, dtype=torch.float64)
    state = torch.get_rng_state()
    live = unit(x.clone().requires_grad_())
    torch.set_rng_state(state)
    out, pull = torch.func.vjp(lambda x: remat(unit, x), x)
    torch.testing.assert_close(out, live.detach(), rtol=1e-12, atol=1e-12)
    torch.set_rng_state(state)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(unit(leaf).sum(), leaf)
    torch.testing.assert_close(pull(torch.ones_like(out))[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("call", [torch.Tensor.scatter_reduce, torch.scatter_reduce, torch.Tensor.scatter_reduce_])
def test_products_by_scatter_are_refused(call: Callable) -> None:
    index = torch.zeros(2, 3, dtype=torch.long)
    with evaluation("dual").active():
        assert call(torch.ones(2, 3), 1, index, torch.ones(2, 3), "sum").sum() == 12
        for arguments, options in (
            ((1, index, torch.ones(2, 3), "prod"), {}),
            ((1, index, torch.ones(2, 3)), {"reduce": "prod"}),
        ):
            with pytest.raises(DerivativeError, match="scatter_reduce.*logarithms"):
                call(torch.ones(2, 3), *arguments, **options)


def test_the_copy_is_all_that_is_changed() -> None:
    model = mixtral()
    before = copy.deepcopy(model.config.to_dict())
    make_safe(copy.deepcopy(model))
    assert model.config.to_dict() == before
    assert "liger_kernel" not in sys.modules
