"""Families of transformers models: second derivatives equal double backward, in chunks of queries and of tokens."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import scalemlo as mlo
from scalemlo.autodiff import attention
from scalemlo.derivatives.hessian import RetainedHessian, hessian
from scalemlo.hf.losses.next_token import example_losses
from tests.problems import full_tensors, relative_error, weight_net
from tests.ranks import run_ranks

BATCH, LENGTH, VOCAB, CLASSES = 4, 11, 31, 3
CHUNK = 4  # queries, and tokens of the cross entropy per example


# ---- models ------------------------------------------------------------------------------------------------------
COMMON = dict(
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
DECODER = dict(**COMMON, intermediate_size=24, num_key_value_heads=2, use_cache=False)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
MOE = dict(**DECODER, num_experts_per_tok=2)


@dataclass(frozen=True)
class Family:
    """How a model is made, and how far fp64 reaches in it.

    Args:
        make: Makes the model.
        tolerance: 1e-10, or 1e-5 where the model's own code computes norms in fp32 whatever its dtype.
        task: What it is trained on.
        dtype: fp32 where the live module runs an fp32 kernel (grouped products of experts).
    """

    make: Callable[[], nn.Module]
    tolerance: float = 1e-5
    task: str = "tokens"
    dtype: torch.dtype = torch.float64


def causal(config: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: tf.AutoModelForCausalLM.from_config(config(), **options)


def bert() -> nn.Module:
    config = tf.BertConfig(**COMMON, intermediate_size=24, num_labels=CLASSES, **NO_DROPOUT)
    return tf.BertForSequenceClassification(config)


def vit() -> nn.Module:
    config = tf.ViTConfig(
        image_size=12, patch_size=3, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, num_labels=CLASSES, **NO_DROPOUT,
    )  # fmt: skip
    return tf.ViTForImageClassification(config)


def gpt2() -> nn.Module:
    config = tf.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=32, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)


FAMILIES: dict[str, Family] = {
    "llama": Family(causal(lambda: tf.LlamaConfig(**DECODER))),
    "llama, eager": Family(causal(lambda: tf.LlamaConfig(**DECODER), attn_implementation="eager")),
    "qwen2": Family(causal(lambda: tf.Qwen2Config(**DECODER, tie_word_embeddings=True))),
    "qwen3": Family(causal(lambda: tf.Qwen3Config(**DECODER, head_dim=4))),
    "mistral, window": Family(causal(lambda: tf.MistralConfig(**DECODER, sliding_window=5))),
    "gemma2, caps and window": Family(
        causal(
            lambda: tf.Gemma2Config(
                **DECODER, head_dim=4, sliding_window=5, query_pre_attn_scalar=4, attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
            )
        )
    ),
    "gemma3": Family(causal(lambda: tf.Gemma3TextConfig(**DECODER, head_dim=4, sliding_window=5))),
    "phi": Family(causal(lambda: tf.PhiConfig(**DECODER)), 1e-10),
    "phi3": Family(causal(lambda: tf.Phi3Config(**DECODER))),
    "olmo2": Family(causal(lambda: tf.Olmo2Config(**DECODER))),
    "gpt2, tied": Family(gpt2, 1e-10),
    "gpt_neox": Family(causal(lambda: tf.GPTNeoXConfig(**COMMON, intermediate_size=24, use_cache=False)), 1e-10),
    "bert": Family(bert, 1e-10, "classes"),
    "vit": Family(vit, 1e-10, "images"),
    "mixtral": Family(causal(lambda: tf.MixtralConfig(**MOE, num_local_experts=4)), dtype=torch.float32),
    "qwen2_moe": Family(
        causal(
            lambda: tf.Qwen2MoeConfig(
                **MOE, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8,
            )
        ),
        dtype=torch.float32,
    ),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """The same model on every call, no parameter zero."""
    torch.manual_seed(3)
    model = FAMILIES[name].make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(FAMILIES[name].dtype).train()


# ---- the bilevel program ------------------------------------------------------------------------------------------
def batch(task: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if task == "images":
        images = torch.randn(BATCH, 1, 12, 12, generator=generator, dtype=torch.float64)
        return {"pixel_values": images, "classes": torch.arange(BATCH) % CLASSES}
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([LENGTH, 7, 9, 10])[:, None]).long()  # padded on the right
    if task == "classes":
        return {"input_ids": ids, "attention_mask": mask, "classes": torch.arange(BATCH) % CLASSES}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}


def losses_of(model: Any, batch: dict[str, Tensor]) -> Tensor:  # [B]
    if "labels" in batch:
        return example_losses(model, batch, chunk_tokens=CHUNK * BATCH)
    logits = model(**{k: t for k, t in batch.items() if k != "classes"}).logits
    return F.cross_entropy(logits, batch["classes"], reduction="none")


def losses_of_reference(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Written without this project."""
    if "labels" not in batch:
        return losses_of(model, batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    mask = batch["attention_mask"][:, 1:]
    return -(chosen * mask).sum(1) / mask.sum(1)


class Lower(mlo.Level):
    normalize = True

    def loss(self, batch, rater):
        losses = losses_of(self.module, batch)
        return mlo.weighted_mean(losses, rater(losses.detach().unsqueeze(-1)).squeeze(-1), normalize=self.normalize)


class Rater(mlo.Level):
    def loss(self, batch, lower):
        return mlo.mean(losses_of(lower, batch))


def differences(rank: int, world_size: int, name: str, spec: Any) -> dict[str, float]:
    """Relative errors of products with a direction v, against double backward."""
    model, task = build(name), FAMILIES[name].task
    reference = copy.deepcopy(model).double()
    if getattr(reference.config, "_experts_implementation", None) == "grouped_mm":  # it has no second derivative
        reference.set_experts_implementation("eager")
    torch.manual_seed(4)
    net = weight_net().to(model.dtype)
    net_reference = copy.deepcopy(net).double()
    batches = [batch(task, i) for i in range(2)]  # each rank takes its rows
    sgd = partial(torch.optim.SGD, lr=0.1)
    # With the losses of a random model so alike, normalised weights cancel two digits of fp32 in the mixed partial.
    normalize = model.dtype == torch.float64
    lower = Lower("lower", model, data=batches, optimizer=sgd, hypergradient=mlo.Identity())
    lower.normalize = normalize
    program = mlo.Program([Rater("rater", net, data=batches, optimizer=sgd), lower], engine=spec)
    program.gradients()  # takes the first batches
    lower, rater = program.trainers["lower"], program.trainers["rater"]

    weights = dict(reference.named_parameters())
    generator = torch.Generator().manual_seed(7)
    full = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in weights.items()}
    with sdpa_kernel(SDPBackend.MATH):
        losses = losses_of_reference(reference, batches[0])
        example_weights = net_reference(losses.detach().unsqueeze(-1)).squeeze(-1)
        loss = (example_weights * losses).sum() / (example_weights.sum() if normalize else BATCH)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        product = sum((g * full[n]).sum() for n, g in zip(weights, gradients, strict=True))
        wanted = [*weights.values(), *net_reference.parameters()]
        found = torch.autograd.grad(product, wanted, materialize_grads=True)
    expected = dict(zip(weights, found, strict=False))
    expected_mixed = dict(zip(dict(net_reference.named_parameters()), found[len(weights) :], strict=True))

    engine = lower.engine
    v = mlo.Shards(engine.shard({n: t.to(model.dtype) for n, t in full.items()}), engine.group)
    results = {}
    for products in ("remat", "retain"):
        with hessian(lower.loss_at(), lower.block, products) as operator:
            results[products] = relative_error(full_tensors(lower, operator(v)), expected)
    at = lower.loss_at()
    mixed = at.tangents([(lower.block, v)], {"rater": rater.block})["rater"]
    results["mixed"] = relative_error(full_tensors(rater, mixed), expected_mixed)
    retained = RetainedHessian(at, lower.block, {"rater": rater.block}).mixed(v)["rater"]
    results["mixed, retained"] = relative_error(full_tensors(rater, retained), expected_mixed)
    return results


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "QUERY_CHUNK", CHUNK)
    yield


@pytest.mark.parametrize("name", FAMILIES)
def test_products_equal_double_backward(name: str) -> None:
    found = differences(0, 1, name, mlo.Single())
    assert max(found.values()) < FAMILIES[name].tolerance, found


@pytest.mark.parametrize("name", ["mixtral", "qwen2"])
def test_products_equal_double_backward_on_shards(name: str) -> None:
    for found in run_ranks(differences, 2, name, mlo.FSDP()):
        assert max(found.values()) < FAMILIES[name].tolerance, found
