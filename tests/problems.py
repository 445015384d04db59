"""Bilevel problems that every engine and estimator is tested on, and their reference hypergradients.

The reference knows nothing of scalemlo: plain modules, one process, whole batches, double backward, and torch's own
differentiable optimizers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import scalemlo as mlo

BATCH, LENGTH, VOCAB = 8, 12, 37
ENGINES = {"ddp": mlo.DDP, "fsdp": mlo.FSDP}
sgd = partial(torch.optim.SGD, lr=0.1)


# ---- modules -----------------------------------------------------------------------------------------------------
class Vector(nn.Module):
    """Parameters and nothing else; `forward` gives them."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = nn.Parameter(value.detach().clone())

    def forward(self) -> Tensor:
        return self.value


def mlp() -> nn.Module:
    """LayerNorm and a stack of blocks in a ModuleList, odd sizes so that shards are uneven."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, 9)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9), nn.Tanh()) for _ in range(3))
            self.head = nn.Linear(9, VOCAB)

        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:  # [B, T] -> [B, T, V]
            x = self.embed(input_ids)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    return Net()


class Dropped(nn.Module):
    """:func:`mlp` with dropout after the embedding and every block."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.dropout = module, nn.Dropout(0.4)

    def forward(self, input_ids):
        x = self.dropout(self.module.embed(input_ids))
        for block in self.module.blocks:
            x = x + self.dropout(block(x))
        return self.module.head(x)


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2_tied() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=LENGTH, attn_pdrop=0.0,
        embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama_lora() -> nn.Module:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
    return get_peft_model(llama(), config)


def weight_net() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid())


LOWER_MODULES: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp, "llama": llama, "gpt2_tied": gpt2_tied, "llama_lora": llama_lora,
}  # fmt: skip


