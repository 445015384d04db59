"""The state of a program between two outer iterations: what a checkpoint holds, and how it is put back.

Three parts, by who has them: *vectors* are laid out like parameters (weights, moments, an estimator's directions), and
sharded where those are; *shared* values are the same on every rank; a rank's *own* ones are not.
"""

import json
import random
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..autodiff.rng import RNGState
from ..distributed.group import is_main_process, rank
from ..distributed.shards import Shards
from ..engines import Engine
from ..history import History, PhaseStats
from .saved import Saved, SavedLevel


# ---- vectors -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Piece:
    """What a rank holds of a tensor that has a parameter's shape: consecutive entries of the flattened tensor.

    Args:
        local: The rank's part as the engine lays it out; aliases the live one. It may go on with padding where the
            flattened tensor ends.
        start: Its first entry, counted in the flattened tensor.
        numel: Entries of the whole tensor.
    """

    local: Tensor
    start: int
    numel: int

    @property
    def flat(self) -> Tensor:
        """The entries ``[n]``, without padding; an alias unless ``local`` is not contiguous."""
        return self.local.detach().reshape(-1)[: max(0, self.numel - self.start)]

    def put(self, flat: Tensor) -> None:
        """Write entries back where :attr:`flat`, which they were read into, is no alias."""
        if not self.local.is_contiguous():
            self.local.detach().copy_(flat.view(self.local.shape))

    def copied(self) -> "Piece":
        """A copy in host memory."""
        return replace(self, local=self.flat.to("cpu", copy=True))


def vectors(program: Saved) -> dict[str, Piece]:
    """This rank's pieces of all tensors that are laid out like a parameter; they alias the live ones.

    Args:
        program: The program.

    Returns:
        Pieces by ``"<level>/weights/<parameter>"``, ``"<level>/optimizer/<key>/<parameter>"`` and
        ``"<level>/memory/<level that asks>/<key>/<parameter>"``.
    """
    found: dict[str, Piece] = {}
    for level, trainer in program.trainers.items():
        engine = trainer.engine
        for name in trainer.block.names:
            parameter = engine.parameters[name]
            found[f"{level}/weights/{name}"] = _piece(engine, name, engine.local(name))
            for key, value in trainer.optimizer.state.get(parameter, {}).items():
                if _is_like(value, parameter):
                    found[f"{level}/optimizer/{key}/{name}"] = _piece(engine, name, engine.to_local(value))
        for asking, memory in trainer.memory.items():
            for key, value in memory.items():
                for name, t in value.items() if isinstance(value, Shards) else ():
                    found[f"{level}/memory/{asking}/{key}/{name}"] = _piece(engine, name, t)
    return found


def _piece(engine: Engine, name: str, local: Tensor) -> Piece:
    return Piece(local, engine.start(name), engine.shape(name).numel())


