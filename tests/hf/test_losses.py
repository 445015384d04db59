"""Per-example losses against a loop over tokens, and under the derivatives that the project takes of them."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from tokenizers import Tokenizer, models
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scalemlo.hf.losses.next_token import example_losses, token_losses
from scalemlo.hf.models.models import LoraSpec, load_causal_lm, load_encoder

VOCAB = 37


def llama(attention: str = "eager") -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def gpt2(attention: str = "eager") -> torch.nn.Module:
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, attn_implementation=attention)
    return GPT2LMHeadModel(config).eval()


def padded_batch() -> dict[str, torch.Tensor]:
    """Three rows of 7, 9 and 5 tokens; prompts of 2, 4 and 3 tokens have no label."""
    input_ids = torch.randint(0, VOCAB, (3, 9))
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for row, (start, end) in enumerate([(2, 7), (4, 9), (3, 5)]):
        attention_mask[row, :end] = 1
        labels[row, start:end] = input_ids[row, start:end]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def losses_by_loop(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One row and one token at a time, without padding."""
    means = []
    for ids, attention, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(attention.sum())
        log_probabilities = model(input_ids=ids[None, :length]).logits[0].log_softmax(-1)
        terms = [-log_probabilities[t - 1, labels[t]] for t in range(1, length) if labels[t] != -100]
        means.append(sum(terms) / len(terms))
    return torch.stack(means)


@pytest.mark.parametrize("make_model", [llama, gpt2])
def test_example_losses_equal_the_loop(make_model):
    model, batch = make_model().double(), padded_batch()
    # transformers' Llama computes its norms and softmax in fp32 whatever the dtype, rounded anew for each length.
    tolerance = 1e-12 if make_model is gpt2 else 1e-7
    expected = losses_by_loop(model, batch)
    torch.testing.assert_close(example_losses(model, batch), expected, rtol=tolerance, atol=tolerance)


def test_narrow_labels_give_the_same_losses_and_gradients():
    model, batch = llama().double(), padded_batch()
    narrow = {**batch, "labels": batch["labels"][:, 2:]}
    gradients = [
        torch.autograd.grad(example_losses(model, case).sum(), list(model.parameters())) for case in (batch, narrow)
    ]
    torch.testing.assert_close(example_losses(model, narrow), example_losses(model, batch), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_labels_that_do_not_fit_the_inputs_are_refused():
    batch = padded_batch()
    for labels in (torch.zeros(3, 10, dtype=torch.long), batch["labels"][:2]):
        with pytest.raises(ValueError, match=r"labels .* must be \[B, L\]"):
            example_losses(llama(), {**batch, "labels": labels})


def test_token_losses_are_zero_exactly_outside_the_mask():
    losses, mask = token_losses(llama().double(), padded_batch())
    assert losses.shape == mask.shape == (3, 8)
    assert mask.sum(dim=1).tolist() == [5, 5, 2]
    assert (losses[~mask] == 0).all() and (losses[mask] > 0).all()


def test_one_example_does_not_depend_on_the_others():
    model, batch = llama().double(), padded_batch()
    alone = [example_losses(model, {name: value[i : i + 1] for name, value in batch.items()}) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), example_losses(model, batch), rtol=1e-12, atol=1e-12)


def test_example_without_label_is_nan_not_zero():
    batch = padded_batch()
    batch["labels"][1] = -100
    losses = example_losses(llama(), batch)
    assert losses.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_cross_entropy_is_computed_in_fp32_or_fp64(dtype, expected):
    logits = torch.randn(3, 9, VOCAB).to(dtype)
    batch = padded_batch()
    losses = example_losses(lambda **_: SimpleNamespace(logits=logits), batch)
    reference = example_losses(lambda **_: SimpleNamespace(logits=logits.double()), batch)
    assert losses.dtype == expected
    # Cross entropy in bf16 would be off by 1e-3.
    torch.testing.assert_close(losses.double(), reference, rtol=1e-6, atol=1e-6)


def test_model_gets_only_what_it_takes_and_no_labels():
    received = {}

    def model(**kwargs):
        received.update(kwargs)
        return SimpleNamespace(logits=torch.randn(3, 9, VOCAB))

    example_losses(model, {**padded_batch(), "example_id": torch.arange(3)})
    assert set(received) == {"input_ids", "attention_mask", "use_cache"}
    assert received["use_cache"] is False


