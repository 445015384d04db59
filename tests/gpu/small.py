"""A small Llama on weighted examples, and its derivatives in fp64 on the CPU by plain torch.

The reference knows nothing of scalemlo: double backward, on the weights that the device has.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import scalemlo as mlo
from scalemlo.distributed.group import default_device
from tests import problems
from tests.problems import VOCAB, Problem, Snapshot, build_modules, example_losses, token_batch

SGD = partial(torch.optim.SGD, lr=0.01)  # with 0.1 the steps' parts of the hypergradient cancel: noise in bf16
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3)

ENGINES = {"single": mlo.Single, "ddp": mlo.DDP, "fsdp": mlo.FSDP}
DTYPES = ("fp32", "bf16", "fp16")
TOLERANCE = {"fp32": 1e-4, "bf16": 8e-2, "fp16": 2e-2}
"""Relative errors of whole vectors against fp64. A wrong formula is off by a fifth at least."""


def is_on_accelerator() -> bool:
    """Whether levels compute on one here."""
    return default_device().type != "cpu"


def use_deterministic_algorithms() -> None:
    """Sums in one order, where torch has such a kernel; for matrix products the kit sets CUBLAS_WORKSPACE_CONFIG."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def llama() -> nn.Module:
    """Heads of 16, which every fused attention kernel takes."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


problems.LOWER_MODULES["llama of the kit"] = llama


def problem(optimizer=SGD, **options) -> Problem:
    """In fp32; engines compute in what they are told."""
    return Problem(kind="llama of the kit", dtype=torch.float32, lower_optimizer=optimizer, **options)


def on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU."""
    return {n: t.detach().cpu() for n, t in tensors.items()}


def snapshot(program: mlo.Program) -> Snapshot:
    """Of a running program, on the CPU."""
    state = Snapshot.of(program)
    optimizer = {
        n: {k: t.cpu() if isinstance(t, Tensor) else t for k, t in entries.items()}
        for n, entries in state.optimizer.items()
    }
    return replace(state, lower=on_host(state.lower), upper=on_host(state.upper), optimizer=optimizer)


class Reference:
    """Second derivatives of the lower loss at a state, in fp64.

    Args:
        case: The problem.
        state: Where.
    """

    def __init__(self, case: Problem, state: Snapshot):
        lower, upper = build_modules(case.kind, torch.float64)
        lower.load_state_dict(state.lower, strict=False)
        upper.load_state_dict(state.upper)
        self.weights, self.net = dict(lower.named_parameters()), dict(upper.named_parameters())
        with sdpa_kernel(SDPBackend.MATH):
            loss = case._lower_loss(lower, upper, token_batch(state.num_steps % 40))
            self.gradient = torch.autograd.grad(loss, list(self.weights.values()), create_graph=True)

    def product(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        """``H v``."""
        return self._pull(v, self.weights)

    def mixed(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        """``d/dlambda <dL/dw, v>``."""
        return self._pull(v, self.net)

    def _pull(self, v: dict[str, Tensor], by: dict[str, Tensor]) -> dict[str, Tensor]:
        along = [v[n].double() for n in self.weights]
        found = torch.autograd.grad(self.gradient, list(by.values()), along, retain_graph=True)
        return dict(zip(by, found, strict=True))


@cache
def unrolled(case: Problem, num_steps: int) -> dict[str, Tensor]:
    """The hypergradient through the first steps of plain SGD from the start, in fp64."""
    lower, upper = build_modules(case.kind, torch.float64)
    weights, learning_rate = dict(lower.named_parameters()), case.lower_optimizer.keywords["lr"]
    with sdpa_kernel(SDPBackend.MATH):
        for k in range(num_steps):
            loss = case._lower_loss(_at(lower, weights), upper, token_batch(k))
            gradient = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            moved = zip(weights.items(), gradient, strict=True)
            weights = {n: w - learning_rate * g for (n, w), g in moved}
        loss = example_losses(_at(lower, weights), token_batch(100)).mean()
        found = torch.autograd.grad(loss, list(upper.parameters()))
    return dict(zip(dict(upper.named_parameters()), found, strict=True))


def _at(module: nn.Module, weights: dict[str, Tensor]) -> Callable:
    return lambda **inputs: torch.func.functional_call(module, weights, (), inputs)


def direction(case: Problem) -> dict[str, Tensor]:
    """A random vector over the lower weights, of their size, fp32."""
    generator = torch.Generator().manual_seed(1)
    weights = build_modules(case.kind, torch.float32)[0].named_parameters()
    return {n: torch.randn(w.shape, generator=generator) * w.detach().std() for n, w in weights}
