"""A level: one optimization problem of a multilevel program."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .engines import EngineSpec, engine_of
from .hypergradients import Hypergradient, estimator_of

OptimizerLike = Optimizer | Callable[[list[nn.Parameter]], Optimizer]
SchedulerLike = LRScheduler | Callable[[Optimizer], LRScheduler]


class Level:
    """One optimization problem: minimise ``loss`` over some parameters, given the other levels' modules.

    Give a function as ``loss``, or subclass and write it as a method. Its parameter named ``batch`` receives this
    rank's part of a batch of ``data``; every other parameter is the name of a level and receives that level's module,
    its own included, which a method finds as ``self.module``::

        def fit(batch, weights, model):
            return mlo.weighted_mean(losses(model, batch), weights(batch))

        mlo.Level("model", net, loss=fit, data=loader, optimizer=partial(torch.optim.AdamW, lr=1e-4))

    Reading a level that stands
    above makes it an upper level of this one; reading one that stands below makes this loss depend on its best
    response. Which is which follows from the order of the levels in the program, or from annotations
    (``rater: mlo.Upper``, ``student: mlo.Lower``).

    Args:
        name: Python identifier by which other losses read this level.
        module: Holds the parameters. Levels may share one module, each owning some of its parameters.
        loss: The loss as a function; not for subclasses with a method.
        data: Iterable of batches (tensors, tuples, dicts, ``BatchEncoding``), usually a ``DataLoader``, iterated again
            and again. Its batches are global: with W processes each computes on 1/W of every batch. Not needed where
            ``loss`` has no parameter ``batch``.
        optimizer: An optimizer over this level's parameters, or a function that makes one from the list of them
            (``functools.partial(torch.optim.AdamW, lr=1e-4)``). An instance is used as it is, groups and all.
        scheduler: A learning-rate scheduler of that optimizer, or a function that makes one from it; stepped after
            each step of this level.
        parameters: Which parameters of the module this level owns: glob patterns on their names
            (``"*.lora_A.*"``), or a predicate. Parameters with ``requires_grad=False`` are never part of a level.
        unroll_steps: Steps of this level between two steps of the levels above.
        gradient_accumulation_steps: Batches per step; loss and hypergradient are means over all of them.
        max_grad_norm: Clip the gradient to this norm before each step.
        hypergradient: How the levels above differentiate through this one; by default
            :class:`scalemlo.Identity`. A name of :data:`scalemlo.hypergradients.ESTIMATORS` (``"neumann"``) stands for
            that estimator with its defaults.
        engine: Overrides the program's engine for this level's module; also by name (``"fsdp"``, ``"zero3"``).
        allow_unused: Whether a batch may leave some parameters without a gradient (mixtures of experts do); they get
            zeros. Otherwise that is an error that names them.

    Raises:
        ValueError: For values out of range or names that are no identifiers.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        loss: Callable[..., Tensor] | None = None,
        data: Iterable | None = None,
        optimizer: OptimizerLike,
        scheduler: SchedulerLike | None = None,
        parameters: str | Sequence[str] | Callable[[str], bool] | None = None,
        unroll_steps: int = 1,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        hypergradient: Hypergradient | str | None = None,
        engine: EngineSpec | str | None = None,
        allow_unused: bool = False,
    ):
        if not name.isidentifier() or iskeyword(name) or name in ("self", "batch"):
            raise ValueError(f"level name {name!r} must be a Python identifier other than 'self' and 'batch'.")
        if not isinstance(module, nn.Module):
            raise ValueError(f"level {name!r}: module must be a torch.nn.Module, got {type(module).__name__}.")
        for field, value in (
            ("unroll_steps", unroll_steps),
            ("gradient_accumulation_steps", gradient_accumulation_steps),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"level {name!r}: {field}={value!r} must be an integer of at least 1.")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"level {name!r}: max_grad_norm={max_grad_norm!r} must be positive; None turns it off.")
        if not (isinstance(optimizer, Optimizer) or callable(optimizer)):
            raise ValueError(
                f"level {name!r}: optimizer must be a torch optimizer or a function of the parameters, "
                f"got {type(optimizer).__name__}."
            )
        self._function = _checked_function(loss, self, name)
        self.reads_itself = self._function is not None and name in inspect.signature(self._function).parameters
        """Whether the level's module is an argument of its loss."""
        self.name = name
        self.data = data
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.parameters = [parameters] if isinstance(parameters, str) else parameters
        self.unroll_steps = unroll_steps
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.max_grad_norm = max_grad_norm
        self.hypergradient = _named(estimator_of, hypergradient, name)
        self.engine = _named(engine_of, engine, name)
        self.allow_unused = allow_unused
        self._module = module
        self._view: Any = None

    @property
    def module(self) -> Any:
        """The module; inside ``loss`` a view of it that runs under the engine."""
        return self._module if self._view is None else self._view

    def loss(self, batch: Any, *levels: Any) -> Tensor:
        """The loss to minimise: a scalar tensor.

        On several ranks the loss of the level is the mean over ranks of what this returns; see
        :func:`scalemlo.weighted_mean` where that is not the mean over examples.

        Args:
            batch: This rank's part of a batch.
            *levels: Modules of the other levels, by name.

        Raises:
            NotImplementedError: Unless a subclass defines it.
        """
        raise NotImplementedError(f"level {self.name!r}: define loss(self, batch, ...) in {type(self).__name__}.")

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """What the user wrote: the function, or the method of a subclass."""
        return self.loss if self._function is None else self._function

    def run_loss(self, arguments: dict[str, Any]) -> Tensor:
        """The loss on a batch.

        Args:
            arguments: The batch and the other levels' modules, by the names of the parameters.

        Returns:
            What the loss returned.
        """
        own = {self.name: self.module} if self.reads_itself else {}
        return self.loss_function(**arguments, **own)

    def owned_parameters(self) -> list[str]:
        """Canonical names of the parameters this level trains.

        Raises:
            ValueError: If a pattern matches nothing, or nothing is left to train.
        """
        trainable = [n for n, p in self._module.named_parameters() if p.requires_grad]
        if isinstance(self.parameters, Sequence):
            for pattern in self.parameters:
                if not any(fnmatchcase(n, pattern) for n in trainable):
                    raise ValueError(
                        f"level {self.name!r}: parameters={pattern!r} matches no trainable parameter of "
                        f"{type(self._module).__name__}; the first ones are {trainable[:5]}."
                    )
            owned = [n for n in trainable if any(fnmatchcase(n, pattern) for pattern in self.parameters)]
        elif self.parameters is not None:
            owned = [n for n in trainable if self.parameters(n)]
        else:
            owned = trainable
        if not owned:
            total = sum(1 for _ in self._module.parameters())
            raise ValueError(
                f"level {self.name!r} has nothing to train: of the {total} parameters of {type(self._module).__name__} "
                "none is both trainable (requires_grad=True) and selected by `parameters`."
            )
        return owned

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {type(self._module).__name__})"


