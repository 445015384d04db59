"""Exact products with second derivatives of a level's loss, on the shards of any engine.

One primitive serves them all: with some parameters p moving along directions d,

    d/de grad_q L(p + e d) at e = 0    for wanted parameters q.

Lower weights moving and wanted: the Hessian-vector product. Lower weights moving, upper parameters wanted: the mixed
partial ``d/dlambda <dL/dw, v>``. Upper parameters moving, lower weights wanted: its transpose. It is computed forward
over reverse: dual numbers outside, reverse mode inside. Where the wanted parameters enter outside the large model
(example weights, mixtures), no backward pass runs through that model and no graph of it is stored; what remains is the
forward directional derivative of its losses. Elsewhere units are rematerialised (:mod:`.autodiff.remat`), so that two
units' weights, the root's and one block's, are gathered at most.

First derivatives are taken by torch's own autograd, units rematerialised by ``torch.utils.checkpoint``, so that they
pass whatever the training step passes: any kernel, any ``autograd.Function``, hooks.

Modules run on their skeletons, in the precision of the live modules, from the state in which the step's first pass
found them; where second derivatives are taken, with attention in torch's own operations: fused kernels have neither
forward nor second derivatives.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..autodiff.errors import DerivativeError, explained
from ..autodiff.evaluation import Evaluation, Form
from ..autodiff.operations import evaluation
from ..autodiff.rng import seeded
from ..autodiff.skeleton import Lender
from ..distributed.group import all_reduce_mean_
from ..distributed.shards import Shards
from ..engines.base import Engine, ParameterBlock
from .finite_difference import CentralDifference
from .gradient_hooks import GradientHooks

Blocks = Mapping[str, ParameterBlock]
Vector = tuple[ParameterBlock, Shards]
"""A vector and the parameters it belongs to."""


class Entry(Protocol):
    """The state of Python from which all passes of one step start."""

    def replayed(self) -> AbstractContextManager[None]:
        """Context that starts from it, and puts back at its end what it found."""


@dataclass(frozen=True)
class Examined:
    """One pass of second derivatives in full: the loss, its gradient, and how that moves; means over ranks."""

    loss: float
    gradient: dict[str, Shards]
    tangents: dict[str, Shards]


@dataclass(frozen=True)
class LossAt:
    """A level's loss at one point: the mean over ranks and micro-batches of what ``evaluate`` returns.

    Args:
        evaluate: This rank's loss on one micro-batch, calling modules through their views.
        batches: Micro-batches.
        seed: Random numbers (dropout masks) are drawn from it, micro-batch after micro-batch.
        engines: All engines the loss may call.
        required: An engine it must call, if any: derivatives by its weights would otherwise be silently zero.
        point: Weights to use in the place of the live ones.
        scale: What reverse passes multiply the loss with and divide their results by, against underflow in fp16.
        entry: The state that passes start from; None for that which is there.
        seen: If given, each pass of second derivatives appends this rank's loss to it.
    """

    evaluate: Callable[[Any], Tensor]
    batches: Sequence[Any]
    seed: int
    engines: Sequence[Engine]
    required: Engine | None
    point: Sequence[Vector] = ()
    scale: float = 1.0
    entry: Entry | None = None
    seen: list[float] | None = None

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.engines[0].device

    def at(self, *point: Vector) -> "LossAt":
        """The same loss at other weights."""
        return replace(self, point=point)

    def value(self) -> float:
        """The loss."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self.running("plain"), torch.no_grad():
            for batch in self.batches:
                total += self.local_loss(batch, self.weights())
        return float(all_reduce_mean_(total / len(self.batches)))

    def gradient(self, wanted: Blocks) -> dict[str, Shards]:
        """First derivatives, at weights that need not be the live ones: what the training step would follow.

        Args:
            wanted: Parameters by any key.

        Returns:
            One vector per key, mean over ranks and micro-batches.
        """
        return self._differentiate((), wanted, [_primal])[0]

    def gradient_of_value(self, wanted: Blocks) -> dict[str, Shards]:
        """First derivatives of the loss as a function of the weights.

        They differ from :meth:`gradient` where a training step follows something else: hooks change gradients, rows of
        padding get none.

        Args:
            wanted: Parameters by any key.

        Returns:
            As :meth:`gradient`.
        """
        return self._first_order(wanted, "value")

    def tangents(self, moving: Sequence[Vector], wanted: Blocks) -> dict[str, Shards]:
        """``d/de`` of the gradient by the wanted parameters while others move; see the module's docstring.

        Where the step's gradient g by the moving parameters w is none of its loss (hooks change it, rows of padding get
        none), this is the derivative of g all the same: ``d<g, u>/dq`` for directions u of w.

        An operation without the derivative, or a weight used behind its unit's back, is a :class:`DerivativeError`.

        Args:
            moving: Directions u, linear in all of them together.
            wanted: Parameters by any key.

        Returns:
            One vector per key, mean over ranks and micro-batches, laid out like the block.
        """
        moving, factor = self._of_the_size_of_weights(moving)
        found = self._differentiate(moving, wanted, [_tangent])[0]
        return {key: x.mul_(1 / factor) for key, x in found.items()} if factor != 1.0 else found

    def gradient_and_tangents(
        self, moving: Sequence[Vector], wanted: Blocks
    ) -> tuple[dict[str, Shards], dict[str, Shards]]:
        """:meth:`gradient`, and how it changes along directions in which parameters move, out of one pass."""
        return self._both(moving, wanted, follows=True)

    def examined(self, moving: Sequence[Vector], wanted: Blocks) -> "Examined":
        """:meth:`tangents` with all that the same pass computes on the way, to be compared with the live module's."""
        seen: list[float] = []
        gradient, tangents = replace(self, seen=seen)._both(moving, wanted, follows=False)
        loss = torch.tensor(seen[0], dtype=torch.float64, device=self.device)
        return Examined(float(all_reduce_mean_(loss)), gradient, tangents)

    def _both(
        self, moving: Sequence[Vector], wanted: Blocks, *, follows: bool
    ) -> tuple[dict[str, Shards], dict[str, Shards]]:
        moving, factor = self._of_the_size_of_weights(moving)
        gradient, tangents = self._differentiate(moving, wanted, [_primal, _tangent], None, follows)
        return gradient, {key: x.mul_(1 / factor) for key, x in tangents.items()} if factor != 1.0 else tangents

    def _of_the_size_of_weights(self, moving: Sequence[Vector]) -> tuple[Sequence[Vector], float]:
        """Directions scaled together to the size of the weights they move, where a scaled loss says fp16."""
        if self.scale == 1.0:
            return moving, 1.0
        weights = math.hypot(*(float(block.shards().norm()) for block, _ in moving))
        size = math.hypot(*(float(v.norm()) for _, v in moving))
        factor = weights / size if 0 < size < math.inf and weights > 0 else 1.0  # where it overflowed: as it is
        return [(block, v * factor) for block, v in moving], factor

    def directional_outputs(self, lower: ParameterBlock, v: Shards, wanted: Blocks) -> dict[str, Shards]:
        """The mixed partial with central differences of the lower module's outputs, the rest of the loss exact.

        Args:
            lower: The parameters w, in one module.
            v: Direction.
            wanted: The parameters lambda.

        Returns:
            As :meth:`tangents`.
        """
        return self._differentiate((), wanted, [_tangent], CentralDifference(lower, v))[0]

    def _differentiate(
        self,
        moving: Sequence[Vector],
        wanted: Blocks,
        parts: Sequence[Callable[[Tensor], Tensor | None]],
        difference: CentralDifference | None = None,
        follows: bool = False,
    ) -> list[dict[str, Shards]]:
        """First derivatives or what becomes of them, one vector per part and key.

        Args:
            moving: Parameters and directions.
            wanted: Parameters to differentiate by.
            parts: What to take of each gradient.
            difference: Moves a module instead.
            follows: Whether the update moves with what moves, see :data:`scalemlo.autodiff.evaluation.Form`.
        """
        if not moving and difference is None:
            return [self._first_order(wanted)]
        hooks = {key: GradientHooks.of(block) for key, block in wanted.items()}
        if not follows:
            moving = [(block, GradientHooks.of(block).transposed(direction)) for block, direction in moving]
        totals: list[dict[str, dict[str, Tensor]]] = [{key: {} for key in wanted} for _ in parts]
        seen: list[Tensor] = []
        form: Form = "along" if follows else "dual"
        with explained(self.suspects()), self.running(form):
            for batch in self.batches:
                with fwAD.dual_level():
                    weights = self.weights()
                    for block, direction in moving:
                        held = weights[block.engine]
                        for name in block.names:
                            held[name] = fwAD.make_dual(held[name], direction[name])
                    if difference is not None:
                        difference.start()
                    leaves = {key: {n: weights[b.engine][n] for n in b.names} for key, b in wanted.items()}
                    watched = evaluation(form)
                    loss = partial(
                        self._loss_of_leaves, batch, weights, moving, wanted, difference, watched, parts == [_tangent]
                    )
                    gradients, value = torch.func.grad_and_value(loss)(leaves)
                    watched.release()
                    for engine in self.engines:
                        engine.skeleton.carries |= watched.reads_carried & set(engine.skeleton.buffers().values())
                        engine.skeleton.has_gaps |= watched.changes_gradients
                    if self.seen is not None:
                        seen.append(_primal(value).detach())
                    for key, by_name in gradients.items():
                        for name in list(by_name):  # one after the other: each dual gradient is freed when it is added
                            gradient = by_name.pop(name)
                            for part, total in zip(parts, totals, strict=True):
                                accumulate(total[key], {name: part(gradient)}, len(self.batches) * self.scale)
        if self.seen is not None:
            self.seen.append(float(torch.stack(seen).double().mean()) / self.scale)
        found = [{key: _average(block, total[key]) for key, block in wanted.items()} for total in totals]
        moves = {(block.engine, n) for block, _ in moving for n in block.names}
        for part, by_key in zip(parts, found, strict=True):
            for key, block in wanted.items():
                if part is _primal or follows:
                    by_key[key] = hooks[key].applied(by_key[key])
                elif any((block.engine, n) in moves for n in block.names):  # what no step moves is no variable
                    by_key[key] = hooks[key].projected(by_key[key])
        return found

    def _first_order(self, wanted: Blocks, form: Form = "plain") -> dict[str, Shards]:
        """First derivatives by torch's autograd, through every parameter that is trained."""
        total: dict[str, dict[str, Tensor]] = {key: {} for key in wanted}
        with explained(self.suspects()), self.running("plain"), torch.enable_grad():
            for batch in self.batches:
                weights = self.weights()
                for engine, held in weights.items():
                    for name in engine.trained:
                        held[name] = held[name].detach().requires_grad_()
                watched = evaluation(form)
                loss = self.scale * self.local_loss(batch, weights, wanted.values(), watched=watched)
                leaves = [weights[block.engine][n] for block in wanted.values() for n in block.names]
                found = iter(
                    torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
                )
                for key, block in wanted.items():
                    accumulate(total[key], {n: next(found) for n in block.names}, len(self.batches) * self.scale)
        averages = {key: _average(block, total[key]) for key, block in wanted.items()}
        if form == "value":
            return averages
        return {key: GradientHooks.of(block).applied(averages[key]) for key, block in wanted.items()}

    def _loss_of_leaves(self, batch, weights, moving, wanted, difference, watched, tangents_only, leaves) -> Tensor:
        traced = {engine: dict(held) for engine, held in weights.items()}
        for key, block in wanted.items():
            traced[block.engine] |= leaves[key]
        blocks = [*(block for block, _ in moving), *wanted.values()]
        return self.scale * self.local_loss(
            batch, traced, blocks, difference, watched=watched, tangents_only=tangents_only
        )

    def suspects(self) -> list[str]:
        """What the modules use that may be behind an error, in words."""
        return [suspect for engine in self.engines for suspect in engine.skeleton.suspects]

    # ---- running the loss on skeletons -----------------------------------------------------------------------------
    @contextmanager
    def running(self, form: Form) -> Iterator[None]:
        """Random numbers, the state of Python and attention as a pass of this loss needs them.

        Args:
            form: Of the derivative.

        Yields:
            Nothing.
        """
        kernels = nullcontext() if form == "plain" else sdpa_kernel(SDPBackend.MATH)
        state = nullcontext() if self.entry is None else self.entry.replayed()
        with seeded(self.seed, self.device), state, kernels:
            for engine in self.engines:
                engine.skeleton.mirror()
            yield

    def weights(self) -> dict[Engine, dict[str, Tensor]]:
        """Local shards of all parameters, at this point."""
        weights = {engine: {n: engine.constant(n) for n in engine.parameters} for engine in self.engines}
        for block, shards in self.point:
            weights[block.engine] |= shards
        return weights

    def local_loss(
        self,
        batch: Any,
        weights: Mapping[Engine, Mapping[str, Tensor]],
        traced: Collection[ParameterBlock] = (),
        difference: CentralDifference | None = None,
        *,
        watched: Evaluation | None = None,
        tangents_only: bool = False,
    ) -> Tensor:
        """This rank's loss on one micro-batch with given shards; inside :meth:`running`.

        Args:
            batch: The micro-batch.
            weights: Local shards of every engine.
            traced: Blocks whose shards carry derivatives; the rest is gathered apart from them, at half the bytes.
            difference: Runs the module of its own engine, if given.
            watched: How operations run, by default as for first derivatives. In the form ``"graph"`` the graph of every
                unit is kept, in the others units run again.
            tangents_only: Whether of dual gradients only the tangents are wanted.

        Returns:
            The loss.

        Raises:
            DerivativeError: If the loss never calls the module of the engine that it must call.
        """
        watched = watched or evaluation("plain")
        called: set[Engine] = set()
        runs_again = bool(traced) and difference is None and watched.form != "graph"
        with ExitStack() as stack:
            for engine in self.engines:
                groups = [set(block.names) for block in traced if block.engine is engine]
                elsewhere = [*(block for block, _ in self.point), *([] if difference is None else [difference.lower])]
                moved = {name for block in elsewhere if block.engine is engine for name in block.names}
                lender = Lender(
                    weights[engine],
                    partial(_gather_apart, engine, groups, moved, tangents_only),
                    trained=engine.trained,
                    at_once=engine.group is None,
                    units=("checkpoint" if watched.form in ("plain", "value") else "remat") if runs_again else "not",
                    form=watched.form,
                )
                run = partial(_run, engine, lender)
                if difference is not None and engine is difference.lower.engine:
                    run = partial(difference.call, lender)
                stack.enter_context(engine.functional(partial(_noting, called, engine, run)))
                watched.buffers = {**watched.buffers, **engine.skeleton.buffers()}
            stack.enter_context(watched.active())
            loss = watched.resolve(self.evaluate(batch))
        if self.required is not None and self.required not in called:
            raise DerivativeError(
                f"the loss of level '{self.required.name}' never calls its module through `self.module`: derivatives "
                "by its weights would be zero. Do not keep the module under another name."
            )
        return loss


