"""Packed batches against padded ones: losses, gradients and hypergradients of every example are the same."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import scalemlo as mlo
from scalemlo.hf.data.collate import PadCollator
from scalemlo.hf.data.packing import PackingCollator, check_packing, first_fit_decreasing
from scalemlo.hf.losses.next_token import example_losses
from tests.problems import full_tensors
from tests.ranks import run_ranks

VOCAB = 37
LENGTHS = (7, 3, 12, 5, 4, 9)
SIZES = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
)  # fmt: skip


def llama(attention: str) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=attention))


def qwen2(attention: str) -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, attn_implementation=attention))


def gpt2(attention: str) -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def make_rows(seed: int = 0, lengths=LENGTHS) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        # A prompt of one token keeps its label out; the others are labels from the first token on.
        labels = [-100, *ids[1:]] if number % 2 else list(ids)
        rows.append({"example_id": number, "input_ids": ids, "labels": labels})
    return rows


def by_example(losses: torch.Tensor, batch: dict) -> torch.Tensor:
    return losses[batch["example_id"].argsort()]


# Layout


def test_rows_are_filled_and_every_token_is_accounted_for():
    rows = make_rows()
    batch = PackingCollator(99, max_length=16, pad_to_multiple_of=8)(rows)
    assert batch["input_ids"].shape == (3, 16), "40 tokens need three rows of 16"
    assert sorted(batch["example_id"].tolist()) == list(range(6))
    for number, example in enumerate(batch["example_id"].tolist()):
        own = (batch["example_index"] == number) & (batch["input_ids"] != 99)
        assert batch["input_ids"][own].tolist() == rows[example]["input_ids"]
        assert batch["position_ids"][own].tolist() == list(range(LENGTHS[example]))
        assert batch["labels"][own].tolist() == [-100, *rows[example]["labels"][1:]]
    assert (batch["labels"][batch["input_ids"] == 99] == -100).all()


def test_first_fit_decreasing_takes_the_first_bin_with_room():
    assert first_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert first_fit_decreasing([5, 5], 5) == [[0], [1]]


def test_examples_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"12 tokens .* max_length \(8\)"):
        PackingCollator(0, max_length=8)(make_rows())
    rows = make_rows()
    rows[2]["labels"] = [-100] * 12
    with pytest.raises(ValueError, match="example_id 2"):
        PackingCollator(0)(rows)


# Losses


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make_model", [llama, qwen2, gpt2])
def test_losses_and_gradients_equal_those_of_padded_batches(make_model, attention):
    model, rows = make_model(attention).double(), make_rows()
    padded, packed = PadCollator(0)(rows), PackingCollator(0, max_length=24)(rows)
    assert packed["input_ids"].numel() < padded["input_ids"].numel()
    weights = torch.rand(len(rows), dtype=torch.float64)
    results = []
    for batch in (padded, packed):
        losses = by_example(example_losses(model, batch), batch)
        results.append((losses, torch.autograd.grad((losses * weights).sum(), list(model.parameters()))))
    # transformers' norms and softmax run in fp32 whatever the dtype, rounded anew for each length.
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


def test_a_model_that_mixes_packed_examples_is_refused():
    check_packing(llama("sdpa").eval(), vocab_size=VOCAB)

    class Blind(nn.Module):
        """Sees positions, and yet attends to everything before."""

        def __init__(self):
            super().__init__()
            self.model = llama("sdpa").eval()

        def forward(self, input_ids, position_ids, use_cache):
            return self.model(input_ids, torch.ones_like(input_ids), position_ids, use_cache=use_cache)

    with pytest.raises(ValueError, match="packing: the logits of Blind"):
        check_packing(Blind(), vocab_size=VOCAB)


# Hypergradients


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-1, 1, len(LENGTHS), dtype=torch.float64))

    def forward(self, example_id):
        return torch.sigmoid(self.logits[example_id])


class Rate(mlo.Level):
    def loss(self, batch, finetune):
        return mlo.mean(example_losses(finetune, batch))


class Finetune(mlo.Level):
    def loss(self, batch, rater):
        return mlo.weighted_mean(example_losses(self.module, batch), rater(batch["example_id"]))


def program(collate, model: nn.Module, hypergradient, **options) -> mlo.Program:
    adam, sgd = partial(torch.optim.AdamW, lr=1e-2), partial(torch.optim.SGD, lr=0.5)
    # Loaders, which ranks divide before rows are packed.
    train, meta = (DataLoader(make_rows(seed), len(LENGTHS), collate_fn=collate) for seed in (0, 1))
    finetune = Finetune("finetune", model, data=train, optimizer=adam, hypergradient=hypergradient)
    return mlo.Program([Rate("rater", Weights(), data=meta, optimizer=sgd), finetune], **options)


@pytest.mark.parametrize("make_model", [llama, qwen2])
@pytest.mark.parametrize("mixed", ["auto", "forward"])
def test_hypergradients_equal_those_of_padded_batches(make_model, mixed):
    """`auto` tries ghost products, which packed rows cannot give, and takes the forward derivative by itself."""
    found = []
    for collate in (PadCollator(0), PackingCollator(0, max_length=24)):
        torch.manual_seed(0)
        run = program(collate, make_model("sdpa").double(), mlo.Identity(mixed=mixed))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a disagreement of ghost products would warn
            found.append(run.gradients()["rater"]["logits"])
    assert found[0].abs().max() > 1e-5
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-9)


def test_two_sharded_ranks_with_packed_rows_equal_one_with_padded_rows():
    def hypergradient(rank=0, world_size=1):
        torch.manual_seed(0)
        packed = world_size > 1
        run = program(
            PackingCollator(0, max_length=16) if packed else PadCollator(0),
            llama("sdpa").double(),
            mlo.Identity(),
            **({"engine": mlo.FSDP()} if packed else {}),
        )
        return full_tensors(run.trainers["rater"], run.gradients()["rater"])["logits"]

    expected = hypergradient()
    for found in run_ranks(hypergradient, 2):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*the residual grew")  # two terms suffice to compare
def test_curvature_on_the_skeleton_equals_that_of_padded_batches():
    found = []
    for collate in (PadCollator(0), PackingCollator(0, max_length=24)):
        torch.manual_seed(0)
        run = program(collate, llama("sdpa").double(), mlo.Neumann(num_terms=2, step_size=0.01))
        found.append(run.gradients()["rater"]["logits"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-9)


def test_ghost_products_refuse_packed_rows_by_name():
    torch.manual_seed(0)
    run = program(PackingCollator(0, max_length=24), llama("sdpa").double(), mlo.Identity(mixed="ghost"))
    with pytest.raises(mlo.DerivativeError, match="not the 6 examples.*mixed='forward'"):
        run.gradients()
