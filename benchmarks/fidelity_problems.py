"""The bilevel problems of fidelity.py, and every estimator on them in plain torch: nothing here knows of scalemlo."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

FEATURES, CLASSES, EXAMPLES = 20, 5, 256
ITERATIONS, STEP, RANK, DAMPING = 10, 1.0, 10, 0.1
FAR, NEAR = 0.3, 0.01  # standard deviation of the lower weights about their optimum
SOLVES = 3  # of SOBA, at one and the same point
WARM_UP = 3  # steps of AdamW before SAMA, on small batches: where all gradients are alike its du/dg cancels
ADAMW = dict(lr=1e-3, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.0)
VOCAB, LENGTH, BATCH = 37, 12, 8
Tensors = dict[str, Tensor]


# ---- softmax regression ----------------------------------------------------------------------------------------------
class Classifier(nn.Module):
    """Linear classifier; gives logits and a ridge penalty with a strength per feature."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(CLASSES, FEATURES))
        self.bias = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:  # [B, D], [D] -> [B, C], []
        penalty = (strength * self.weight.square()).sum() / 2 + 0.025 * self.bias.square().sum()
        return F.linear(x, self.weight, self.bias), penalty


class Hyper(nn.Module):
    """Ridge strengths and class weights, both by their logarithms."""

    def __init__(self):
        super().__init__()
        self.strength = nn.Parameter(torch.linspace(-3.5, -1.5, FEATURES))
        self.importance = nn.Parameter(torch.linspace(-0.3, 0.3, CLASSES))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.strength.exp(), self.importance.exp()


