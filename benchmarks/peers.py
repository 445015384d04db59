"""The published packages that scalemlo is compared with, each behind one signature.

``HVP_PEERS`` and ``HYPERGRADIENT_PEERS`` map a row's name to a function. A package is imported inside its function, so
that a missing one is a row that says so: the function raises ``Unsupported("not installed ...")``. Install them into an
environment of their own, as requirements-peers.txt says. Every package is used as documented; its answer is returned as
it is. Betty's and hypergrad's CG update the direction with the old residual, so they do not converge to H^-1.

An HVP peer takes (model, loss_fn, v), with ``loss_fn(model)`` a scalar loss on a fixed batch and ``v`` a tensor for
each trainable parameter by name, and returns the product of the loss's Hessian with ``v``, by the same names.

A hypergradient peer takes (lower, upper, lower_loss, upper_loss, **options), with scalar ``lower_loss(lower, upper)``
and ``upper_loss(lower)`` and the fields of ``Options``, and returns -(d2L/dlambda dw) H^-1 dF/dw by the names of the
upper module's trainable parameters, at the current weights: it takes no lower step and leaves both modules as they are.
"""

import copy
import functools
import importlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

Loss = Callable[..., Tensor]
Values = tuple[Tensor, ...]
Tensors = dict[str, Tensor]

HVP_PEERS: dict[str, Callable[[nn.Module, Callable[[nn.Module], Tensor], Tensors], Tensors]] = {}
HYPERGRADIENT_PEERS: dict[str, Callable[..., Tensors]] = {}


class Unsupported(Exception):
    """A peer is missing or cannot do what is asked; the message is one sentence for the table."""


@dataclass(frozen=True)
class Options:
    """What can be asked of a hypergradient peer; it ignores what it does not have. None is the package's default."""

    iterations: int = 10  # of the linear solver; Nystrom's rank where none is given
    alpha: float = 1.0  # step of Neumann and of boat-torch's map; Betty's and hypergrad's CG scale by it, 1 is plain
    tolerance: float | None = None  # where CG, or boat-torch's series, stops early
    radius: float | None = None  # finite difference of Betty's darts and sama
    rank: int | None = None
    rho: float = 0.01  # Nystrom's damping


def _guarded(function: Callable, *args, **preset) -> Tensors:
    try:
        return function(*args, **preset)
    except Unsupported:
        raise
    except ModuleNotFoundError as error:
        raise Unsupported(f"not installed ({error})") from error
    except Exception as error:  # whatever goes wrong in a peer is that peer's row
        raise Unsupported(f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}") from error


def _hvp_peer(name: str, **preset) -> Callable:
    # The function is returned bare, to be registered under more presets.
    def register(function: Callable) -> Callable:
        HVP_PEERS[name] = lambda model, loss_fn, v: _guarded(function, model, loss_fn, v, **preset)
        return function

    return register


def _hypergradient_peer(name: str, **preset) -> Callable:
    def register(function: Callable) -> Callable:
        # Options() stands outside the guard: an unknown option is the caller's mistake, not the peer's.
        HYPERGRADIENT_PEERS[name] = lambda lower, upper, lower_loss, upper_loss, **options: _guarded(
            function, _Bilevel(lower, upper, lower_loss, upper_loss), Options(**options), **preset
        )
        return function

    return register


def _cannot(package: str, reason: str) -> None:
    importlib.import_module(package)  # a missing package says so first
    raise Unsupported(reason)


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in module.named_parameters() if param.requires_grad}


def _named(names: Iterable[str], values: Iterable[Tensor]) -> Tensors:
    return dict(zip(names, values, strict=True))


class _Apply(nn.Module):
    # functional_call swaps the parameters of a module only: so a function of modules becomes one.
    def __init__(self, function: Callable, *parts: nn.Module):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, *_) -> Tensor:
        return self.function(*self.parts)


def _apply(function: Callable, modules: tuple[nn.Module, ...], params: tuple[Tensors, ...]) -> Tensor:
    """The function of the modules, with their parameters replaced by the given ones."""
    swapped = {f"parts.{i}.{name}": value for i, part in enumerate(params) for name, value in part.items()}
    return functional_call(_Apply(function, *modules), swapped, ())


