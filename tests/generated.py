"""Programs out of a grammar, for hypothesis: descriptions, and what they are as levels of scalemlo and of the oracle.

A description is plain data, so that a failing one shrinks and can be read. Every module maps ``[B, T, D]`` to ``[B]``;
a loss is the error of its level's module, and one term for each level that it reads.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import scalemlo as mlo
from tests import oracle

SIZE, LENGTH, BATCH = 4, 3, 4
DAMPING = 50.0
"""Enough that nearly every Hessian here is positive definite with it; the oracle says where one is not."""


# ---- descriptions ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Edge:
    """A loss reads another level: ``how`` is one of :data:`COUPLINGS`."""

    to: str
    how: str


@dataclass(frozen=True)
class LevelText:
    """One level."""

    name: str
    blocks: tuple[str, ...]
    activation: str
    reads: tuple[Edge, ...]
    base: str
    optimizer: str
    learning_rates: tuple[float, ...]
    momentum: float
    accumulation: int
    max_grad_norm: float | None
    estimator: str
    num_terms: int
    products: str
    unroll_steps: int
    shares: str | None  # owns the head of that level's module instead of a module of its own


@dataclass(frozen=True)
class ProgramText:
    """A program, top to bottom."""

    levels: tuple[LevelText, ...]
    seed: int
    has_size: bool = True  # whether losses take the size of all weights, which stage 3 has not at hand


BLOCKS = ("linear", "norm", "conv", "attention", "gate", "embedding")
ACTIVATIONS = {"tanh": torch.tanh, "gelu": F.gelu, "silu": F.silu, "softplus": F.softplus}
COUPLINGS = ("weights", "weights of losses", "pull", "product", "decay", "temperature")
BASES = ("square", "entropy", "smooth")


@st.composite
def programs(draw: Any, max_levels: int = 4, engines: bool = False) -> ProgramText:
    """Descriptions.

    Args:
        draw: Of hypothesis.
        max_levels: How many levels at most.
        engines: Whether it must run on every engine, where parameters are fp32 and rows are split.
    """
    count = draw(st.integers(2, max_levels))
    names = ["abcd"[i] for i in range(count)]
    texts: list[LevelText] = []
    # Responses can be computed in this order: a level's loss reads levels that come before it here.
    rank = [0, *(1 + r for r in draw(st.permutations(range(count - 1))))]
    for i, name in enumerate(names):
        if i == 0:
            reads = [Edge(n, draw(st.sampled_from(("pull", "product")))) for n in names[1:] if draw(st.booleans())]
            reads = reads or [Edge(names[-1], "pull")]
        else:
            earlier = [n for j, n in enumerate(names) if rank[j] < rank[i]]
            reads = [Edge(n, draw(st.sampled_from(COUPLINGS))) for n in earlier if draw(st.booleans())]
        below = any(names.index(edge.to) > i for edge in reads)
        estimators = ["identity", "neumann", "conjugate_gradient", "sama"]
        optimizer = draw(st.sampled_from(("sgd", "adam")))
        unrolls = i == count - 1 and not below and draw(st.booleans())
        estimator = "unrolled" if unrolls else draw(st.sampled_from(estimators))
        optimizer = "sgd" if estimator == "sama" else optimizer
        texts.append(
            LevelText(
                name=name,
                blocks=tuple(draw(st.lists(st.sampled_from(BLOCKS[: 4 if engines else None]), max_size=2))),
                activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
                reads=tuple(reads),
                base=draw(st.sampled_from(BASES)),
                optimizer=optimizer,
                learning_rates=draw(st.sampled_from(((0.1,), (0.1, 0.02)))),
                momentum=draw(st.sampled_from((0.0, 0.9))) if optimizer == "sgd" and estimator != "sama" else 0.0,
                accumulation=draw(st.integers(1, 3)),
                max_grad_norm=draw(st.sampled_from((None, None, 0.05))),
                estimator=estimator,
                num_terms=draw(st.integers(1, 3)),
                products=draw(st.sampled_from(("auto", "remat", "retain"))),
                unroll_steps=draw(st.integers(1, 3)) if unrolls else 1,
                shares=None,
            )
        )
    if count > 2 and draw(st.booleans()):  # two levels divide one module
        texts[-1] = _replaced(texts[-1], shares=names[-2])
        texts[-2] = _replaced(texts[-2], blocks=texts[-2].blocks or ("linear",))
    if engines:
        texts = [_replaced(text, reads=tuple(map(_without_size, text.reads))) for text in texts]
    return ProgramText(_connected(texts), draw(st.integers(0, 2**16)), not engines)


def _without_size(edge: Edge) -> Edge:
    return Edge(edge.to, "product") if edge.how == "decay" else edge


def _replaced(text: LevelText, **changes: Any) -> LevelText:
    return LevelText(**(vars(text) | changes))


def _connected(texts: list[LevelText]) -> tuple[LevelText, ...]:
    """Every level is read by another one: the top reads what no other does."""
    read = {edge.to for text in texts for edge in text.reads}
    missing = [text.name for text in texts[1:] if text.name not in read]
    top = _replaced(texts[0], reads=(*texts[0].reads, *(Edge(n, "pull") for n in missing)))
    if not any(edge.to == top.name for text in texts[1:] for edge in text.reads):
        first = texts[1]
        texts = [top, _replaced(first, reads=(Edge(top.name, "weights"), *first.reads)), *texts[2:]]
    return (top, *texts[1:])


# ---- modules ---------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """One layer of the grammar, residual."""

    def __init__(self, kind: str, activation: str):
        super().__init__()
        self.kind, self.activation = kind, ACTIVATIONS[activation]
        if kind == "linear":
            self.layer = nn.Linear(SIZE, SIZE)
        elif kind == "norm":
            self.layer = nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE))
        elif kind == "conv":
            self.layer = nn.Conv1d(SIZE, SIZE, 3, padding=1, groups=2)
        elif kind == "attention":
            self.layer = nn.MultiheadAttention(SIZE, 2, batch_first=True)
        elif kind == "gate":
            self.layer, self.gate = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)
        else:
            self.layer = nn.Embedding(5, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "conv":
            out = self.layer(x.transpose(1, 2)).transpose(1, 2)
        elif self.kind == "attention":
            out = self.layer(x, x, x, need_weights=False)[0]
        elif self.kind == "gate":
            out = self.layer(x) * self.gate(x).sigmoid()
        elif self.kind == "embedding":
            out = self.layer((x.detach()[..., 0] * 3).long().abs() % 5)
        else:
            out = self.layer(x)
        return x + self.activation(out)


class Net(nn.Module):
    """``[B, T, D] -> [B]``."""

    def __init__(self, text: LevelText):
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind, text.activation) for kind in text.blocks)
        self.head = nn.Linear(SIZE, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean((1, 2))

    def size(self) -> Tensor:
        return sum((p.square().sum() for p in self.parameters()), torch.zeros(()))


def modules_of(program: ProgramText, dtype: torch.dtype) -> dict[str, nn.Module]:
    """One per level, the same object where levels divide one; the same on every call."""
    torch.manual_seed(program.seed)
    found: dict[str, nn.Module] = {}
    for text in program.levels:
        net = Net(text)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.3 * torch.randn(p.shape))
        found[text.name] = found[text.shares] if text.shares else net.to(dtype)
    return found


def names_of(program: ProgramText, text: LevelText, module: nn.Module) -> list[str]:
    """Of the parameters that a level trains."""
    every = [n for n, _ in module.named_parameters()]
    if text.shares:
        return [n for n in every if n.startswith("head")]
    shared = any(other.shares == text.name for other in program.levels)
    return [n for n in every if not (shared and n.startswith("head"))]


# ---- losses ----------------------------------------------------------------------------------------------------------
def loss_of(
    text: LevelText, has_size: bool, own: Any, others: dict[str, Any], batch: tuple, mean: Any, weighted: Any
) -> Tensor:
    """The loss of a level; ``mean`` and ``weighted`` reduce over examples."""
    x, y = batch
    out = own(x)
    for edge in text.reads:
        if edge.how == "temperature":
            out = out * (0.3 * others[edge.to](x)).exp()
    if text.base == "square":
        losses = (out - y).square()
    elif text.base == "entropy":
        losses = F.softplus(out) - out * y.sigmoid()
    else:
        losses = ((out - y).square() + 1).sqrt()
    total, weights = torch.zeros((), dtype=x.dtype), None
    for edge in text.reads:
        other = others[edge.to]
        if edge.how == "weights":
            weights = other(x).sigmoid() if weights is None else weights * other(x).sigmoid()
        elif edge.how == "weights of losses":
            given = x * losses.detach()[:, None, None]
            weights = other(given).sigmoid() if weights is None else weights * other(given).sigmoid()
        elif edge.how == "pull":
            total = total + mean((out - other(x)).square())
        elif edge.how == "product":
            total = total + 0.3 * mean(out * other(x))
        elif edge.how == "decay":
            total = total + mean((0.3 * other(x)).exp()) * 0.1 * own.size()
    size = 0.05 * own.size() if has_size else 0.05 * mean(out.square())
    return total + (mean(losses) if weights is None else weighted(losses, weights)) + size


def batches_of(program: ProgramText, text: LevelText, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Global micro-batches, as many as the level takes in one look."""
    generator = torch.Generator().manual_seed(program.seed + sum(map(ord, text.name)))
    count = text.accumulation * text.unroll_steps
    return [
        (
            torch.randn(BATCH, LENGTH, SIZE, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(BATCH, generator=generator, dtype=torch.float64).to(dtype),
        )
        for _ in range(count)
    ]


# ---- as levels -------------------------------------------------------------------------------------------------------
def estimator_of(text: LevelText) -> mlo.Hypergradient:
    options: dict[str, Any] = {"products": text.products}
    return {
        "identity": lambda: mlo.Identity(),
        "sama": lambda: mlo.SAMA(),
        "neumann": lambda: mlo.Neumann(num_terms=text.num_terms, step_size=0.1, **options),
        "conjugate_gradient": lambda: mlo.ConjugateGradient(max_steps=300, tolerance=1e-13, damping=DAMPING, **options),
        "unrolled": lambda: mlo.Unrolled(),
    }[text.estimator]()


def optimizer_of(text: LevelText) -> Any:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p], "lr": text.learning_rates[i % len(text.learning_rates)]} for i, p in enumerate(parameters)
        ]
        if text.optimizer == "adam":
            return torch.optim.Adam(groups)
        return torch.optim.SGD(groups, momentum=text.momentum)

    return make


