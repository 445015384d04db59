"""Losses of preferences and classes against their equations, and their derivatives by example."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForSequenceClassification

from scalemlo.hf.data.collate import ClassificationCollator, PreferenceCollator
from scalemlo.hf.data.prepare import prepare_dataset
from scalemlo.hf.losses.next_token import classification_losses
from scalemlo.hf.losses.preferences import add_reference_logps, dpo_losses, reward_losses
from tests.hf.test_packing_data import SIZES, llama
from tests.hf.words import PAD, word_tokenizer

ROWS = [
    {"prompt": "ask more ", "chosen": "a1", "rejected": "a2 a3"},
    {"prompt": "ask ", "chosen": "a4 a5 a6", "rejected": "a7"},
]


def pairs():
    return prepare_dataset(ROWS, word_tokenizer())


def policy(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = llama("eager")
    model.resize_token_embeddings(64, mean_resizing=False)
    return model.double()


def classifier(num_labels: int) -> torch.nn.Module:
    config = LlamaConfig(**SIZES | {"vocab_size": 64}, num_labels=num_labels, pad_token_id=PAD)
    return LlamaForSequenceClassification(config).double()


def logp(model, ids, labels) -> torch.Tensor:
    """One sequence, one token at a time."""
    log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_probabilities[t - 1, labels[t]] for t in range(1, len(ids)) if labels[t] != -100)


def test_dpo_is_equation_7_with_the_reference_kept_beside_the_rows():
    data, model, reference = pairs(), policy(1), policy(2)
    with pytest.raises(ValueError, match="no ref_chosen_logps and ref_rejected_logps"):
        dpo_losses(model, PreferenceCollator(PAD)(list(data)))
    add_reference_logps(data, reference, PAD, batch_size=1)
    batch = PreferenceCollator(PAD)(list(data))
    expected = []
    for row in data:
        ratios = [
            logp(model, row[f"{side}_input_ids"], row[f"{side}_labels"])
            - logp(reference, row[f"{side}_input_ids"], row[f"{side}_labels"])
            for side in ("chosen", "rejected")
        ]
        expected.append(-F.logsigmoid(0.3 * (ratios[0] - ratios[1])))
    torch.testing.assert_close(dpo_losses(model, batch, beta=0.3), torch.stack(expected), rtol=1e-6, atol=1e-6)
    at_start = dpo_losses(reference, batch)
    torch.testing.assert_close(at_start, torch.full_like(at_start, math.log(2)), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="1 values and dataset has 2 rows"):
        data.add_column("ref_chosen_logps", [0.0])


def test_reward_losses_compare_the_last_tokens():
    data, model = pairs(), classifier(1)
    found = reward_losses(model, PreferenceCollator(PAD)(list(data)))
    for row, loss in zip(data, found, strict=True):
        chosen, rejected = (
            model(input_ids=torch.tensor([row[f"{side}_input_ids"]])).logits[0, 0] for side in ("chosen", "rejected")
        )
        torch.testing.assert_close(loss, -F.logsigmoid(chosen - rejected), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="2 logits per sequence; load it with num_labels=1"):
        reward_losses(classifier(2), PreferenceCollator(PAD)(list(data)))


def test_classification_losses_and_their_forward_derivative():
    rows = [{"text": "ask a1 a2", "label": 2}, {"text": "ask", "label": 0}]
    data, model = prepare_dataset(rows, word_tokenizer()), classifier(3)
    batch = ClassificationCollator(PAD)(list(data))
    for row, loss in zip(data, classification_losses(model, batch), strict=True):
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(loss, -logits.log_softmax(-1)[row["label"]], rtol=1e-5, atol=1e-6)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    direction = {n: torch.randn_like(p) for n, p in weights.items()}

    def at(weights):
        return classification_losses(lambda **inputs: functional_call(model, weights, (), inputs), batch)

    with sdpa_kernel(SDPBackend.MATH):
        _, tangents = jvp(at, (weights,), (direction,))
        for loss, tangent in zip(at({n: p.requires_grad_() for n, p in weights.items()}), tangents, strict=True):
            gradient = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
            pieces = zip(gradient, direction.values(), strict=True)
            expected = sum((g * d).sum() for g, d in pieces if g is not None)
            torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-6)