@pytest.mark.parametrize("make_model", [llama, gpt2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("first_label", [0, 2])
def test_forward_derivative_equals_reverse(make_model, attention, first_label):
    model, batch = make_model(attention).double(), padded_batch()
    batch["labels"] = batch["labels"][:, first_label:]
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tangents = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def losses(weights):
        return example_losses(lambda **inputs: functional_call(model, weights, (), inputs), batch)

    with sdpa_kernel(SDPBackend.MATH):
        _, derivative = jvp(losses, (weights,), (tangents,))
        losses_of_rows = example_losses(model, batch)
        rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses_of_rows]
    expected = [sum((g * tangents[name]).sum() for g, name in zip(row, weights, strict=True)) for row in rows]
    # transformers' Llama computes its norms in fp32 whatever the dtype; GPT-2 is fp64 throughout.
    tolerance = 1e-10 if make_model is gpt2 else 1e-6
    torch.testing.assert_close(derivative, torch.stack(expected), rtol=tolerance, atol=tolerance)


# Chunks of tokens: 3 rows of 8 targets, in one chunk, in chunks of 2, 3 and 1 positions, and one position at a time
CHUNKS = [6, 9, 1]


def second_order(losses, weights, tangents):
    """Gradient of a weighted sum of the losses and its tangent, the way exact products are taken."""
    with fwAD.dual_level():
        duals = {n: fwAD.make_dual(w, tangents[n]) for n, w in weights.items()}
        gradients = torch.func.grad(lambda w: (losses(w) ** 2).sum())(duals)
        pairs = [fwAD.unpack_dual(g) for g in gradients.values()]
        return [x.detach() for pair in pairs for x in pair]


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize("first_label", [0, 2])
def test_chunks_of_tokens_equal_the_whole(chunk_tokens, first_label):
    """Values; live gradients; double backward; forward over reverse; forward alone, by torch.func."""
    model, batch = gpt2().double(), padded_batch()
    batch["labels"] = batch["labels"][:, first_label:]
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tangents = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def everything(chunk_tokens):
        def losses(weights):
            call = partial(functional_call, model, weights, ())
            return example_losses(lambda **inputs: call(inputs), batch, chunk_tokens=chunk_tokens)

        live = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        with sdpa_kernel(SDPBackend.MATH):
            values = losses(live)
            gradient = torch.autograd.grad((values**2).sum(), list(live.values()), create_graph=True)
            product = sum((g * t).sum() for g, t in zip(gradient, tangents.values(), strict=True))
            double_backward = torch.autograd.grad(product, list(live.values()))
            forward = jvp(losses, (weights,), (tangents,))[1]
            return values, gradient, double_backward, forward, second_order(losses, weights, tangents)

    torch.testing.assert_close(everything(chunk_tokens), everything(24), rtol=1e-11, atol=1e-11)
    _, gradient, double_backward, _, products = everything(chunk_tokens)
    torch.testing.assert_close(products[::2], list(gradient), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(products[1::2], list(double_backward), rtol=1e-10, atol=1e-10)


def test_no_tensor_of_all_tokens_is_in_fp32():
    """In a live backward and in a second-order pass, with logits in bf16 and chunks of 3 of 24 tokens."""
    batch, logits = padded_batch(), torch.randn(3, 9, VOCAB).bfloat16()

    def loss(logits):
        return example_losses(lambda **_: SimpleNamespace(logits=logits), batch, chunk_tokens=3).sum()

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                    self.numel = max(self.numel, x.numel())
            return out

    live = logits.clone().requires_grad_()
    with Largest() as fp32:
        loss(live).backward()
        with fwAD.dual_level():
            torch.func.grad(loss)(fwAD.make_dual(logits, logits))
    assert fp32.numel == 3 * VOCAB


def test_chunk_tokens_below_one_is_refused():
    with pytest.raises(ValueError, match=r"chunk_tokens \(0\) must be at least 1"):
        example_losses(llama(), padded_batch(), chunk_tokens=0)


def test_runs_on_meta_tensors():
    """A look at a value, or a shape that depends on one, would fail here and synchronise on an accelerator."""
    model = llama().to("meta")
    batch = {name: value.to("meta") for name, value in padded_batch().items()}
    assert example_losses(model, batch).shape == (3,)


# The models that the losses are taken of


@pytest.fixture
def folder(tmp_path):
    """A saved model whose tokenizer has an end token and no pad token."""
    llama().save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 5}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>").save_pretrained(tmp_path)
    return str(tmp_path)


def test_full_model_is_ready_to_train(folder):
    model, tokenizer = load_causal_lm(folder)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.training and model.config.use_cache is False
    assert tokenizer.pad_token == "<end>" and model.config.pad_token_id == tokenizer.pad_token_id == 5


def test_lora_trains_fp32_adapters_only_and_starts_at_the_base_model(folder):
    base, _ = load_causal_lm(folder, attn_implementation="eager")
    model, _ = load_causal_lm(folder, attn_implementation="eager", lora=LoraSpec(r=2))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert not any("lm_head" in name or "embed" in name for name in trainable)
    batch = padded_batch()
    torch.testing.assert_close(example_losses(model, batch), example_losses(base, batch))
    half, _ = load_causal_lm(folder, dtype="bf16", lora=LoraSpec(r=2, target_modules=("q_proj",)))
    dtypes = {(p.requires_grad, p.dtype) for p in half.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert all("q_proj" in name for name, p in half.named_parameters() if p.requires_grad)


def test_adapters_are_equal_on_every_rank_and_leave_the_random_stream_alone(folder):
    def adapters(seed):
        model, _ = load_causal_lm(folder, lora=LoraSpec(r=2, seed=seed))
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    torch.manual_seed(1)
    first, next_number = adapters(0), torch.rand(1)
    torch.manual_seed(2)
    assert torch.equal(first, adapters(0)) and not torch.equal(first, adapters(3))
    torch.manual_seed(1)
    assert torch.equal(next_number, torch.rand(1))


def test_encoder_is_frozen(folder):
    encoder, tokenizer = load_encoder(folder)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert tokenizer.pad_token_id == 5


def test_unfit_settings_are_refused(folder):
    with pytest.raises(ValueError, match=r"dtype \('fp8'\) must be one of fp64, fp32, bf16"):
        load_causal_lm(folder, dtype="fp8")
    with pytest.raises(ValueError, match=r"dtype \('bf16'\) must be 'fp32' or 'fp64' when lora is None"):
        load_causal_lm(folder, dtype="bf16")
    for setting in ({"r": 0}, {"alpha": 0}, {"dropout": 1.0}, {"target_modules": ()}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            LoraSpec(**setting)


def test_tokenizer_that_cannot_pad_is_refused(folder):
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    with pytest.raises(ValueError, match="neither pad_token nor eos_token"):
        load_causal_lm(folder)
