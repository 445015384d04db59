"""One family: scalemlo's products beside plain double backward, and what becomes of it in a table."""

import copy
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import scalemlo as mlo
from scalemlo.derivatives.hessian import hessian
from tests.families.configs import tiny
from tests.families.inputs import Inputs, NoInputs, find_inputs
from tests.families.oracle import EPSILON, RATE, Oracle, losses_of
from tests.problems import full_tensors, relative_error, weight_net

MAX_PARAMETERS = 6_000_000
BOUNDS = {"fp64": 1e-8, "fp64, parts raised": 1e-8, "fp64, parts fp32": 1e-4, "fp32": 1e-3}
DIFFERENCES_BOUND = 1e-6
PRODUCTS = ("remat", "retain", "identity", "sama", "unrolled")
Tensors = dict[str, Tensor]
SINGLE = torch.float32  # while `single_is_double`, that name says fp64
JUDGED_BY = {"remat": "hessian", "retain": "hessian"} | {n: n for n in PRODUCTS[2:]}
PACKAGE = str(Path(mlo.__file__).parent)


class Lower(mlo.Level):
    def loss(self, batch, rater):
        losses = losses_of(self.module, batch)
        return mlo.weighted_mean(losses, rater(losses.detach().unsqueeze(-1)).squeeze(-1), normalize=False)


class Rater(mlo.Level):
    def loss(self, batch, lower):
        return mlo.mean(losses_of(lower, batch))


class LooksForSingle(TorchFunctionMode):
    """Notes whether anything that is differentiated is computed in fp32."""

    found = False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == SINGLE and out.requires_grad:
            self.found = True
        return out


def build(model_type: str, architecture: str) -> nn.Module:
    """The same model on every call, no parameter zero, no dropout.

    Raises:
        MemoryError: If it is not small.
    """
    torch.manual_seed(3)
    config: Any = tiny(model_type)
    cls = getattr(transformers, architecture)
    with torch.device("meta"):
        count = sum(p.numel() for p in cls._from_config(config).parameters())
    if count > MAX_PARAMETERS:
        raise MemoryError(f"{count / 1e6:.0f}M parameters")
    model = cls._from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.nan_to_num_(0.0).clamp_(-2, 2).add_(0.1 * torch.randn_like(p)) if p.is_floating_point() else p
    if "eager" != getattr(model.config, "_experts_implementation", "eager"):
        model.set_experts_implementation("eager")  # grouped products have no fp64
    return model.double().train()


def measure(kind: str, model_type: str, architecture: str) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"family": model_type, "kind": kind, "architecture": architecture}
    try:
        model = build(model_type, architecture)
    except Exception as error:  # whatever a configuration says to being small
        return row | {"status": "not built", "reason": said(error)}
    row["num_parameters"] = sum(p.numel() for p in model.parameters())
    row["attention"] = getattr(model.config, "_attn_implementation", None) or "own"
    reasons = []
    for dtype, context in DTYPES.items():
        with context():
            if dtype == "fp32":
                model.float()
            try:
                prepared = Prepared.of(kind, model)
            except Exception as error:  # whatever a model says to inputs that it was not made for
                reasons.append(said(error))
                continue
            if dtype == "fp64" and prepared.has_single:
                dtype = "fp64, parts fp32"
            found = compared(
                model, prepared.batches, BOUNDS[dtype], PRODUCTS[:3] if "parts fp32" in dtype else PRODUCTS
            )
        row |= {"dtype": dtype, "notes": prepared.notes} | found
        if dtype == "fp64, parts fp32":
            with single_is_double():
                raised = Prepared.of(kind, model)
                bound = BOUNDS[dtype if raised.has_single else "fp64"]
                row["raised"] = compared(model, raised.batches, bound) | {"has_single": raised.has_single}
        return row
    return row | {"status": "not run", "reason": " / ".join(dict.fromkeys(reasons))}


@dataclass(frozen=True)
class Prepared:
    """Batches that a model takes.

    Args:
        batches: Two of the lower level, one of the upper.
        notes: What is special.
        has_single: Whether anything that is differentiated is computed in fp32.
    """

    batches: list[Inputs]
    notes: list[str]
    has_single: bool

    @classmethod
    def of(cls, kind: str, model: nn.Module) -> "Prepared":
        """Finds them; switches off what is random, and freezes what the loss does not reach."""
        batches, note = find_inputs(kind, model, [1, 2, 3])
        notes = [note] if note else []
        with torch.no_grad():
            if any(not torch.equal(losses_of(model, batches[0]), losses_of(model, batches[0])) for _ in range(2)):
                model.eval()
                notes.append("eval mode: random in train mode")
        with LooksForSingle() as mode:
            losses_of(model, batches[0])
        frozen = freeze_unused(model, batches)
        with torch.no_grad():  # a state that the model keeps has no graph that would stop a copy
            losses_of(model, batches[0])
        if frozen:
            notes.append(f"{frozen} unused parameters frozen")
        return cls(batches, notes, mode.found)


def freeze_unused(model: nn.Module, batches: list[Inputs]) -> int:
    """Freezes what the loss does not reach, as scalemlo asks for; returns how many parameters."""
    unused = [p for p in model.parameters() if p.requires_grad]
    for batch in batches[:1]:
        found = torch.autograd.grad(losses_of(model, batch).sum(), unused, allow_unused=True)
        unused = [p for p, g in zip(unused, found, strict=True) if g is None]
    if not all(g.isfinite().all() for g in found if g is not None):
        raise NoInputs("its gradient is not finite")
    for p in unused:
        p.requires_grad_(False)
    return len(unused)


@contextmanager
def single_is_double() -> Iterator[None]:
    """What a model casts to fp32 by name becomes fp64, so that nothing but rounding of fp64 is left."""
    to_single = Tensor.float
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.float32 = torch.float = SINGLE  # type: ignore[misc]
        Tensor.float = to_single  # type: ignore[method-assign]


