"""Which operations may be differentiated how: the answers of the torch that is installed.

Exact Hessian-vector products run plain dual numbers outside and ``torch.func.vjp`` inside, so each operation needs a
right formula for the tangent of its backward. torch writes these formulas one by one; a missing one raises, a wrong one
is silent. When this file fails after an upgrade, an operation changed sides: move its row, and look at what the library
does about it in the comment next to it.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

TOLERANCE = 1e-9  # relative, against double backward; all of this file is in fp64
STEP, DIFFERENCE_TOLERANCE = 1e-5, 1e-6  # of central differences of the gradient
Function = Callable[..., Tensor]
Shapes = Sequence[tuple[int, ...]]
Case = tuple[Function, Shapes]


# ---- the operations ----------------------------------------------------------------------------------------------
def module(make: Callable[[], nn.Module], *shapes: tuple[int, ...], call: Function | None = None) -> Case:
    """A module as a function of its inputs and its parameters."""
    net = make().double()
    names = [name for name, _ in net.named_parameters()]

    def function(*tensors: Tensor) -> Tensor:
        inputs, weights = tensors[: len(shapes)], tensors[len(shapes) :]
        out = torch.func.functional_call(net, dict(zip(names, weights, strict=True)), inputs)
        return call(out) if call else out

    return function, (*shapes, *(tuple(p.shape) for p in net.parameters()))


def seeded(case: Case) -> Case:
    """The same random numbers at every call."""

    def call(*tensors: Tensor) -> Tensor:
        torch.manual_seed(2)
        return case[0](*tensors)

    return math_sdpa((call, case[1]))


def math_sdpa(case: Case) -> Case:
    """Attention by matmul and softmax, as the library asks for around every exact derivative."""

    def call(*tensors: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return case[0](*tensors)

    return call, case[1]


def rotary(x: Tensor) -> Tensor:  # [B, T, 2 * C]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    angles = torch.arange(pairs.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def written_into(x: Tensor, row: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[0] = row**2
    out[1:] = x[1:]
    return out


def batch_norm(x: Tensor, copied: Function) -> Tensor:
    """Training mode, with running statistics that are copied at each call, or are not."""
    buffers = {name: copied(buffer) for name, buffer in BATCH_NORM.named_buffers()}
    return torch.func.functional_call(BATCH_NORM, buffers, (x,))


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


def encoder_layer(dropout: float) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout, batch_first=True)


IDS = torch.tensor([[0, 3, 3], [8, 1, 0]])
ROWS = torch.tensor([2, 0, 2])
COLUMNS = torch.tensor([[0, 2, 2, 5], [1, 1, 4, 0]])
LABELS = torch.tensor([0, 4, 6, 2, 4])
TARGETS = torch.linspace(0.0, 1.0, 35, dtype=torch.float64).view(5, 7)
MASK = torch.tensor([[True, False, True, True, False, True]])
BATCH_NORM = nn.BatchNorm1d(6, dtype=torch.float64)
X, Y, IMAGE = (5, 6), (5, 7), (2, 4, 6, 6)
QKV = ((2, 2, 5, 4),) * 3
sdpa = F.scaled_dot_product_attention

CASES: dict[str, Case] = {
    # products
    "matmul": (torch.matmul, [(5, 6), (6, 3)]),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)]),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), [(2, 3, 4), (2, 5, 4)]),
    "linear": (F.linear, [(2, 5, 6), (3, 6), (3,)]),
    "addmm": (torch.addmm, [(3,), (5, 6), (6, 3)]),
    "baddbmm": (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)]),
    # indexing
    "embedding": (lambda w: F.embedding(IDS, w), [(9, 4)]),
    "index_select": (lambda x: x.index_select(0, ROWS), [X]),
    "gather": (lambda x: x.gather(0, COLUMNS % 5), [X]),
    "scatter_add": (lambda x, s: x.scatter_add(1, COLUMNS, s), [X, (2, 4)]),
    "index_add": (lambda x, s: x.index_add(0, ROWS, s), [X, (3, 6)]),
    "index_put": (lambda x, s: x.index_put((ROWS,), s, accumulate=True), [X, (3, 6)]),
    # normalization
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), [X, (6,), (6,)]),
    "layer_norm, bias only": (lambda x, b: F.layer_norm(x, (6,), None, b), [X, (6,)]),
    "layer_norm, no weights": (lambda x: F.layer_norm(x, (6,)), [X]),
    "rms_norm": (lambda x, w: F.rms_norm(x, (6,), w), [X, (6,)]),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(3, 4, 5), (4,), (4,)]),
    "batch_norm, training": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), [X, (6,), (6,)]),
    "BatchNorm1d, buffers copied inside": (lambda x: batch_norm(x, torch.clone), [X]),
    "batch_norm, eval": (lambda x, w, b: F.batch_norm(x, TARGETS[0, :6], TARGETS[1, :6], w, b), [X, (6,), (6,)]),
    # losses
    "softmax": (lambda x: F.softmax(x, -1), [X]),
    "log_softmax": (lambda x: F.log_softmax(x, -1), [X]),
    "logsumexp": (lambda x: torch.logsumexp(x, -1), [X]),
    "cross_entropy": (lambda x: F.cross_entropy(x, LABELS), [Y]),
    "cross_entropy, label_smoothing": (lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1), [Y]),
    "cross_entropy, ignore_index": (lambda x: F.cross_entropy(x, LABELS, ignore_index=4), [Y]),
    "cross_entropy, weight": (lambda x: F.cross_entropy(x, LABELS, weight=TARGETS[1]), [Y]),
    "nll_loss": (lambda x: F.nll_loss(x, LABELS), [Y]),
    "kl_div": (lambda x, z: F.kl_div(x.log_softmax(-1), z.softmax(-1), reduction="batchmean"), [Y, Y]),
    "bce_with_logits": (lambda x: F.binary_cross_entropy_with_logits(x, TARGETS), [Y]),
    "mse_loss, sum": (lambda x, z: F.mse_loss(x, z, reduction="sum"), [Y, Y]),
    "mse_loss, fixed target, none": (lambda x: F.mse_loss(x, TARGETS, reduction="none").mean(), [Y]),
    # activations
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), [X]),
    "clamp": (lambda x: x.clamp(-0.5, 0.5) * x, [X]),
    "dropout": seeded((lambda x: F.dropout(x, 0.4), [X])),
    # convolution and pooling
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding=1), [(2, 3, 6), (4, 3, 3), (4,)]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=2), [IMAGE, (3, 4, 3, 3), (3,)]),
    "conv_transpose2d": (lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), [IMAGE, (4, 3, 3, 3), (3,)]),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), [IMAGE]),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), [IMAGE]),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 4), [IMAGE]),
    "upsample, bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), [IMAGE]),
    "pad": (lambda x: F.pad(x, (1, 2)), [X]),
    # reductions and order
    "var": (lambda x: x.var(-1), [X]),
    "cumsum": (lambda x: x.cumsum(-1), [X]),
    "cumprod": (lambda x: x.cumprod(-1), [X]),
    "prod": (lambda x: x.prod(-1), [X]),
    "sort": (lambda x: x.sort(-1).values ** 2, [X]),
    "topk": (lambda x: x.topk(3).values ** 2, [X]),
    "max": (lambda x: x.max(-1).values ** 2, [X]),
    "amax": (lambda x: x.amax(-1) ** 2, [X]),
    "norm": (lambda x: x.norm(dim=-1), [X]),
    "where": (lambda x: torch.where(x > 0, x**3, x), [X]),
    "masked_fill": (lambda x: x.masked_fill(MASK, 0.0) ** 2, [X]),
    "tril, triu": (lambda x: x.tril() * x.triu(-2), [X]),
    "sqrt": (lambda x: torch.sqrt(x**2 + 0.1), [X]),
    "rsqrt": (lambda x: torch.rsqrt(x**2 + 0.1), [X]),
    "pow": (lambda x: x.abs().pow(1.5), [X]),
    "log": (lambda x: torch.log(x**2 + 0.1), [X]),
    "split, cat": (lambda x: torch.cat([x.split(2, -1)[0] ** 2, x], -1), [X]),
    "roll, flip": (lambda x: x.roll(2, -1) * x.flip(0), [X]),
    "unfold": (lambda x: x.unfold(-1, 3, 1), [X]),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), [X]),
    "rotary, complex": (rotary, [(2, 5, 4)]),
    "in place": (lambda x: x.clone().mul_(x).add_(x).exp_(), [X]),
    "write into a slice": (written_into, [X, (6,)]),
    # attention and modules
    "sdpa": math_sdpa((sdpa, QKV)),
    "sdpa, causal": math_sdpa((lambda q, k, v: sdpa(q, k, v, is_causal=True), QKV)),
    "sdpa, mask": math_sdpa((lambda q, k, v: sdpa(q, k, v, attn_mask=torch.ones(5, 5).tril().bool()), QKV)),
    "sdpa, bias": math_sdpa((lambda q, k, v, b: sdpa(q, k, v, attn_mask=b), [*QKV, (5, 5)])),
    "sdpa, grouped": math_sdpa((lambda q, k, v: sdpa(q, k, v, enable_gqa=True), [QKV[0], *[(2, 1, 5, 4)] * 2])),
    "sdpa, dropout": seeded((lambda q, k, v: sdpa(q, k, v, dropout_p=0.3), QKV)),
    "GRUCell": module(lambda: nn.GRUCell(3, 4), (2, 3), (2, 4)),
    "LSTMCell": module(lambda: nn.LSTMCell(3, 4), (2, 3), call=torch.cat),
    "MultiheadAttention": seeded(module(lambda: SelfAttention(4, 2, 0.1, batch_first=True), (2, 5, 4))),
    "TransformerEncoderLayer": seeded(module(lambda: nn.TransformerEncoderLayer(4, 2, 6), (5, 2, 4))),
    "TransformerEncoderLayer, batch_first": math_sdpa(module(lambda: encoder_layer(dropout=0.0), (2, 5, 4))),
}  # fmt: skip

ACTIVATIONS = (F.gelu, F.silu, F.relu, F.leaky_relu, F.elu, F.softplus, F.mish, F.hardtanh, F.hardswish, F.glu)
UNARY = (torch.sigmoid, torch.tanh, F.logsigmoid, torch.exp, torch.expm1, torch.sin, torch.cos, torch.erf, torch.abs)
BINARY = (torch.maximum, F.l1_loss, F.smooth_l1_loss, F.cosine_similarity, F.pairwise_distance)
CASES |= {function.__name__: (function, [X]) for function in (*ACTIVATIONS, *UNARY, torch.linalg.vector_norm)}
CASES |= {f.__name__: (f, [X, X]) for f in BINARY}

# How an operation fails: what the error says, or a lower bound of the relative error that nobody is told about.
KNOWN_BAD: dict[str, tuple[Function, Shapes, str | float]] = {
    # The mean over a target that does not move; `explained` does not know the message.
    # The way out: (x - target).square().mean(), or another `reduction`.
    "mse_loss, fixed target": (lambda x: F.mse_loss(x, TARGETS), [Y], "ZeroTensors are immutable"),
    "mse_loss, moving target": (lambda x: F.mse_loss(TARGETS, x), [Y], "ZeroTensors are immutable"),
    # No formula. `explained` turns these into a DerivativeError that names finite differences as the way out.
    "huber_loss": (lambda x: F.huber_loss(x, TARGETS), [Y], "forward AD with huber_loss_backward"),
    "ctc_loss": (lambda x: F.ctc_loss(x, IDS[:1, 1:], (5,), (2,)), [(5, 1, 4)], "forward AD with _ctc_loss"),
    "hardsigmoid": (F.hardsigmoid, [X], "forward AD with aten::hardsigmoid_backward"),
    "embedding_bag": (lambda w: F.embedding_bag(IDS, w), [(9, 4)], "forward AD with _embedding_bag"),
    "cdist": (torch.cdist, [(5, 4), (3, 4)], "forward AD with _cdist_forward"),
    "weight_norm": (torch._weight_norm, [X, (5, 1)], "forward AD with _weight_norm_interface"),
    "sdpa, default": (sdpa, QKV, "forward AD with _scaled_dot_product_flash_attention_for_cpu"),
    # Its formula takes a view of a gradient in another memory format.
    "group_norm, channels_last": (
        lambda x: F.group_norm(x.contiguous(memory_format=torch.channels_last), 2), [IMAGE], "view size is not",
    ),
    # `Skeleton.lent` copies buffers inside the derivative, as in the row of CASES.
    "BatchNorm1d, buffers of outside": (lambda x: batch_norm(x, lambda b: b), [X], "would mutate a captured Tensor"),
    # Silent. Nothing in the library detects it; `prod` is rare.
    "scatter_reduce, prod": (lambda x, s: x.scatter_reduce(1, COLUMNS, s, "prod"), [X, (2, 4)], 1.0),
    # Silent: see `test_dropout_draws_another_mask_inside_torch_func_unless_its_input_is_contiguous`.
    "dropout, transposed": (*seeded((lambda x: F.dropout(x.t(), 0.4), [X])), 0.1),
    "encoder layer, batch_first": (*seeded(module(lambda: encoder_layer(dropout=0.4), (2, 5, 4))), 0.1),
}  # fmt: skip


# ---- derivatives of the gradient ---------------------------------------------------------------------------------
class Problem:
    """d/de of the gradient of <c + e dc, f(x + e dx)> by x; where a direction is None, the tensor stays."""

    def __init__(self, function: Function, shapes: Shapes, moves: Sequence[bool] = (), pull_moves: bool = True):
        torch.manual_seed(0)
        self.function = function
        self.x = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        dx = [torch.randn_like(x) for x in self.x]
        self.dx = [d if move else None for d, move in zip(dx, moves or [True] * len(dx), strict=True)]
        out = function(*self.x)
        self.c, dc = torch.randn_like(out), torch.randn_like(out)
        self.dc = dc if pull_moves else None

    def dual_over_vjp(self) -> list[Tensor]:
        """As the library does it."""
        with fwAD.dual_level():
            _, pull = torch.func.vjp(self.function, *map(dual, self.x, self.dx))
            gradients = pull(dual(self.c, self.dc))
            return self.full([fwAD.unpack_dual(g).tangent for g in gradients])

    def jvp_over_vjp(self) -> list[Tensor]:
        """The same nesting with torch.func alone, where every tensor has a tangent, if only of zeros."""

        def gradient(c: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(self.function, *x)[1](c)

        dc, *dx = (torch.zeros_like(x) if d is None else d for x, d in self.pairs())
        return self.full(torch.func.jvp(gradient, (self.c, *self.x), (dc, *dx))[1])

    def double_backward(self) -> list[Tensor]:
        """Plain autograd; exact, but not every operation has it."""
        x = [x.clone().requires_grad_() for x in self.x]
        out = self.function(*x)
        gradients = torch.autograd.grad(out, x, self.c, create_graph=True, materialize_grads=True)
        inner = [(g * d).sum() for g, d in zip(gradients, self.dx, strict=True) if d is not None and g.requires_grad]
        inner += [] if self.dc is None else [(out * self.dc).sum()]
        return self.full(torch.autograd.grad(sum(inner), x, allow_unused=True) if inner else [None] * len(x))

    def difference(self) -> list[Tensor]:
        """Of two first-order gradients."""

        def gradient(step: float) -> tuple[Tensor, ...]:
            c, *x = (x if d is None else x + step * d for x, d in self.pairs())
            x = [x.clone().requires_grad_() for x in x]
            return torch.autograd.grad(self.function(*x), x, c, materialize_grads=True)

        return [(a - b) / (2 * STEP) for a, b in zip(gradient(STEP), gradient(-STEP), strict=True)]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Cotangent and inputs, with their directions."""
        return zip([self.c, *self.x], [self.dc, *self.dx], strict=True)

    def full(self, tangents: Sequence[Tensor | None]) -> list[Tensor]:
        return [torch.zeros_like(x) if t is None else t.detach() for x, t in zip(self.x, tangents, strict=True)]