@dataclass(frozen=True)
class _Bilevel:
    lower: nn.Module
    upper: nn.Module
    lower_loss: Loss
    upper_loss: Loss

    def copies(self) -> tuple[nn.Module, nn.Module]:
        # For the packages that perturb weights in place, step an optimizer or write .grad.
        lower, upper = copy.deepcopy((self.lower, self.upper))
        upper.zero_grad(set_to_none=True)
        return lower, upper

    def values(self) -> tuple[Values, Values]:
        return tuple(tuple(p.detach().clone() for p in _trainable(m).values()) for m in (self.lower, self.upper))

    def inner_objective(self, inner: Values, outer: Values) -> Tensor:
        params = _named(_trainable(self.lower), inner), _named(_trainable(self.upper), outer)
        return _apply(self.lower_loss, (self.lower, self.upper), params)

    def outer_objective(self, inner: Values, outer: Values) -> Tensor:
        return _apply(self.upper_loss, (self.lower,), (_named(_trainable(self.lower), inner),))


@_hvp_peer("torch.autograd double backward")
def _hvp_double_backward(model: nn.Module, loss_fn: Loss, v: Tensors) -> Tensors:
    params = _trainable(model)
    derivative = functools.partial(torch.autograd.grad, inputs=list(params.values()), materialize_grads=True)
    grads = derivative(loss_fn(model), create_graph=True)
    return _named(params, derivative(grads, grad_outputs=[v[name] for name in params]))


@_hvp_peer("torch.func jvp(grad)")
def _hvp_forward_over_reverse(model: nn.Module, loss_fn: Loss, v: Tensors) -> Tensors:
    params = {name: param.detach() for name, param in _trainable(model).items()}
    gradient = torch.func.grad(lambda p: _apply(loss_fn, (model,), (p,)))
    return torch.func.jvp(gradient, (params,), ({name: v[name] for name in params},))[1]


@_hvp_peer("curvlinops HessianLinearOperator")
def _hvp_curvlinops(model: nn.Module, loss_fn: Loss, v: Tensors) -> Tensors:
    # It takes jvp of jacrev, which torch 2.13 gets wrong for the gain of F.layer_norm (bare torch.func shows the same).
    from curvlinops import HessianLinearOperator

    class GivenLoss(nn.Module):
        # The "prediction" is the scalar loss already: the operator wants a model and a loss with a reduction.
        reduction = "sum"

        def forward(self, loss: Tensor, _: Tensor) -> Tensor:
            return loss

    params = _trainable(model)
    # The determinism check costs two gradients and two products: off, as the package allows for a fixed batch.
    problem = _Apply(loss_fn, model), GivenLoss(), list(params.values()), [(torch.zeros(1), torch.zeros(1))]
    operator = HessianLinearOperator(*problem, check_deterministic=False)
    return _named(params, operator @ [v[name] for name in params])


@_hvp_peer("backpack hessian_vector_product")
def _hvp_backpack(model: nn.Module, loss_fn: Loss, v: Tensors) -> Tensors:
    from backpack.hessianfree.hvp import hessian_vector_product

    params = _trainable(model)
    return _named(params, hessian_vector_product(loss_fn(model), list(params.values()), [v[n] for n in params]))


@_hvp_peer("hypergrad hvp", rev_only=False)
@_hvp_peer("hypergrad hvp (reverse only)", rev_only=True)
def _hvp_hypergrad(model: nn.Module, loss_fn: Loss, v: Tensors, rev_only: bool) -> Tensors:
    from hypergrad.utils import hvp

    params = {name: param.detach() for name, param in _trainable(model).items()}
    tangent = tuple(v[name] for name in params)
    loss = lambda values: _apply(loss_fn, (model,), (_named(params, values),))  # noqa: E731
    return _named(params, hvp(loss, tuple(params.values()), tangent, rev_only=rev_only))


@_hvp_peer("torchopt")
def _hvp_torchopt(*_) -> None:
    _cannot("torchopt", "torchopt has no public Hessian-vector product, only linear solvers over a caller's own matvec")