def regression_lower_loss(lower, upper, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Weighted cross entropy plus penalty."""
    strength, importance = upper()
    logits, penalty = lower(batch[0], strength)
    losses = F.cross_entropy(logits.to(strength.dtype), batch[1], reduction="none")
    return (importance[batch[1]] * losses).mean() + penalty


def regression_upper_loss(lower, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy on other data."""
    logits, _ = lower(batch[0], batch[0].new_zeros(FEATURES))
    return F.cross_entropy(logits.to(batch[0].dtype), batch[1])


def regression(dtype: torch.dtype, distance: float = FAR) -> tuple[nn.Module, nn.Module, Any, Any]:
    """Lower module, upper module, lower and upper batch; the same numbers, rounded to fp32, in every dtype."""
    lower, upper = Classifier(), Hyper()
    optimum, train, meta = _regression_optimum()
    around = torch.randn(len(optimum), generator=torch.Generator().manual_seed(1))
    move(lower, optimum + distance * around)
    return lower.to(dtype), upper.to(dtype), *((x.to(dtype), y) for x, y in (train, meta))


@cache
def _regression_optimum() -> tuple[Tensor, Any, Any]:
    """The lower weights by Newton's method, and data, fp32."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(CLASSES, FEATURES, generator=generator)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(EXAMPLES, FEATURES, generator=generator)
        return x, (x @ truth.T + 2 * torch.randn(EXAMPLES, CLASSES, generator=generator)).argmax(1)

    train, meta = draw(), draw()
    lower, upper = Classifier().double(), Hyper().double()
    data = train[0].double(), train[1]
    for _ in range(8):
        h, _, g, _ = dense(lower, upper, data, data)
        move(lower, -torch.linalg.solve(h, g))
    return flat_of(lower).float(), train, meta


def move(module: nn.Module, by: Tensor) -> None:
    """Add a flat vector to the parameters."""
    with torch.no_grad():
        sizes = [p.numel() for p in module.parameters()]
        for p, d in zip(module.parameters(), by.split(sizes), strict=True):
            p.add_(d.view_as(p))


def dense(lower: nn.Module, upper: nn.Module, train, meta) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``H [n, n]``, ``M = d2L/dw dlambda [n, m]``, ``g = dL/dw [n]``, ``v = dF/dw [n]``."""
    names, hyper_names = [n for n, _ in lower.named_parameters()], [n for n, _ in upper.named_parameters()]

    def unflat(flat: Tensor, module: nn.Module, keys: list[str]) -> Tensors:
        parts = flat.split([p.numel() for p in module.parameters()])
        return {n: t.view(p.shape) for n, t, p in zip(keys, parts, module.parameters(), strict=True)}

    def loss(w: Tensor, x: Tensor) -> Tensor:
        bound = partial(functional_call, lower, unflat(w, lower, names))
        hyper = partial(functional_call, upper, unflat(x, upper, hyper_names), ())
        return regression_lower_loss(lambda *args: bound(args), hyper, train)

    def outer(w: Tensor) -> Tensor:
        bound = partial(functional_call, lower, unflat(w, lower, names))
        return regression_upper_loss(lambda *args: bound(args), meta)

    w, x = flat_of(lower), flat_of(upper)
    gradient = torch.func.grad(loss)
    h, m = torch.func.jacrev(gradient)(w, x), torch.func.jacrev(gradient, argnums=1)(w, x)
    return h, m, gradient(w, x), torch.func.grad(outer)(w)


def flat_of(module: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# ---- the estimators in dense linear algebra: s(v) ------------------------------------------------------------------
def identity(h: Tensor, v: Tensor, **_) -> Tensor:
    """T1-T2."""
    return v


def sama(h: Tensor, v: Tensor, *, g: Tensor, moments: Tensors, **_) -> Tensor:
    """``du/dg v`` of AdamW, by autograd through its formula."""
    g = g.clone().requires_grad_()
    (b1, b2), step = ADAMW["betas"], WARM_UP + 1
    m = (b1 * moments["exp_avg"] + (1 - b1) * g) / (1 - b1**step)
    q = (b2 * moments["exp_avg_sq"] + (1 - b2) * g * g) / (1 - b2**step)
    return torch.autograd.grad((ADAMW["lr"] * m / (q.sqrt() + ADAMW["eps"])).sum(), g)[0] * v


def neumann(h: Tensor, v: Tensor, **_) -> Tensor:
    """Truncated series."""
    s = torch.zeros_like(v)
    for _ in range(ITERATIONS):
        s = s + STEP * (v - h @ s)
    return s


def conjugate_gradient(h: Tensor, v: Tensor, **_) -> Tensor:
    """Textbook."""
    s, r, p = torch.zeros_like(v), v, v
    for _ in range(ITERATIONS):
        alpha = (r @ r) / (p @ h @ p)
        s, last = s + alpha * p, r
        r = r - alpha * (h @ p)
        p = r + (r @ r) / (last @ last) * p
    return s


def nystrom(h: Tensor, v: Tensor, *, draws: Tensor, **_) -> Tensor:
    """Low rank, from the same test vectors ``[n, k]``."""
    y = h @ draws
    low_rank = y @ torch.linalg.pinv(draws.T @ y, hermitian=True) @ y.T
    return torch.linalg.solve(low_rank + DAMPING * torch.eye(len(v), dtype=v.dtype), v)


def soba(h: Tensor, v: Tensor, **_) -> Tensor:
    """Gradient steps on the linear system, one per solve."""
    s = torch.zeros_like(v)
    for _ in range(SOLVES):
        s = s - STEP * (h @ s - v)
    return s


DENSE: dict[str, Callable[..., Tensor]] = {
    "Identity": identity, "SAMA": sama, "Neumann": neumann, "ConjugateGradient": conjugate_gradient,
    "Nystrom": nystrom, "SOBA": soba,
}  # fmt: skip


def unrolled(lower, upper, lower_loss, upper_loss, train, meta, num_steps: int, rate: float) -> Tensor:
    """``dF(w_K(lambda)) / dlambda`` of SGD by autograd through all steps."""
    weights = {n: p.detach().clone().requires_grad_() for n, p in lower.named_parameters()}

    def bound(values: Tensors) -> Callable:
        return lambda *args: functional_call(lower, values, args)

    for _ in range(num_steps):
        loss = lower_loss(bound(weights), upper, train)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {n: w - rate * g for (n, w), g in zip(weights.items(), gradients, strict=True)}
    found = torch.autograd.grad(upper_loss(bound(weights), meta), list(upper.parameters()))
    return torch.cat([t.flatten() for t in found])


def one_step(lower, upper, lower_loss, upper_loss, train, meta) -> Tensor:
    """``-d/dlambda <dL/dw, v>`` by double backward, v at the weights before the step."""
    weights = list(lower.parameters())
    v = torch.autograd.grad(upper_loss(lower, meta), weights)
    g = torch.autograd.grad(lower_loss(lower, upper, train), weights, create_graph=True)
    product = -sum((a * b).sum() for a, b in zip(v, g, strict=True))
    return torch.cat([t.flatten() for t in torch.autograd.grad(product, list(upper.parameters()))])


# ---- a small decoder -----------------------------------------------------------------------------------------------
class Block(nn.Module):
    """A block of Llama's kind, in its weights' dtype throughout: transformers' takes norms and softmax in fp32."""

    def __init__(self, width: int = 16, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 48, bias=False), nn.Linear(24, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        size, length, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(size, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5 + x.new_full((length, length), -1e4).triu(1)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        gate, up = self.up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """Token ids to logits."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCAB, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, V]
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def example_losses(model, ids: Tensor) -> Tensor:
    """Mean next-token cross entropy per example, ``[B]``."""
    logits = model(ids)[:, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).mean(1)


def decoder_lower_loss(lower, upper, ids: Tensor) -> Tensor:
    """Examples weighted by a net that reads their losses."""
    losses = example_losses(lower, ids)
    return (upper(losses.detach()[:, None])[:, 0] * losses).mean()


def decoder_upper_loss(lower, ids: Tensor) -> Tensor:
    """The plain loss on other data."""
    return example_losses(lower, ids).mean()


def decoder(dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Any, Any]:
    """As :func:`regression`."""
    torch.manual_seed(0)
    lower = Decoder()
    upper = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid())
    train, meta = (torch.randint(0, VOCAB, (BATCH, LENGTH)) for _ in range(2))
    return lower.to(dtype), upper.to(dtype), train, meta


PROBLEMS = {
    "regression": (regression, regression_lower_loss, regression_upper_loss),
    "decoder": (decoder, decoder_lower_loss, decoder_upper_loss),
}
DECODER_STEPS, DECODER_RATE = 3, 0.1


def gaussian_like(module: nn.Module, seed: int) -> Tensor:
    """A test vector of scalemlo's Nystrom, parameter after parameter, flat."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(p.shape, generator=generator).flatten() for p in module.parameters()]
    return torch.cat(parts).double()