def program_of(program: ProgramText, engine: Any, verify: Any, dtype: torch.dtype = torch.float64) -> mlo.Program:
    """The program of a description."""
    modules = modules_of(program, dtype)
    answering = oracle_of(program).answering()
    levels = []
    for text in program.levels:

        def loss(self: Any, batch: Any, text: LevelText = text, **others: Any) -> Tensor:
            return loss_of(text, program.has_size, self.module, others, batch, mlo.mean, mlo.weighted_mean)

        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("self", "batch")]
        parameters += [inspect.Parameter(e.to, inspect.Parameter.KEYWORD_ONLY) for e in text.reads]
        loss.__signature__ = inspect.Signature(parameters)
        module = modules[text.name]
        names = names_of(program, text, module)
        levels.append(
            type("Generated", (mlo.Level,), {"loss": loss})(
                text.name,
                module,
                data=batches_of(program, text, dtype),
                optimizer=optimizer_of(text),
                parameters=functools.partial(_is_in, names),
                unroll_steps=text.unroll_steps,
                gradient_accumulation_steps=text.accumulation,
                max_grad_norm=text.max_grad_norm,
                hypergradient=estimator_of(text) if text.name in answering else None,
            )
        )
    return mlo.Program(levels, engine=engine, verify=verify)


def _is_in(names: list[str], name: str) -> bool:
    return name in names


