"""A plan: what every phase of one outer iteration takes per rank, from running it without data."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .depth import at_depth
from .simulate import depth, run_iterations, simulation
from .sizes import format_bytes, parse_bytes
from .tracker import HOST, KINDS, PhaseUse

if TYPE_CHECKING:
    from ..program import Program

DEPTHS = (4, 6, 8)
"""Numbers of layers that are simulated where a deeper model's plan is extrapolated."""


@dataclass(frozen=True)
class Hardware:
    """What seconds are estimated from; the defaults are about those of an H100 in a node with NVLink.

    Args:
        tflops: Matrix products per second and rank that are reached, not the data sheet's peak, in 1e12 operations.
        link_gbps: What a rank sends per second in a collective, in 1e9 bits.
    """

    tflops: float = 400.0
    link_gbps: float = 400.0

    def __post_init__(self) -> None:
        for field in ("tflops", "link_gbps"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)!r} must be positive.")

    def seconds(self, phase: PhaseUse) -> float:
        """Matrix products, then collectives, nothing overlapped; elementwise operations are not counted."""
        return phase.flops / (self.tflops * 1e12) + phase.sent_bytes * 8 / (self.link_gbps * 1e9)


@dataclass(frozen=True)
class Plan:
    """What one rank takes.

    Attributes:
        world_size: Number of ranks.
        phases: Of the second outer iteration and all others, in order.
        first_peak_bytes: Peak of the first one, in which derivatives are checked once and optimizers allocate.
        hardware: What seconds are estimated from.
        device_memory: Bytes a rank's device has; None where nothing was said.
        depths: Numbers of layers that were simulated, if the plan was extrapolated from them.
    """

    world_size: int
    phases: tuple[PhaseUse, ...]
    first_peak_bytes: float
    hardware: Hardware = Hardware()
    device_memory: int | None = None
    depths: tuple[int, ...] = ()

    @property
    def peak_phase(self) -> PhaseUse:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)

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
        """What lies in the host's memory beside an accelerator."""
        return max(phase.peak.get(HOST, 0) for phase in self.phases)

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

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        phases = []
        for phase in self.phases:
            entry: dict[str, Any] = {"name": phase.name, "peak_bytes": phase.peak_bytes}
            entry |= {f"{kind}_bytes": phase.peak.get(kind, 0) for kind in (*KINDS, HOST)}
            entry |= {"num_collectives": dict(phase.num_collectives), "sent_bytes": phase.sent_bytes}
            phases.append(entry | {"flops": phase.flops, "seconds": self.hardware.seconds(phase)})
        return {
            "world_size": self.world_size,
            "peak_bytes": self.peak_bytes,
            "first_peak_bytes": self.first_peak_bytes,
            "persistent_bytes": self.persistent_bytes,
            "host_bytes": self.host_bytes,
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


def plan(
    build: "Callable[[], Program]",
    *,
    world_size: int,
    device_memory: int | str | None = None,
    hardware: Hardware = Hardware(),  # noqa: B008 (frozen)
    accelerator: bool = True,
    num_layers: int | None = None,
) -> Plan:
    """Run one outer iteration of a program as one rank of many, without data, weights, launcher or GPU.

    The program itself runs, on fake tensors; see :mod:`scalemlo.scheduler.simulate` for what differs from a run.

    Args:
        build: Makes the program. Runs under the simulation, so models it makes from a configuration have no weights;
            ``from_pretrained`` of transformers' ``AutoModel`` classes reads the configuration alone.
        world_size: Number of ranks.
        device_memory: What a rank's device has, ``"80GiB"`` say.
        hardware: What seconds are estimated from.
        accelerator: Whether ranks compute on accelerators; else on CPUs, where optimizers go parameter by parameter and
            recorded states lie beside everything else.
        num_layers: Layers of the model, to be extrapolated from smaller numbers (:data:`DEPTHS`): each phase's peak at
            each kind of operation, its collectives, bytes and FLOPs must be linear in them. ``build`` must make its
            model by ``from_pretrained``, or with as many layers as :func:`simulated_layers` says.

    Returns:
        The plan.

    Raises:
        ValueError: What the program itself raises on ``world_size`` ranks; an engine that cannot be simulated; a
            plan that is not linear in the number of layers.
    """
    if not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size={world_size!r} must be an integer of at least 1.")
    budget = None if device_memory is None else parse_bytes(device_memory, "device_memory")
    if num_layers is None or num_layers <= DEPTHS[-1]:
        first, phases = _simulate(build, world_size, accelerator, num_layers)
        depths: tuple[int, ...] = ()
    else:
        found = [_simulate(build, world_size, accelerator, n) for n in DEPTHS]
        first, phases = (at_depth(num_layers, DEPTHS, [pair[i] for pair in found]) for i in (0, 1))
        depths = DEPTHS
    peak = max(phase.peak_bytes for phase in first)
    return Plan(world_size, tuple(phases), peak, hardware, budget, depths)


def simulated_layers(num_layers: int) -> int:
    """How many layers a model is to be made with: ``num_layers``, or fewer inside :func:`plan`."""
    return depth.get() or num_layers


def _simulate(
    build: "Callable[[], Program]", world_size: int, accelerator: bool, num_layers: int | None
) -> tuple[Sequence[PhaseUse], Sequence[PhaseUse]]:
    token = depth.set(num_layers)
    try:
        with simulation(world_size, accelerator=accelerator) as tracker:
            return run_iterations(build(), tracker)
    finally:
        depth.reset(token)