@_hypergradient_peer("betty darts", method="darts")
@_hypergradient_peer("betty sama", method="sama")
@_hypergradient_peer("betty neumann", method="neumann")
@_hypergradient_peer("betty cg", method="cg")
def _betty(problem: _Bilevel, options: Options, method: str) -> Tensors:
    """One iteration of the engine with steps of length 0; darts, and sama under SGD, take the identity for H^-1."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.logging.logger_base import get_logger
    from betty.problems import ImplicitProblem

    get_logger().setLevel(logging.WARNING)
    lower, upper = problem.copies()
    captured = {}

    class Trained(ImplicitProblem):
        def trainable_parameters(self) -> list[Tensor]:
            return list(_trainable(self.module).values())

        parameters = trainable_parameters  # its cg differentiates by parameters(), frozen ones included

    class Inner(Trained):
        def training_step(self, _) -> Tensor:
            return problem.lower_loss(self.module, self.outer.module)

    class Outer(Trained):
        def training_step(self, _) -> Tensor:
            return problem.upper_loss(self.inner.module)

        def grad_callback(self) -> None:
            captured.update({name: param.grad.clone() for name, param in _trainable(self.module).items()})

    def trained(kind: type, config: Config, module: nn.Module) -> Trained:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        return kind(kind.__name__.lower(), config, module, optimizer, train_data_loader=[(torch.zeros(()),)])

    settings = {"cg_iterations": options.iterations, "neumann_iterations": options.iterations}
    settings |= {"cg_alpha": options.alpha, "neumann_alpha": options.alpha}
    if options.radius is not None:
        settings |= {"darts_alpha": options.radius, "sama_adam_alpha": options.radius}
    inner = trained(Inner, Config(type=method, unroll_steps=1, **settings), lower)
    outer = trained(Outer, Config(retain_graph=True), upper)
    engine_config = EngineConfig(train_iters=1, strategy="gpu" if next(lower.parameters()).is_cuda else "cpu")
    Engine([outer, inner], engine_config, {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}).run()
    return captured


@_hypergradient_peer("torchopt CG implicit", solver="solve_cg")
@_hypergradient_peer("torchopt normal CG implicit", solver="solve_normal_cg")
@_hypergradient_peer("torchopt Neumann implicit", solver="solve_inv")
def _torchopt(problem: _Bilevel, options: Options, solver: str) -> Tensors:
    """The functional interface, ``custom_root``, around a solver that returns the weights it was given."""
    import torchopt

    settings = {"maxiter": options.iterations}
    if solver == "solve_inv":
        settings |= {"ns": True, "alpha": options.alpha}
    elif options.tolerance is not None:
        settings |= {"rtol": options.tolerance}
    solve = getattr(torchopt.linear_solve, solver)(**settings)
    implicit = torchopt.diff.implicit.custom_root(torch.func.grad(problem.inner_objective), argnums=1, solve=solve)
    inner, outer = problem.values()
    solution = implicit(lambda inner, outer: inner)(inner, tuple(value.requires_grad_() for value in outer))
    return _named(_trainable(problem.upper), torch.autograd.grad(problem.outer_objective(solution, outer), outer))


@_hypergradient_peer("hypergrad CG", method="conjugate_gradient")
@_hypergradient_peer("hypergrad Neumann", method="neumann")
@_hypergradient_peer("hypergrad Nystrom", method="nystrom")
def _hypergrad(problem: _Bilevel, options: Options, method: str) -> Tensors:
    """PyPI's hypergrad, which is moskomule/hypergrad."""
    from hypergrad import approx_hypergrad

    inner, outer = problem.values()
    settings = options.iterations, options.alpha
    if method == "nystrom":
        settings = min(options.rank or options.iterations, sum(value.numel() for value in inner)), options.rho
    objectives = problem.inner_objective, problem.outer_objective
    return _named(_trainable(problem.upper), getattr(approx_hypergrad, method)(*objectives, inner, outer, *settings))


@_hypergradient_peer("hypergrad fixed point")
def _hypergrad_fixed_point(*_) -> None:
    _cannot("hypergrad", "PyPI's hypergrad has no fixed point; prolearner/hypertorch, which has one, is not on PyPI")


@_hypergradient_peer("boat-torch CG", operator="CG")
@_hypergradient_peer("boat-torch Neumann", operator="NS")
def _boat(problem: _Bilevel, options: Options, operator: str) -> Tensors:
    """The hypergradient operator alone: ``Problem.run_iter`` would take at least one lower step first."""
    kind = getattr(importlib.import_module(f"boat_torch.na_ol.{operator.lower()}"), operator)
    lower, upper = problem.copies()
    weights, outer = list(_trainable(lower).values()), _trainable(upper)
    tolerance = 1e-10 if options.tolerance is None else options.tolerance  # the default of its solvers
    config = {
        "lower_level_opt": torch.optim.SGD(weights, lr=options.alpha),  # never stepped: its lr scales the map
        "CG": {"tolerance": tolerance, "k": options.iterations},
        "gm_op": ["NGD"], "GDA": {"alpha_init": 0.0, "alpha_decay": 0.0},
    }  # fmt: skip
    instance = kind(
        ll_objective=lambda feed, above, below, params: problem.lower_loss(below, above),
        ul_objective=lambda feed, above, below, params: problem.upper_loss(below),
        ll_model=lower, ul_model=upper, ll_var=weights, ul_var=list(outer.values()), solver_config=config,
    )  # fmt: skip
    instance.compute_gradients({}, {}, auxiliary_model=lower, lower_model_params=weights)
    return {name: param.grad for name, param in outer.items()}