def _is_like(value: Any, parameter: Tensor) -> bool:
    """Whether a value of an optimizer's state has the layout of its parameter; single numbers are left to `shared`."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def _zeros_like(engine: Engine, name: str, dtype: torch.dtype) -> Tensor:
    """To be filled; zeros, since no content is read for padding."""
    return torch.zeros_like(engine.local(name), dtype=dtype)


# ---- shared --------------------------------------------------------------------------------------------------------
def shared(program: Saved) -> dict[str, Any]:
    """What every rank has in common besides vectors, in plain containers.

    Args:
        program: The program.

    Returns:
        Steps, generator, trackers, and per level: optimizer options, scheduler, scaler, estimator's memory, and the
        dtypes of its vectors.
    """
    return {
        "num_steps": program.num_steps,
        "generator": program.generator.get_state(),
        "trackers": program.gradients.state_dict(),
        "levels": {name: _shared_by_level(trainer) for name, trainer in program.trainers.items()},
    }


def _shared_by_level(trainer: SavedLevel) -> dict[str, Any]:
    names = {id(trainer.engine.parameters[name]): name for name in trainer.block.names}
    optimizer, memory = {}, {}
    for name in trainer.block.names:
        parameter = trainer.engine.parameters[name]
        state = trainer.optimizer.state.get(parameter, {})
        like = {key: value.dtype for key, value in state.items() if _is_like(value, parameter)}
        values = {key: _plain(value, trainer, name, key) for key, value in state.items() if key not in like}
        optimizer[name] = {"vectors": like, "values": values}
    for asking, kept in trainer.memory.items():
        like = {key: {n: t.dtype for n, t in v.items()} for key, v in kept.items() if isinstance(v, Shards)}
        memory[asking] = {"vectors": like, "values": {key: v for key, v in kept.items() if key not in like}}
    groups = [
        {
            "parameters": [names[id(p)] for p in group["params"]],
            "options": {key: value for key, value in group.items() if key != "params"},
        }
        for group in trainer.optimizer.param_groups
    ]
    return {
        "num_steps": trainer.num_steps,
        "groups": groups,
        "optimizer": optimizer,
        "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
        "scaler": asdict(trainer.scaler),
        "memory": memory,
    }


def _plain(value: Any, trainer: SavedLevel, name: str, key: str) -> Any:
    if isinstance(value, DTensor):
        raise ValueError(
            f"level {trainer.name!r}: {type(trainer.optimizer).__name__} keeps {key!r} of shape {list(value.shape)} "
            f"for parameter {name!r} of shape {list(trainer.engine.parameters[name].shape)}, sharded in a way of its "
            "own, which a checkpoint cannot hold. Use an optimizer whose state has the shape of its parameters, or "
            "engine=DDP() for this level."
        )
    return value


def restore_shared(program: Saved, state: Mapping[str, Any], keeps_memory: Mapping[str, bool]) -> None:
    """Put the shared values back, and zeros in the place of those vectors that :func:`vectors` will name.

    Args:
        program: Changed in place.
        state: From :func:`shared`.
        keeps_memory: By level: whether the memory is that of the level's estimator.
    """
    program.num_steps = state["num_steps"]
    program.generator.set_state(state["generator"])
    program.gradients.load_state_dict(state["trackers"])
    for name, trainer in program.trainers.items():
        _restore_level(trainer, state["levels"][name], keeps_memory[name])


def _restore_level(trainer: SavedLevel, state: Mapping[str, Any], keeps_memory: bool) -> None:
    engine = trainer.engine
    trainer.num_steps, trainer.trajectory = state["num_steps"], None
    for group, kept in zip(trainer.optimizer.param_groups, state["groups"], strict=True):
        group.update(kept["options"])
    trainer.optimizer.state.clear()
    for name, kept in state["optimizer"].items():
        like = {key: engine.from_local(name, _zeros_like(engine, name, d)) for key, d in kept["vectors"].items()}
        if like or kept["values"]:
            trainer.optimizer.state[engine.parameters[name]] = kept["values"] | like
    if trainer.scheduler is not None:
        trainer.scheduler.load_state_dict(state["scheduler"])
    if trainer.scaler.enabled and state["scaler"]["enabled"]:
        for key in ("scale", "num_good", "num_overflows"):  # checkpoints of format 1 lack the last
            setattr(trainer.scaler, key, state["scaler"].get(key, getattr(trainer.scaler, key)))
    trainer.memory.clear()
    for asking, kept in state["memory"].items() if keeps_memory else ():
        directions = {
            key: Shards({n: _zeros_like(engine, n, dtype) for n, dtype in dtypes.items()}, engine.group)
            for key, dtypes in kept["vectors"].items()
        }
        trainer.memory[asking] = kept["values"] | directions


# ---- a rank's own --------------------------------------------------------------------------------------------------
def own(program: Saved) -> dict[str, Any]:
    """What differs between ranks: random states, positions in the data, persistent buffers of modules.

    Args:
        program: The program.

    Returns:
        Plain containers and tensors.
    """
    on_torch = RNGState.capture(program.device)
    on_numpy: Any = np.random.get_state()
    kind, keys, *rest = on_numpy
    return {
        "random": {
            "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
            "cpu": on_torch.cpu,
            "device": on_torch.device,
        },
        "data": {n: t.stream.state_dict() for n, t in program.trainers.items() if t.stream is not None},
        "buffers": {n: t.engine.persistent_buffers() for n, t in program.trainers.items()},
    }


def restore_own(program: Saved, state: Mapping[str, Any], *, random_states: bool) -> None:
    """Put a rank's own values back.

    Args:
        program: Changed in place.
        state: From :func:`own` of this rank, or of rank 0 where there were fewer.
        random_states: Whether to set the random states too.
    """
    for name, trainer in program.trainers.items():
        for buffer, live in trainer.engine.persistent_buffers().items():
            live.copy_(state["buffers"][name][buffer])
        if trainer.stream is not None:
            trainer.stream.load_state_dict(state["data"][name])
    if random_states:  # last: coming to a position in the data may draw
        kept = state["random"]
        kind, keys, *rest = kept["numpy"]
        random.setstate(kept["python"])
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        same_device = kept["device"] is not None and program.device.type != "cpu"
        RNGState(kept["cpu"], kept["device"] if same_device else None, program.device).restore()


# ---- history -------------------------------------------------------------------------------------------------------
def history_to_json(history: History) -> dict[str, Any]:
    """All fields, as JSON takes them."""
    return asdict(history)


def restore_history(history: History, state: Mapping[str, Any]) -> None:
    """Put a record back in place of the current one."""
    history.steps[:] = state["steps"]
    history.interrupted = False
    for live, kept in ((history.skipped, state["skipped"]), (history.solves, state["solves"])):
        live.clear()
        live.update(kept)
    history.phases.clear()
    history.phases.update({name: PhaseStats(**row) for name, row in state["phases"].items()})


# ---- whose state it is ---------------------------------------------------------------------------------------------
def describe_program(program: Saved, *, as_held: bool = False) -> dict[str, Any]:
    """Names, shapes and kinds, as JSON takes them: what a checkpoint must have in common with a program.

    Args:
        program: The program.
        as_held: Whether to give shapes and dtypes as the engine lays parameters out, as checkpoints of format version
            1 do, and not those of the module that it was given.

    Returns:
        One dict per level.
    """
    owned: dict[int, set[str]] = {}
    for trainer in program.trainers.values():
        owned.setdefault(id(trainer.engine), set()).update(trainer.block.names)
    levels = {}
    for name, trainer in program.trainers.items():
        engine = trainer.engine
        facts = {
            n: _fact(p.shape, p.dtype) if as_held else _fact(engine.shape(n), engine.dtypes[n])
            for n, p in engine.parameters.items()
        }
        levels[name] = {
            "parameters": {n: facts[n] for n in trainer.block.names},
            "frozen parameters": {n: fact for n, fact in facts.items() if n not in owned[id(trainer.engine)]},
            "buffers": {n: str(list(b.shape)) for n, b in trainer.engine.persistent_buffers().items()},
            "optimizer": type(trainer.optimizer).__name__,
            "scheduler": None if trainer.scheduler is None else type(trainer.scheduler).__name__,
            "reads a batch": trainer.stream is not None,
            "engine": repr(trainer.engine.spec),
            "hypergradient": repr(trainer.estimator),
            "adapters": _adapters(engine.module),
        }
    return levels


def _adapters(module: torch.nn.Module) -> dict[str, Any]:
    """Configurations of a PEFT model's adapters by name: without them an adapter's weights mean nothing."""
    adapters = getattr(module, "peft_config", None) or {}
    as_json = {name: json.dumps(config.to_dict(), default=_listed) for name, config in adapters.items()}
    return {name: json.loads(config) for name, config in as_json.items()}


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _fact(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def check_same_program(there: Mapping[str, Any], here: Mapping[str, Any], where: str) -> dict[str, bool]:
    """Compare what a checkpoint was made by with the program at hand.

    Engines and world sizes may differ. So may estimators: one of another class starts without a memory.

    Args:
        there: From :func:`describe_program`, of the checkpoint.
        here: Of the program at hand.
        where: The checkpoint, for messages.

    Returns:
        By level: whether the estimator can go on with its memory.

    Raises:
        ValueError: Naming the first level, parameter or kind that differs.
    """
    other = f"{where} is a checkpoint of another program"
    if list(there) != list(here):
        raise ValueError(f"{other}: its levels are {list(there)}, this program's are {list(here)}.")
    keeps_memory = {}
    for level in here:
        old, new = there[level], here[level]
        for kind in ("parameters", "frozen parameters", "buffers"):
            for name in (*old[kind], *(n for n in new[kind] if n not in old[kind])):
                a, b = (facts[kind].get(name, "absent") for facts in (old, new))
                if a != b:
                    raise ValueError(
                        f"{other}: level {level!r}, {kind}: {name!r} is {a} there and {b} here. Build the program as "
                        "it was when the checkpoint was written."
                    )
        for kind in ("optimizer", "scheduler", "reads a batch"):
            if old[kind] != new[kind]:
                raise ValueError(f"{other}: level {level!r}, {kind}: {old[kind]} there and {new[kind]} here.")
        classes = [facts["hypergradient"].partition("(")[0] for facts in (old, new)]
        keeps_memory[level] = classes[0] == classes[1]
        if old["hypergradient"] != new["hypergradient"] and is_main_process():
            rest = "" if keeps_memory[level] else "; it starts anew"
            warnings.warn(
                f"level {level!r}: the checkpoint was written with hypergradient={old['hypergradient']}, this program "
                f"has {new['hypergradient']}{rest}.",
                stacklevel=2,
            )
    return keeps_memory


def check_same_groups(program: Saved, state: Mapping[str, Any], where: str) -> None:
    """Compare the parameter groups of the optimizers.

    Args:
        program: The program at hand.
        state: From :func:`shared`.
        where: The checkpoint, for messages.

    Raises:
        ValueError: If a level's optimizer groups its parameters in another way.
    """
    for level, trainer in program.trainers.items():
        names = {id(trainer.engine.parameters[name]): name for name in trainer.block.names}
        here = [[names[id(p)] for p in group["params"]] for group in trainer.optimizer.param_groups]
        there = [group["parameters"] for group in state["levels"][level]["groups"]]
        if [set(group) for group in here] != [set(group) for group in there]:
            raise ValueError(
                f"{where} is a checkpoint of another program: level {level!r}: its optimizer has parameter groups of "
                f"{[len(g) for g in there]} parameters there and of {[len(g) for g in here]} here, or other ones in "
                "them."
            )


def rank_file(of_rank: int | None = None) -> str:
    """Name of the file that holds a rank's own values."""
    return f"rank-{rank() if of_rank is None else of_rank:05d}.pt"
