"""A plan: what every phase of one outer iteration takes per rank, from running it without data."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..memory.budget import Memory
from ..memory.bytes_tracker import HOST, KINDS, PhaseUse
from ..memory.phases import StateName
from ..memory.sizes import format_bytes, parse_bytes
from .depth import at_depth
from .simulate import depth, run_iterations, simulation

if TYPE_CHECKING:
    from ..loop.program import Program

DEPTHS = (4, 6, 8)
"""Numbers of layers that are simulated where a deeper model's plan is extrapolated."""


@dataclass(frozen=True)
class Hardware:
    """What seconds are estimated from; the defaults are about those of an H100 in a node with NVLink.

    Args:
        tflops: Matrix products per second and rank that are reached, not the data sheet's peak, in 1e12 operations.
        link_gbps: What a rank sends per second in a collective, in 1e9 bits.
        host_gbps: What a rank moves per second between its device and where evicted states lie, in 1e9 bits.
    """

    tflops: float = 400.0
    link_gbps: float = 400.0
    host_gbps: float = 400.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"{field.name}={value!r} must be positive.")

    def seconds(self, phase: PhaseUse) -> float:
        """Moves, matrix products and collectives one after the other; elementwise operations are not counted."""
        moved = phase.moved_bytes * 8 / (self.host_gbps * 1e9)
        return moved + phase.flops / (self.tflops * 1e12) + phase.sent_bytes * 8 / (self.link_gbps * 1e9)