def _checked_function(loss: Any, level: Level, name: str) -> Callable[..., Tensor] | None:
    has_method = type(level).loss is not Level.loss
    if loss is None:
        if not has_method:
            raise ValueError(
                f"level {name!r} has no loss: give loss=f, a function of the batch and of levels by name, or "
                "define loss(self, batch, ...) in a subclass of Level."
            )
        return None
    if has_method:
        raise ValueError(f"level {name!r}: {type(level).__name__} has a loss of its own; take loss= out.")
    if not callable(loss):
        raise ValueError(f"level {name!r}: loss must be a function, got {loss!r}.")
    return loss


def _named(make: Callable[[Any], Any], given: Any, name: str) -> Any:
    try:
        return None if given is None else make(given)
    except ValueError as error:
        raise ValueError(f"level {name!r}: {error}") from None


def check_loss(value: Any, level: str) -> Tensor:
    """Return the loss if it is a differentiable scalar.

    Args:
        value: What a loss returned.
        level: Name for messages.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"level {level!r}: loss must return a scalar tensor, it returned {type(value).__name__}.")
    if value.dim() != 0:
        raise ValueError(
            f"level {level!r}: loss must be a scalar, it has shape {list(value.shape)}. Reduce it, for instance with "
            "scalemlo.mean(losses)."
        )
    if not torch.is_floating_point(value):
        raise ValueError(f"level {level!r}: loss must be floating point, it is {value.dtype}.")
    return value