DTYPES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "fp64": nullcontext, "fp64, parts raised": single_is_double, "fp32": nullcontext,
}  # fmt: skip
"""Tried in this order until the forward pass runs."""


def compared(
    model: nn.Module, batches: list[Inputs], bound: float, products: Sequence[str] = PRODUCTS
) -> dict[str, Any]:
    """Status, errors and refusals of all products."""
    start = time.perf_counter()
    torch.manual_seed(4)
    net = weight_net().double()
    v = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    row: dict[str, Any] = {"errors": {}, "refusals": {}, "tracebacks": {}}
    try:
        expected = Oracle(model, net, batches).products(v)
    except Exception as error:
        expected = None
        row["oracle"] = said(error)
    reference = copy.deepcopy(model)  # a forward pass may leave a graph in attributes
    with sdpa_kernel(SDPBackend.MATH):
        found = torch.autograd.grad(
            losses_of(reference, batches[0]).sum(), [p for p in reference.parameters() if p.requires_grad]
        )
    padding = padding_rows(model, dict(zip(v, found, strict=True)))
    computed: dict[str, dict[str, Tensor]] = {}
    row["seconds_oracle"] = round(time.perf_counter() - start, 1)
    program: mlo.Program | None = None
    gradient: Tensors | Exception
    try:
        program = program_of(model, net, batches, mlo.Identity())
        gradient = full_tensors(program.trainers["rater"], program.gradients()["rater"])
    except Exception as error:
        gradient = error
    for name in products:
        try:
            if name in ESTIMATORS:
                computed[name] = hypergradient(ESTIMATORS[name], model, net, batches)
            elif name != "identity" and program is not None:  # it has taken the first batches, also if it failed
                computed[name] = hessian_product(program, name, v)
            elif isinstance(gradient, Exception):
                raise gradient
            else:
                computed[name] = gradient
        except Exception as error:
            row["refusals" if is_sentence(error) else "tracebacks"][name] = said(error)
            if not is_sentence(error):
                row.setdefault("trace", traceback.format_exc()[-3000:])
            continue
        if name in ("remat", "retain"):
            for n, i in padding.items():
                computed[name][n][i] = 0.0  # how others would change with it: nothing that torch's graph knows
        wanted = expected and expected[JUDGED_BY[name]]
        row["errors"][name] = relative_error(computed[name], wanted) if wanted else float("inf")
    wrong = [n for n, e in row["errors"].items() if not e <= bound]
    if wrong:
        try:
            judge = Oracle(model, net, batches).differenced(v)
        except Exception as error:
            row["differenced"] = said(error)
        else:
            judged = {n: relative_error(t, judge[JUDGED_BY[n]]) for n, t in computed.items()}
            off = {n: relative_error(t, judge[n]) for n, t in expected.items()} if expected else {}
            row |= {"differenced": judged, "oracle_differenced": off}
            # Torch is overruled where it is the one that is further from the differences, by far.
            wrong = [
                n for n in wrong if not judged[n] <= min(DIFFERENCES_BOUND, off.get(JUDGED_BY[n], float("inf")) / 10)
            ]
    if row["tracebacks"]:
        status = "traceback"
    elif wrong:
        status = "wrong" if expected or "oracle_differenced" in row else "no oracle"
    else:
        status = "refused" if row["refusals"] else "exact"
    return row | {"status": status, "seconds": round(time.perf_counter() - start, 1)}


def program_of(model: nn.Module, net: nn.Module, batches: list[Inputs], estimator: Any, **options: Any) -> mlo.Program:
    model, net = copy.deepcopy(model), copy.deepcopy(net)
    sgd = partial(torch.optim.SGD, lr=RATE)
    adam = partial(torch.optim.Adam, lr=RATE, eps=EPSILON)
    lower = Lower(
        "lower", model, data=batches[:2], optimizer=adam if isinstance(estimator, mlo.SAMA) else sgd,
        hypergradient=estimator, **options,
    )  # fmt: skip
    return mlo.Program([Rater("rater", net, data=batches[2:], optimizer=sgd), lower], engine=mlo.Single())


def hypergradient(estimator: Any, model: nn.Module, net: nn.Module, batches: list[Inputs]) -> Tensors:
    options = {"unroll_steps": 2} if isinstance(estimator, mlo.Unrolled) else {}
    program = program_of(model, net, batches, estimator, **options)
    return full_tensors(program.trainers["rater"], program.gradients()["rater"])


def hessian_product(program: mlo.Program, products: str, v: Tensors) -> Tensors:
    lower = program.trainers["lower"]
    direction = mlo.Shards(lower.engine.shard({n: v[n] for n in lower.block.names}), lower.engine.group)
    with hessian(lower.loss_at(), lower.block, products) as operator:
        return full_tensors(lower, operator(direction))


def padding_rows(model: nn.Module, gradient: Tensors) -> dict[str, int]:
    """Rows of embeddings that stand for padding and that torch gives no gradient: no step moves them."""
    found = {}
    for prefix, module in model.named_modules():
        name = f"{prefix}.weight"
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and name in gradient:
            if not gradient[name][module.padding_idx].any():
                found[name] = module.padding_idx
    return found


ESTIMATORS = {"sama": mlo.SAMA(), "unrolled": mlo.Unrolled(num_steps=2)}


def is_sentence(error: BaseException) -> bool:
    """Whether scalemlo itself speaks: an error of its own class, or one that its own code raises."""
    if type(error).__module__.startswith("scalemlo"):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, ValueError) and last.filename.startswith(PACKAGE)


def said(error: BaseException) -> str:
    if isinstance(error, NoInputs):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:900]