def build_modules(kind: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The same (lower, upper) modules on every call."""
    torch.manual_seed(3)
    lower, upper = LOWER_MODULES[kind](), weight_net()
    with torch.no_grad():
        for p in lower.parameters():  # no zero biases: every term of every derivative must matter
            p.add_(0.05 * torch.randn_like(p))
    return lower.to(dtype), upper.to(dtype)


def token_batch(seed: int, size: int = BATCH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, VOCAB, (size, LENGTH), generator=generator)}


# ---- losses ------------------------------------------------------------------------------------------------------
def example_losses(model, batch: dict[str, Tensor]) -> Tensor:
    """Mean next-token cross entropy per example, ``[B]``."""
    ids = batch["input_ids"]
    out = model(input_ids=ids)
    logits = getattr(out, "logits", out)  # [B, T, V]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(ids.shape[0], -1).mean(1)


class Finetune(mlo.Level):
    """Lower level: fine-tune on weighted examples."""

    normalize = True

    def loss(self, batch, rater):
        losses = example_losses(self.module, batch)
        weights = rater(losses.detach().unsqueeze(-1)).squeeze(-1)
        return mlo.weighted_mean(losses, weights, normalize=self.normalize)


class Rate(mlo.Level):
    """Upper level: weigh examples so that the fine-tuned model does well on other data."""

    def loss(self, batch, finetune):
        return mlo.mean(example_losses(finetune, batch))


# ---- program and reference -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Problem:
    """One bilevel problem; ``lower_optimizer`` is also what SAMA differentiates."""

    kind: str = "mlp"
    dtype: torch.dtype = torch.float64
    lower_optimizer: Callable = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9))
    accumulation: int = 1
    warm_up_steps: int = 3
    normalize: bool = True

    def program(self, hypergradient: mlo.Hypergradient, engine: mlo.engines.EngineSpec, **options) -> mlo.Program:
        lower, upper = build_modules(self.kind, self.dtype)
        finetune, rate = self.levels(lower, upper, hypergradient)
        return mlo.Program([rate, finetune], engine=engine, **options)

    def levels(self, lower: nn.Module, upper: nn.Module, hypergradient: mlo.Hypergradient) -> tuple["Finetune", "Rate"]:
        """The two levels, lower one first."""
        size = BATCH // self.accumulation
        train = [token_batch(i, size) for i in range(40)]
        meta = [token_batch(100 + i) for i in range(10)]
        finetune = Finetune(
            "finetune",
            lower,
            data=train,
            optimizer=self.lower_optimizer,
            hypergradient=hypergradient,
            gradient_accumulation_steps=self.accumulation,
        )
        finetune.normalize = self.normalize
        rate = Rate("rater", upper, data=meta, optimizer=partial(torch.optim.SGD, lr=0.1))
        return finetune, rate

    def hypergradient(self, hypergradient: mlo.Hypergradient, engine: mlo.engines.EngineSpec) -> "Measured":
        """The upper level's hypergradient after some steps, and the state it belongs to."""
        program = self.program(hypergradient, engine)
        if self.warm_up_steps:
            program.run(self.warm_up_steps, progress=False)
        state = Snapshot.of(program)
        before = {n: t.clone() for n, t in program.trainers["finetune"].weights().items()}
        gradient = program.gradients()["rater"]
        after = program.trainers["finetune"].weights()
        return Measured(
            gradient=full_tensors(program.trainers["rater"], gradient),
            state=state,
            weights_untouched=all(torch.equal(before[n], after[n]) for n in before),
        )

    def reference(self, state: "Snapshot", *, adaptive: bool) -> dict[str, Tensor]:
        """The hypergradient at a state, in fp64.

        With v = dF/dw held constant, it is ``d/dlambda <v, w'(lambda)>``, where w' is the lower weights after a plain
        gradient step (identity) or after torch's differentiable optimizer (SAMA).
        """
        lower, upper = build_modules(self.kind, torch.float64)
        lower.load_state_dict(state.lower, strict=False)
        upper.load_state_dict(state.upper)
        parameters = {n: p for n, p in lower.named_parameters() if p.requires_grad}
        weights, net, step = list(parameters.values()), list(upper.parameters()), state.num_steps
        size = BATCH // self.accumulation
        micro = [token_batch((step * self.accumulation + i) % 40, size) for i in range(self.accumulation)]
        with sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention has no second derivative
            loss = sum(self._lower_loss(lower, upper, b) for b in micro) / self.accumulation
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            v = torch.autograd.grad(example_losses(lower, token_batch(100 + step % 10)).mean(), weights)
            if adaptive:
                moved = self._after_update({n: state.optimizer[n] for n in parameters}, weights, gradients)
            else:
                moved = [-g for g in gradients]
            product = sum((a * m).sum() for a, m in zip(v, moved, strict=True))
            return dict(zip(dict(upper.named_parameters()), torch.autograd.grad(product, net), strict=True))

    def _lower_loss(self, lower: nn.Module, upper: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        losses = example_losses(lower, batch)
        weights = upper(losses.detach().unsqueeze(-1)).squeeze(-1)
        return (weights * losses).sum() / (weights.sum() if self.normalize else len(losses))

    def _after_update(self, states: dict[str, dict], weights: list, gradients: tuple) -> list[Tensor]:
        """The weights after the next step, by torch's own optimizer, differentiable in the gradients."""
        optimizer = self.lower_optimizer([w.detach() for w in weights], differentiable=True)
        moved = [w.detach().clone() for w in weights]
        optimizer.param_groups[0]["params"] = moved
        for m, g, state in zip(moved, gradients, states.values(), strict=True):
            m.grad = g
            optimizer.state[m] = {k: t.clone() if isinstance(t, Tensor) else t for k, t in state.items()}
        with torch.enable_grad():
            optimizer.step()
        return moved


@dataclass(frozen=True)
class Snapshot:
    """Full fp64 copies of a running program's weights and lower optimizer state."""

    lower: dict[str, Tensor]
    upper: dict[str, Tensor]
    optimizer: dict[str, dict]
    num_steps: int

    @classmethod
    def of(cls, program: mlo.Program) -> "Snapshot":
        lower, upper = program.trainers["finetune"], program.trainers["rater"]
        states = {n: lower.optimizer_state(n) for n in lower.block.names}
        full_states: dict[str, dict] = {n: {} for n in states}
        for key in dict.fromkeys(k for state in states.values() for k in state):
            if key == "step":
                for n in states:  # in fp64: torch's differentiable path computes bias corrections in its dtype
                    full_states[n][key] = states[n][key].double()
            else:
                gathered = full_tensors(lower, {n: states[n][key] for n in states})
                for n in states:
                    full_states[n][key] = gathered[n].double()
        lower_weights = {n: lower.engine.local(n) for n in lower.engine.parameters}
        return cls(
            lower={n: t.double() for n, t in full_tensors(lower, lower_weights).items()},
            upper={n: t.double() for n, t in full_tensors(upper, upper.weights()).items()},
            optimizer=full_states,
            num_steps=program.num_steps,
        )


@dataclass(frozen=True)
class Measured:
    """What a program gave."""

    gradient: dict[str, Tensor]
    state: Snapshot
    weights_untouched: bool


def full_tensors(trainer, shards) -> dict[str, Tensor]:
    """Gather local shards; collective."""
    return {n: t.detach().clone() for n, t in trainer.engine.gather(dict(shards)).items()}


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """``|found - expected| / |expected|`` over all parameters together."""
    error = sum(((found[n].double() - expected[n].double()) ** 2).sum() for n in expected)
    return float((error / sum((t.double() ** 2).sum() for t in expected.values())).sqrt())


def errors(rank, world_size, problems, hypergradient, adaptive, engine):
    """Error against the reference of each problem; in one launch, since starting ranks takes longer than they run."""
    found = []
    for problem in problems:
        measured = problem.hypergradient(hypergradient, engine)
        assert measured.weights_untouched
        found.append(relative_error(measured.gradient, problem.reference(measured.state, adaptive=adaptive)))
    return found


# ---- whole programs --------------------------------------------------------------------------------------------------
def weights(program: mlo.Program) -> dict[str, Tensor]:
    """Weights and buffers of all levels, on rank 0."""
    return {f"{level}.{n}": t for level in program.graph.order for n, t in program.state_dict(level).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Whether two dicts have the same names, and tensors that are as close."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