def dual(x: Tensor, direction: Tensor | None) -> Tensor:
    return x if direction is None else fwAD.make_dual(x, direction)


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative in norm; absolute where nothing is expected."""
    scale = math.hypot(*(float(e.norm()) for e in expected)) or 1.0
    return math.hypot(*(float((f - e).norm()) for f, e in zip(found, expected, strict=True))) / scale


def problems(function: Function, shapes: Shapes) -> Iterator[Problem]:
    """All tensors moving, each alone, and none; formulas leave out what does not move, and each way may be wrong."""
    everything, nothing = [True] * len(shapes), [False] * len(shapes)
    alone = [[i == j for i in range(len(shapes))] for j in range(len(shapes))] if len(shapes) > 1 else []
    for moves in (everything, *alone):
        yield Problem(function, shapes, moves, pull_moves=False)
        yield Problem(function, shapes, moves)
    yield Problem(function, shapes, nothing)


ORDERS = pytest.mark.parametrize("order", [Problem.dual_over_vjp, Problem.jvp_over_vjp], ids=lambda f: f.__name__)


# ---- the audit ---------------------------------------------------------------------------------------------------
@ORDERS
@pytest.mark.parametrize("name", CASES)
def test_forward_over_reverse_is_exact(name: str, order: Callable[[Problem], list[Tensor]]) -> None:
    for problem in problems(*CASES[name]):
        expected, tolerance = problem.difference(), DIFFERENCE_TOLERANCE
        try:
            exact = problem.double_backward()
        except RuntimeError:  # it has none; the difference will do
            pass
        else:  # some double backwards are wrong too
            assert error(expected, exact) < DIFFERENCE_TOLERANCE
            expected, tolerance = exact, TOLERANCE
        assert error(order(problem), expected) < tolerance


@ORDERS
@pytest.mark.parametrize("name", KNOWN_BAD)
def test_what_is_known_to_fail_still_fails_in_the_same_way(name: str, order: Callable[[Problem], list[Tensor]]) -> None:
    function, shapes, failure = KNOWN_BAD[name]
    problem = Problem(function, shapes)
    if isinstance(failure, str):
        with pytest.raises(RuntimeError, match=re.escape(failure)):
            order(problem)
    else:
        assert error(order(problem), problem.difference()) > failure


# ---- what the library keeps away from ----------------------------------------------------------------------------
def test_the_default_attention_of_cpu_has_no_double_backward() -> None:
    # The library runs every exact derivative under sdpa_kernel(MATH); its lack of forward AD is in KNOWN_BAD.
    with pytest.raises(RuntimeError, match="flash_attention_for_cpu_backward is not implemented"):
        Problem(sdpa, QKV).double_backward()


def test_math_attention_has_the_derivatives_of_attention_written_out() -> None:
    # What the library relies on instead. The kernel is chosen in the forward: the pull needs no context around it.
    written_out = Problem(lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v, QKV)
    assert error(Problem(*CASES["sdpa"]).dual_over_vjp(), written_out.double_backward()) < TOLERANCE


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_raises_inside_torch_func(use_reentrant: bool) -> None:
    # The skeleton switches gradient checkpointing off, and units are rematerialised by `remat`.
    problem = Problem(lambda x: checkpoint(torch.sin, x, use_reentrant=use_reentrant), [X])
    with pytest.raises(
        RuntimeError, match="setup_context" if use_reentrant else "saved tensor hooks|implement the jvp"
    ):
        problem.dual_over_vjp()


@pytest.mark.parametrize("name", ["layer_norm, no weights", "batch_norm, training"])
def test_reverse_over_forward_is_silently_wrong_through_normalization(name: str) -> None:
    # The library never nests in this order: dual numbers are always outside.
    problem = Problem(*CASES[name], pull_moves=False)
    x = [x.clone().requires_grad_() for x in problem.x]
    with fwAD.dual_level():
        tangent = fwAD.unpack_dual(problem.function(*map(dual, x, problem.dx))).tangent
    found = torch.autograd.grad(tangent, x, problem.c, materialize_grads=True)
    assert error(found, problem.double_backward()) > 0.1


@pytest.mark.parametrize("name", ["silu", "mish"])
def test_a_pull_without_grad_mode_has_no_forward_derivative(name: str) -> None:
    # `remat` switches grad mode and forward AD on again inside its autograd functions.
    problem = Problem(*CASES[name])
    with fwAD.dual_level():
        _, pull = torch.func.vjp(problem.function, *map(dual, problem.x, problem.dx))
        with torch.no_grad(), pytest.raises(NotImplementedError, match=f"forward AD with aten::{name}_backward"):
            pull(problem.c)


def test_flex_attention_has_no_forward_derivative() -> None:
    # The library needs attn_implementation="eager" or "sdpa". On CPU it has no backward either, so forward AD alone.
    problem = Problem(math_sdpa((sdpa, QKV))[0], QKV)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        assert error([flex_attention(*problem.x)], [problem.function(*problem.x)]) < TOLERANCE
        with fwAD.dual_level(), pytest.raises(NotImplementedError, match="must implement the jvp function"):
            flex_attention(*map(dual, problem.x, problem.dx))
        with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
            torch.func.vjp(flex_attention, *problem.x)


def test_double_backward_through_weight_norm_is_silently_wrong() -> None:
    # A reason for the library not to nest reverse in reverse, and for this file to check its reference by differences.
    problem = Problem(torch._weight_norm, [X, (5, 1)])
    assert error(problem.double_backward(), problem.difference()) > 0.1


def test_dropout_draws_another_mask_inside_torch_func_unless_its_input_is_contiguous() -> None:
    # Inside, the mask is filled in logical order, outside in memory order: replaying the generator is not enough. Who
    # replays it (`remat`) has to be on the same side of torch.func both times, or to make inputs contiguous.
    function, shapes = CASES["dropout"]
    x = torch.randn(shapes[0], dtype=torch.float64)
    for at, same in ((x, True), (x.t(), False), (x.t().contiguous(), True)):
        assert torch.equal(function(at), torch.func.vjp(function, at)[0]) == same
