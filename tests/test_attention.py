"""Attention in chunks of queries equals attention at once, in values and derivatives, in less memory."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import transformers as tf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scalemlo.autodiff import attention
from scalemlo.autodiff.attention import NAMES, chunked_eager, chunked_sdpa
from scalemlo.autodiff.remat import remat
from scalemlo.autodiff.safety import make_safe

CHUNK, LENGTH, HEADS = 4, 11, 4


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "QUERY_CHUNK", CHUNK)
    with sdpa_kernel(SDPBackend.MATH):
        yield


def at_once(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Run with one chunk."""
    before, attention.QUERY_CHUNK = attention.QUERY_CHUNK, 10**6
    try:
        return function(*args)
    finally:
        attention.QUERY_CHUNK = before


def second_derivative(function: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    """Value, gradient and its tangent, as the library takes them."""
    torch.manual_seed(5)
    tangents = [torch.randn_like(x) for x in args]
    with fwAD.dual_level():
        duals = [fwAD.make_dual(x, d) for x, d in zip(args, tangents, strict=True)]
        out, pull = torch.func.vjp(function, *duals)
        gradients = pull(torch.ones_like(out).cumsum(-1))
        parts = [x for g in (out, *gradients) for x in fwAD.unpack_dual(g)]
    return [x.detach() for x in parts]


def layer(causal: bool = True, groups: int = 2) -> nn.Module:
    """What the functions read of a layer, from a file with an eager function that knows soft caps."""
    config = tf.Gemma2Config(
        hidden_size=16, num_attention_heads=HEADS, num_key_value_heads=HEADS // groups, head_dim=4,
        num_hidden_layers=1, vocab_size=8, intermediate_size=8, query_pre_attn_scalar=4,
    )  # fmt: skip
    attention_layer = tf.models.gemma2.modeling_gemma2.Gemma2Attention(config, 0).double()
    attention_layer.is_causal = causal
    return attention_layer


def masks() -> dict[str, Tensor | None]:
    rows, columns = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    causal = columns <= rows
    padded = (columns < torch.tensor([LENGTH, 7])[:, None, None]) & causal
    packed = causal & ((columns < 5) == (rows < 5))
    return {
        "none": None,
        "causal": causal[None, None],
        "padded": padded[:, None],
        "packed": packed[None, None],
        "window": (causal & (rows - columns < 3))[None, None],
        "keys alone": (columns < 7)[None, None],
    }


def tensors(groups: int) -> list[Tensor]:
    torch.manual_seed(1)
    shapes = [(2, HEADS, LENGTH, 4), *[(2, HEADS // groups, LENGTH, 4)] * 2]
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("kind", ["sdpa", "sdpa, not causal", "eager", "eager, capped"])
def test_chunks_equal_the_whole(kind: str, mask: str, groups: int) -> None:
    module = layer(causal=kind != "sdpa, not causal", groups=groups)
    own, options = masks()[mask], {"scaling": 0.3}
    if kind.startswith("eager"):
        zero = torch.zeros((), dtype=torch.float64)
        own = None if own is None else torch.where(own, zero, torch.finfo(torch.float64).min)
        options |= {"softcap": 1.5} if "capped" in kind else {}
    attend = chunked_eager if kind.startswith("eager") else chunked_sdpa

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(module, q, k, v, own, **options)[0]

    found = second_derivative(function, *tensors(groups))
    nested = second_derivative(partial(remat, function), *tensors(groups))  # a chunk inside a rematerialised unit
    expected = at_once(partial(second_derivative, function), *tensors(groups))
    # transformers' eager softmax computes in fp32
    tolerance = 1e-5 if kind.startswith("eager") else 1e-12
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(nested, expected, rtol=tolerance, atol=tolerance)


def test_what_chunks_would_change_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout (other masks than the training step's), a learned bias, parameters of the layer, a kept graph."""
    monkeypatch.setattr(attention, "_attend_in_chunks", pytest.fail)
    module, qkv = layer(), tensors(2)
    torch.func.vjp(lambda q: chunked_sdpa(module, q, *qkv[1:], None, dropout=0.1)[0], qkv[0])
    bias = torch.zeros(1, HEADS, LENGTH, LENGTH, dtype=torch.float64)
    torch.func.vjp(lambda b: chunked_sdpa(module, *qkv, None, position_bias=b)[0], bias)
    chunked_sdpa(module, qkv[0].requires_grad_(), *qkv[1:], None)
    module.sinks = nn.Parameter(torch.zeros(HEADS))
    torch.func.vjp(lambda q: chunked_eager(module, q, *qkv[1:], None)[0], qkv[0].detach())


# ---- models ------------------------------------------------------------------------------------------------------
SMALL = dict(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)), NAMES["sdpa"]),
        (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, attn_implementation="eager")), NAMES["eager"]),
        (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL, attn_implementation="eager")), NAMES["eager"]),
        # its code asks whether the implementation is "eager"
        (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31)), NAMES["sdpa"]),
        (
            lambda: tf.GPT2LMHeadModel(
                tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31, attn_implementation="eager")
            ),
            "eager",
        ),
    ],
)
def test_which_models_compute_in_chunks(model: Callable[[], nn.Module], expected: str) -> None:
    model = model()
    make_safe(model)
    assert model.config._attn_implementation == expected


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("position_ids", [None, torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]] * 2)])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_of_models_are_those_of_the_implementation(implementation, position_ids, padded) -> None:
    """Causal, padded, packed, and through a window."""
    config = tf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=3, attn_implementation=implementation)
    model = tf.MistralForCausalLM(config)
    ids = torch.randint(0, 31, (2, LENGTH))
    inputs = {"input_ids": ids, "position_ids": position_ids, "use_cache": False}
    inputs |= {"attention_mask": (torch.arange(LENGTH) < torch.tensor([[LENGTH], [7]])).long()} if padded else {}
    with torch.no_grad():
        expected = model(**inputs).logits
        make_safe(model)
        assert model.config._attn_implementation == NAMES[implementation]
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attend", [chunked_sdpa, chunked_eager])
def test_memory_of_a_product_grows_with_the_length_not_its_square(attend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made inside a rematerialised unit, in its forward, its second forward and its backward."""
    module = layer(groups=1)

    def largest(length: int) -> int:
        def unit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(module, q, k, v, None, scaling=0.3)[0]

        with Largest() as made:
            second_derivative(partial(remat, unit), *torch.randn(3, 1, HEADS, length, 4, dtype=torch.float64))
        return made.num_bytes

    monkeypatch.setattr(attention, "QUERY_CHUNK", 32)
    assert largest(512) == 2 * largest(256)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.num_bytes = max(self.num_bytes, x.untyped_storage().nbytes())
        return out