def _run(engine: Engine, lender: Lender, method: str, args: tuple, kwargs: dict) -> Any:
    with engine.skeleton.lent(lender):
        return engine.call_skeleton(method, args, kwargs)


def _noting(called: set[Engine], engine: Engine, run: Callable, method: str, args: tuple, kwargs: dict) -> Any:
    called.add(engine)
    return run(method, args, kwargs)


def _gather_apart(
    engine: Engine, groups: Sequence[set[str]], moved: set[str], tangents_only: bool, shards: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gather constants apart from each traced block: a constant needs no tangent and no adjoint.

    And where it has its live value, not ``moved`` to another point, it may be kept for the next pass.
    """
    full: dict[str, Tensor] = {}
    left = dict(shards)
    for group in groups:
        members = {n: left.pop(n) for n in list(left) if n in group}
        full |= engine.gather(members, tangents_only=tangents_only) if members else {}
    if engine.kept is not None and engine.kept.room_bytes > 0:
        live = {n: left.pop(n) for n in list(left) if n not in moved}
        full |= engine.kept.gather(engine, live) if live else {}
    return full | (engine.gather(left) if left else {})


def _primal(x: Tensor) -> Tensor:
    return fwAD.unpack_dual(x).primal if fwAD._current_level >= 0 else x


def _tangent(x: Tensor) -> Tensor | None:
    return fwAD.unpack_dual(x).tangent


def accumulate(total: dict[str, Tensor], found: Mapping[str, Tensor | None], count: float) -> None:
    """Add one of ``count`` micro-batches' part to a mean, in place.

    Args:
        total: The mean so far; names without a part are missing.
        found: This micro-batch's tensors.
        count: Number of micro-batches, times what the loss was multiplied with.
    """
    for name, t in found.items():
        if t is not None:
            part = t.detach() / count
            total[name] = total[name].add_(part) if name in total else part


def _average(block: ParameterBlock, total: Mapping[str, Tensor]) -> Shards:
    """The mean over ranks, zeros where nothing was found."""
    filled = {n: total[n] if n in total else torch.zeros_like(block.engine.local(n)) for n in block.names}
    return block.vector(block.engine.average_gradients(filled))
