"""Line charts and histograms as inline SVG: no script, colours from the page, so that they follow light and dark."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 500, 280
LEFT, RIGHT, TOP, BOTTOM = 76, 14, 12, 46
NUM_COLORS = 6

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], *, x_label: str, y_label: str, smooth: bool = False) -> str:
    """Lines over a common x axis.

    Args:
        series: Points by name; those that are not finite are left out.
        x_label: Below the axis.
        y_label: Beside the axis.
        smooth: Whether to draw the running mean over a tenth of the points, and the points themselves faintly.

    Returns:
        A ``<figure>`` with legend and drawing; empty if there is nothing to draw.
    """
    finite = {n: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for n, points in series.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return ""
    xs, ys = ([point[i] for points in finite.values() for point in points] for i in (0, 1))
    frame = Frame(min(xs), max(xs), *_padded(min(ys), max(ys)))
    body = []
    for i, points in enumerate(finite.values()):
        color = f"c{i % NUM_COLORS}"
        averaged = smooth and len(points) >= 20
        body.append(_path(frame, points, f"line {color}{' faint' if averaged else ''}"))
        if averaged:
            body.append(_path(frame, list(zip([x for x, _ in points], _mean(points), strict=True)), f"line {color}"))
        if len(points) < 20:
            body += [
                f'<circle class="dot {color}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>' for x, y in points
            ]
    return _figure(frame, body, list(finite), x_label, y_label)


def histogram(groups: Mapping[str, np.ndarray], *, x_label: str, y_label: str, num_bins: int = 24) -> str:
    """Distributions of a few groups, drawn over each other.

    Args:
        groups: Values by name.
        x_label: Below the axis.
        y_label: Beside the axis.
        num_bins: Common to all groups.

    Returns:
        A ``<figure>`` with legend and drawing.
    """
    everything = np.concatenate(list(groups.values()))
    low, high = _padded(float(everything.min()), float(everything.max()), part=0.0)
    edges = np.linspace(low, high, num_bins + 1)
    counts = {name: np.histogram(values, edges)[0] for name, values in groups.items()}
    frame = Frame(low, high, 0.0, 1.08 * max(1, *(int(c.max()) for c in counts.values())))
    body = []
    for i, (name, heights) in enumerate(counts.items()):
        for count, start, end in zip(heights, edges, edges[1:], strict=False):
            if count:
                x, y, width = frame.x(start), frame.y(count), frame.x(end) - frame.x(start)
                label = f"{escape(name)}: {count} in {start:.3g} to {end:.3g}"
                body.append(
                    f'<rect class="bar c{i % NUM_COLORS}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{width - 1:.1f}" '
                    f'height="{frame.y(0) - y:.1f}"><title>{label}</title></rect>'
                )
    legend = [f"{name} ({len(values)})" for name, values in groups.items()]
    return _figure(frame, body, legend, x_label, y_label)


class Frame:
    """Maps values to the drawing's coordinates.

    Args:
        x_low: Left end.
        x_high: Right end.
        y_low: Lower end.
        y_high: Upper end.
    """

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float):
        if x_low == x_high:
            x_low, x_high = x_low - 0.5, x_high + 0.5
        self.x_range, self.y_range = (x_low, x_high), (y_low, y_high)

    def x(self, value: float) -> float:
        """From left to right."""
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """From top to bottom."""
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def ticks(low: float, high: float, most: int) -> Iterator[tuple[float, str]]:
    """Round values within a range and how they are written, at most so many."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        value = i * step
        is_extreme = digits > 4 or max(abs(low), abs(high)) >= 1e5
        yield value, f"{value:.3g}" if is_extreme else f"{value:.{digits}f}"


def _figure(frame: Frame, body: Sequence[str], names: Sequence[str], x_label: str, y_label: str) -> str:
    axes = []
    for value, text in ticks(*frame.y_range, most=5):
        y = frame.y(value)
        axes.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        axes.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in ticks(*frame.x_range, most=7):
        axes.append(
            f'<text class="tick" x="{frame.x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{text}</text>'
        )
    floor = HEIGHT - BOTTOM
    axes.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    axes.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    height = (TOP + floor) / 2
    turned = f'transform="translate(14 {height}) rotate(-90)"'
    axes.append(f'<text {turned} text-anchor="middle">{escape(y_label)}</text>')
    legend = "".join(f'<li><span class="key k{i % NUM_COLORS}"></span>{escape(n)}</li>' for i, n in enumerate(names))
    described = escape(f"{y_label} by {x_label}: {', '.join(names)}", quote=True)
    return (
        f'<figure><ul class="legend">{legend}</ul><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{described}">{"".join(axes)}{"".join(body)}</svg></figure>'
    )


def _path(frame: Frame, points: Points, css: str) -> str:
    return f'<polyline class="{css}" points="{" ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)}"/>'


def _mean(points: Points) -> np.ndarray:
    kernel = np.ones(max(1, len(points) // 10))
    values = np.array([y for _, y in points])
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _padded(low: float, high: float, part: float = 0.06) -> tuple[float, float]:
    if high - low < 1e-12 * max(1.0, abs(high)):
        return low - 0.5 * max(1e-3, abs(low)), high + 0.5 * max(1e-3, abs(high))
    return low - part * (high - low), high + part * (high - low)