def oracle_of(program: ProgramText) -> oracle.Oracle:
    """The reference of a description, in fp64."""
    modules = modules_of(program, torch.float64)
    owners: dict[int, list[str]] = {}
    for text in program.levels:
        owners.setdefault(id(modules[text.name]), []).append(text.name)
    levels = []
    for text in program.levels:
        depends = [n for e in (*text.reads, Edge(text.name, "")) for n in owners[id(modules[e.to])] if n != text.name]
        batches = batches_of(program, text, torch.float64)
        levels.append(
            oracle.OracleLevel(
                text.name,
                modules[text.name],
                names_of(program, text, modules[text.name]),
                functools.partial(_plain_loss, text, program.has_size),
                list(dict.fromkeys(depends)),
                [batches[i : i + text.accumulation] for i in range(0, len(batches), text.accumulation)],
                oracle.Optimizer(text.optimizer, text.learning_rates, text.momentum),
                oracle.Estimator(text.estimator, text.num_terms, 0.1, DAMPING),
                text.unroll_steps,
                text.max_grad_norm,
            )
        )
    return oracle.Oracle(levels)


def _plain_loss(text: LevelText, has_size: bool, modules: Any, batch: tuple) -> Tensor:
    return loss_of(text, has_size, modules[text.name], dict(modules), batch, Tensor.mean, _weighted)


def _weighted(losses: Tensor, weights: Tensor) -> Tensor:
    return (losses * weights).sum() / weights.sum()