@dataclass(frozen=True)
class Plan:
    """What one rank takes.

    Attributes:
        world_size: Number of ranks.
        phases: Of all outer iterations but the first ones, in order.
        first: Of the first one, in which derivatives are checked once and optimizers allocate.
        hardware: What seconds are estimated from.
        device_memory: Bytes a rank's device has; None where nothing was said.
        depths: Numbers of layers that were simulated, if the plan was extrapolated from them.
        memory: The program's budget, if it has one.
        interleaving: What was changed about the order of levels to move less, one sentence each.
    """

    world_size: int
    phases: tuple[PhaseUse, ...]
    first: tuple[PhaseUse, ...]
    hardware: Hardware = Hardware()
    device_memory: int | None = None
    depths: tuple[int, ...] = ()
    memory: Memory | None = None
    interleaving: tuple[str, ...] = ()

    @property
    def peak_phase(self) -> PhaseUse:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    @property
    def first_peak_bytes(self) -> float:
        """Peak of the first outer iteration."""
        return max(phase.peak_bytes for phase in self.first)

    @property
    def start_bytes(self) -> float:
        """When the first outer iteration begins: weights and buffers."""
        return self.first[0].peaks["start"]["total"]

    @property
    def peak_by_phase(self) -> dict[str, float]:
        """Peak of all calls of each phase, those of the first outer iteration included, by its name."""
        found: dict[str, float] = {}
        for phase in (*self.first, *self.phases):
            found[phase.name] = max(found.get(phase.name, 0.0), phase.peak_bytes)
        return found

    @property
    def peak_bytes(self) -> float:
        """The most bytes at once, first iteration included."""
        return max(self.peak_phase.peak_bytes, self.first_peak_bytes)

    @property
    def persistent_bytes(self) -> float:
        """Weights, buffers, optimizer states, estimators' memories and gradient buckets."""
        return max(phase.persistent_bytes for phase in self.phases)

    @property
    def host_bytes(self) -> float:
        """What lies in the host's memory beside an accelerator, without evicted states."""
        return max(phase.peak.get(HOST, 0) for phase in self.phases)

    @property
    def away_bytes(self) -> float:
        """The most that a memory budget has off the device at once."""
        return max(sum(phase.away.values()) for phase in self.phases)

    @property
    def moved_bytes(self) -> float:
        """Onto the device and off it in one outer iteration."""
        return sum(phase.moved_bytes for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Estimate for one outer iteration."""
        return sum(self.hardware.seconds(phase) for phase in self.phases)

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within ``device_memory``; None where nothing was said."""
        return None if self.device_memory is None else self.peak_bytes <= self.device_memory

    @property
    def verdict(self) -> str:
        """One sentence."""
        where = "the first iteration" if self.first_peak_bytes > self.peak_phase.peak_bytes else self.peak_phase.name
        peak = f"peak {format_bytes(self.peak_bytes)} per rank in {where}"
        if self.device_memory is None:
            return f"{peak}."
        size = format_bytes(self.device_memory)
        if self.fits:
            return f"fits: {peak}, {format_bytes(self.device_memory - self.peak_bytes)} of {size} left."
        return f"does not fit: {peak}, {format_bytes(self.peak_bytes - self.device_memory)} more than {size}."

    @property
    def summary(self) -> list[str]:
        """Persistent bytes, peak, seconds, and whether it fits."""
        fits = {True: "yes", False: "no", None: ""}[self.fits]
        return [format_bytes(self.persistent_bytes), format_bytes(self.peak_bytes), f"{self.seconds:.3f}", fits]

    @property
    def rows(self) -> list[list[str]]:
        """One row per phase, see :data:`HEADER`."""
        rows = []
        for phase in self.phases:
            sizes = (phase.persistent_bytes, phase.transient_bytes, phase.gathered_bytes, phase.peak_bytes)
            collectives = ", ".join(f"{n:.0f} {kind}" for kind, n in phase.num_collectives.items())
            sent = [collectives, format_bytes(phase.sent_bytes), f"{phase.flops / 1e12:.2f}"]
            rows.append([phase.name, *map(format_bytes, sizes), *sent, f"{self.hardware.seconds(phase):.3f}"])
        return rows

    @property
    def move_rows(self) -> list[list[str]]:
        """One row per phase of a program with a memory budget, see :data:`MOVE_HEADER`."""
        rows = []
        for phase in self.phases:
            sizes = map(format_bytes, (phase.moved_bytes, sum(phase.away.values()), phase.peak_bytes))
            rows.append([phase.name, *sizes, _grouped(phase.away)])
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        phases = []
        for phase in self.phases:
            entry: dict[str, Any] = {"name": phase.name, "peak_bytes": phase.peak_bytes}
            entry |= {f"{kind}_bytes": phase.peak.get(kind, 0) for kind in (*KINDS, HOST)}
            entry |= {"num_collectives": dict(phase.num_collectives), "sent_bytes": phase.sent_bytes}
            away = {str(name): size for name, size in phase.away.items()}
            entry |= {"moved_bytes": phase.moved_bytes, "away_bytes": away}
            phases.append(entry | {"flops": phase.flops, "seconds": self.hardware.seconds(phase)})
        return {
            "world_size": self.world_size,
            "peak_bytes": self.peak_bytes,
            "first_peak_bytes": self.first_peak_bytes,
            "start_bytes": self.start_bytes,
            "peak_by_phase": self.peak_by_phase,
            "persistent_bytes": self.persistent_bytes,
            "host_bytes": self.host_bytes,
            "away_bytes": self.away_bytes,
            "moved_bytes": self.moved_bytes,
            "memory": None if self.memory is None else str(self.memory),
            "interleaving": list(self.interleaving),
            "seconds": self.seconds,
            "device_memory": self.device_memory,
            "fits": self.fits,
            "verdict": self.verdict,
            "depths": list(self.depths),
            "hardware": dataclasses.asdict(self.hardware),
            "phases": phases,
        }

    def to_json(self, path: str | Path) -> None:
        """Write :meth:`as_dict` to a file."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=2) + "\n")


HEADER = ["phase", "persistent", "transient", "gathered", "peak", "collectives", "sent", "TFLOP", "seconds"]
"""Of :attr:`Plan.rows`; gathered is the phase's most, not necessarily at its peak."""

MOVE_HEADER = ["phase", "moved", "off the device", "peak on it", "states that are off"]
"""Of :attr:`Plan.move_rows`; moved are both directions, for the phase and before it."""


def plan_build(
    build: "Callable[[], Program]",
    *,
    world_size: int,
    device_memory: int | str | None = None,
    hardware: Hardware = Hardware(),  # noqa: B008 (frozen)
    accelerator: bool = True,
    num_layers: int | None = None,
) -> Plan:
    """Run one outer iteration of a program as one rank of many, without data, weights, launcher or GPU.

    The program itself runs, on fake tensors; see :mod:`scalemlo.planning.simulate` for what differs from a run.

    Args:
        build: Makes the program. Runs under the simulation, so models it makes from a configuration have no weights;
            ``from_pretrained`` of transformers' ``AutoModel`` classes reads the configuration alone.
        world_size: Number of ranks.
        device_memory: What a rank's device has, ``"80GiB"`` say.
        hardware: What seconds are estimated from.
        accelerator: Whether ranks compute on accelerators; else on CPUs, where optimizers go parameter by parameter and
            recorded states lie beside everything else.
        num_layers: Layers of the model, to be extrapolated from smaller numbers (:data:`DEPTHS`): each phase's peak at
            each kind of operation, its collectives, bytes and FLOPs must be linear in them. What a memory budget evicts
            is not, so that with one all layers are simulated. ``build`` must make its model by ``from_pretrained``, or
            with as many layers as :func:`simulated_layers` says.

    Returns:
        The plan.

    Raises:
        ValueError: What the program itself raises on ``world_size`` ranks; an engine that cannot be simulated; a
            plan that is not linear in the number of layers.
    """
    if not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size={world_size!r} must be an integer of at least 1.")
    budget = None if device_memory is None else parse_bytes(device_memory, "device_memory")
    is_deep = num_layers is not None and num_layers > DEPTHS[-1]
    found = [_simulate(build, world_size, accelerator, DEPTHS[0] if is_deep else num_layers)]
    memory = found[0].memory
    depths: tuple[int, ...] = ()
    if is_deep and memory is not None:
        found = [_simulate(build, world_size, accelerator, num_layers)]
    elif is_deep:
        depths = DEPTHS
        found += [_simulate(build, world_size, accelerator, n) for n in depths[1:]]
    first, steady = found[0].first, found[0].steady
    if depths and num_layers is not None:
        first = at_depth(num_layers, depths, [x.first for x in found])
        steady = at_depth(num_layers, depths, [x.steady for x in found])
    return Plan(
        world_size, tuple(steady), tuple(first), hardware, budget, depths, memory, found[0].interleaving
    )  # fmt: skip


def simulated_layers(num_layers: int) -> int:
    """How many layers a model is to be made with: ``num_layers``, or fewer inside :func:`plan_build`."""
    return depth.get() or num_layers


class _Simulated(NamedTuple):
    first: Sequence[PhaseUse]
    steady: Sequence[PhaseUse]
    memory: Memory | None
    interleaving: tuple[str, ...]


def _simulate(build: "Callable[[], Program]", world_size: int, accelerator: bool, num_layers: int | None) -> _Simulated:
    token = depth.set(num_layers)
    try:
        with simulation(world_size, accelerator=accelerator) as tracker:
            program = build()
            within = program.iteration.scheduler.residency
            first, steady = run_iterations(program, tracker)
            return _Simulated(first, steady, None if within is None else within.memory, program.interleaving())
    finally:
        depth.reset(token)


def _grouped(away: Mapping[StateName, float]) -> str:
    """Names of states by kind: ``"weights of a, b; optimizer of a"``."""
    owners: dict[str, list[str]] = {}
    for name in away:
        owners.setdefault(name.kind, []).append(name.owner)
    return "; ".join(f"{kind} of {', '.join(names)}" for kind, names in owners.items())
