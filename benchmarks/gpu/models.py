"""The programs whose speed and memory the proof kit measures: Llamas with random weights on weighted examples."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from weighing import Finetune, Weigh  # noqa: E402

import scalemlo as mlo  # noqa: E402
from scalemlo.planning.plan import simulated_layers  # noqa: E402

BYTES_OF_STEP = 16
"""Per parameter, for a plain step: fp32 weight, gradient and two moments."""
BYTES_OF_SOLVE = 44
"""Per parameter, for a Neumann series too: five more vectors, and casts."""


@dataclass(frozen=True)
class Size:
    """A model, and what it is fed with.

    Args:
        shape: Options of transformers' ``LlamaConfig``.
        batch: Sequences.
        length: Tokens of each.
        fills: Whether it takes as many layers as fit in the memory, those of ``shape`` at most.
    """

    shape: dict[str, Any]
    batch: int
    length: int = 2048
    fills: bool = False

    def config(self, num_layers: int | None = None) -> Any:
        """Of transformers."""
        from transformers import LlamaConfig

        shape = self.shape if num_layers is None else self.shape | {"num_hidden_layers": num_layers}
        return LlamaConfig(**shape, max_position_embeddings=self.length, use_cache=False)

    def num_parameters(self, num_layers: int | None = None, *, in_products: bool = False) -> int:
        """Of the model; or of them those that stand in matrix products, which an embedding alone does not."""
        from transformers import LlamaForCausalLM

        with torch.device("meta"):
            model = LlamaForCausalLM(self.config(num_layers))
        number = sum(p.numel() for p in model.parameters())
        is_apart = in_products and not model.config.tie_word_embeddings
        return number - (model.get_input_embeddings().weight.numel() if is_apart else 0)

    def fitted(self, free_bytes: int) -> "Size | str":
        """This size for a device with so many free bytes, or a sentence why it does not fit."""
        usable, deepest = 0.9 * free_bytes, self.shape["num_hidden_layers"]
        if self.fills:
            fixed = self.num_parameters(0)
            usable -= 6e9  # activations
            num_layers = int((usable / BYTES_OF_SOLVE - fixed) / (self.num_parameters(1) - fixed))
            if num_layers >= 2:
                return replace(self, shape=self.shape | {"num_hidden_layers": min(num_layers, deepest)})
            needed = (BYTES_OF_SOLVE * self.num_parameters(2) + 6e9) / 0.9
        elif BYTES_OF_STEP * self.num_parameters() <= usable:
            return self
        else:
            needed = BYTES_OF_STEP * self.num_parameters() / 0.9
        return f"it needs {needed / 2**30:.1f} GiB at least, and {free_bytes / 2**30:.1f} GiB are free"


SIZES = {
    "135M": Size(
        dict(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        ),
        batch=4,
    ),
    "1B": Size(
        dict(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, tie_word_embeddings=True,
        ),
        batch=4,
    ),
    "8B width": Size(
        dict(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, tie_word_embeddings=False,
        ),
        batch=2,
        fills=True,
    ),
    "tiny": Size(
        dict(
            vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        ),
        batch=4,
        length=64,
    ),
    "small": Size(
        dict(
            vocab_size=1000, hidden_size=128, intermediate_size=384, num_hidden_layers=9, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False,
        ),
        batch=2,
        length=128,
        fills=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A program by its estimator.

    Args:
        estimator: Of the hypergradient.
        unroll_steps: Lower steps in an outer iteration.
        says: What the tables call it.
    """

    estimator: Any
    says: str
    unroll_steps: int = 1


PROGRAMS = {
    "ghost": Variant(mlo.Identity(mixed="ghost"), "identity, ghost products"),
    "sama": Variant(mlo.SAMA(), "SAMA"),
    "forward": Variant(mlo.Identity(mixed="forward"), "identity, forward derivative"),
    "neumann_3": Variant(mlo.Neumann(num_terms=3, step_size=0.01, products="remat"), "Neumann, 3 terms (remat)"),
    "unrolled_8": Variant(mlo.Unrolled(), "unrolled, 8 steps", unroll_steps=8),
}


def model_of(size: Size, device: torch.device | None) -> nn.Module:
    """With random weights, made where it is going to be; the same on every call."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    layers = simulated_layers(size.shape["num_hidden_layers"])
    with nullcontext() if device is None else device:
        return LlamaForCausalLM(size.config(layers))


def batch_of(size: Size, batch: int, seed: int) -> dict[str, torch.Tensor]:
    """Random tokens ``[B, T]``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, size.shape["vocab_size"], (batch, size.length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def program_of(size: Size, variant: Variant, batch: int, device: torch.device | None = None, **options) -> mlo.Program:
    """Two levels: a net weighs examples, and the model is trained on them, in bf16 with fp32 weights and AdamW.

    Args:
        size: Of the model.
        variant: The estimator.
        batch: Sequences of either level.
        device: Where to make the model; None inside a plan.
        **options: Of the program.
    """
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1), nn.Sigmoid())
    levels = [
        Weigh("weights", net, data=[batch_of(size, batch, 1)], optimizer=partial(torch.optim.Adam, lr=1e-3)),
        Finetune(
            "finetune", model_of(size, device), normalize=False, data=[batch_of(size, batch, 2)],
            optimizer=partial(torch.optim.AdamW, lr=1e-5), hypergradient=variant.estimator,
            unroll_steps=variant.unroll_steps, max_grad_norm=1.0,
        ),
    ]  # fmt: skip
    return mlo.Program(levels, engine=mlo.Single(dtype="bf16"), **options)
