"""The plan of a deep model from those of shallow ones, whose layers are alike.

What a phase sends and computes is linear in the number of layers. So are the bytes alive at any one moment; their
maximum over moments is not where another moment takes over. It is therefore extrapolated for each kind of allocation
apart, an operation and the size of its output (the all-gather of a block, the cross entropy, the optimizer's update of
one parameter), each of which has its own maximum, and the largest of them is the peak. At the kind that has it, three
depths must lie on one line.
"""

from collections.abc import Sequence

from ..memory.bytes_tracker import HOST, KINDS, PhaseUse

TOLERANCE = 1e-3
"""How far from a line the three depths may be, relative to the largest value: rounding of chunks and buckets."""


def at_depth(num_layers: int, depths: Sequence[int], found: Sequence[Sequence[PhaseUse]]) -> list[PhaseUse]:
    """Extrapolate the phases of one iteration.

    Args:
        num_layers: Of the model.
        depths: Three numbers of layers, equally spaced.
        found: The phases at each of them.

    Returns:
        The phases at ``num_layers``.

    Raises:
        ValueError: If the phases differ by depth, or a peak, bytes sent or FLOPs are not linear in it.
    """
    names = [[phase.name for phase in phases] for phases in found]
    if any(other != names[0] for other in names):
        raise ValueError(f"phases differ by number of layers, so that the plan cannot be extrapolated: {names}.")

    def line(values: Sequence[float], what: str) -> float:
        first, middle, last = values
        size = max(abs(v) for v in values)
        if abs(first - 2 * middle + last) > TOLERANCE * size:
            raise ValueError(
                f"{what} is {first:.6g}, {middle:.6g}, {last:.6g} at {depths} layers, which is no line; its plan at "
                f"{num_layers} layers cannot be extrapolated. Plan the whole depth (--exact)."
            )
        return last + (last - middle) / (depths[2] - depths[1]) * (num_layers - depths[2])

    result = []
    for three in zip(*found, strict=True):
        phase = PhaseUse(three[0].name)
        phase.flops = line([x.flops for x in three], f"FLOPs of {phase.name}")
        phase.sent_bytes = line([x.sent_bytes for x in three], f"bytes sent in {phase.name}")
        for kind in three[0].num_collectives:
            phase.num_collectives[kind] = line([x.num_collectives[kind] for x in three], f"{kind} of {phase.name}")
        operations = [op for op in three[2].peaks if all(op in x.peaks for x in three)]
        for operation in operations:
            three_peaks = [x.peaks[operation] for x in three]
            middle, last = three_peaks[1:]
            steps = (num_layers - depths[2]) / (depths[2] - depths[1])
            kinds = (*KINDS, HOST, "total")
            phase.peaks[operation] = {kind: last[kind] + (last[kind] - middle[kind]) * steps for kind in kinds}
        top = max(phase.peaks, key=lambda operation: phase.peaks[operation]["total"])
        line([x.peaks[top]["total"] for x in three], f"peak of {phase.name} at {top}")
        result.append(phase)
    return result
