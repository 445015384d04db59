"""What the kit has found so far, on disk at every moment.

Stages run in processes of their own and append lines of JSON to a file, which :class:`Results` reads as they come:

    {"figures": {"name": number}}    {"failed": ["what", "why"]}    {"skipped": ["what", "why"]}
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

LINES = "SCALEMLO_GPU_KIT_LINES"
"""Environment variable: the file that a stage appends to."""

SPEED_COLUMNS = {
    "batch": ("sequences", "{:.0f}"), "milliseconds": ("ms", "{:.1f}"), "tokens_per_second": ("tokens/s", "{:.0f}"),
    "mfu": ("MFU", "{:.1%}"), "over_plain": ("over plain", "{:.2f}"), "peak_gib": ("peak GiB", "{:.2f}"),
}  # fmt: skip


def say(**line: object) -> None:
    """From a stage: one line; without a kit around it, on the standard output."""
    text = json.dumps(line)
    path = os.environ.get(LINES)
    if path is None:
        print(text, flush=True)
        return
    with open(path, "a") as file:
        file.write(text + "\n")


class Results:
    """Figures by name, what failed, and what was skipped.

    Args:
        folder: Where ``gpu.json`` and ``gpu.md`` are kept up to date.
        header: First lines of ``gpu.md``.
    """

    def __init__(self, folder: Path, header: Sequence[str]):
        self.folder, self.header = folder, list(header)
        self.figures: dict[str, float] = {}
        self.failed: list[tuple[str, str]] = []
        self.skipped: list[tuple[str, str]] = []
        self.seconds: dict[str, float] = {}
        self._positions: dict[Path, int] = {}

    def read(self, path: Path) -> None:
        """Take what a stage has appended since the last call; half a line is left for later."""
        if not path.exists():
            return
        with open(path) as file:
            file.seek(self._positions.get(path, 0))
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._positions[path] = self._positions.get(path, 0) + len(whole.encode())
        for line in whole.splitlines():
            found = json.loads(line)
            self.figures |= {name: float(value) for name, value in found.get("figures", {}).items()}
            self.failed += [tuple(found["failed"])] if "failed" in found else []
            self.skipped += [tuple(found["skipped"])] if "skipped" in found else []
        if whole:
            self.write()

    def write(self) -> None:
        """Both files; each is complete or as it was."""
        finite = {name: float(f"{value:.6g}") for name, value in self.figures.items()}
        _replace(self.folder / "gpu.json", json.dumps(finite, indent=2) + "\n")
        _replace(self.folder / "gpu.md", self.markdown())

    def markdown(self) -> str:
        """Everything, as tables."""
        parts = ["\n".join(["# scalemlo on this machine", "", *(f"- {line}" for line in self.header)])]
        checks = {n.removeprefix("check/"): v for n, v in self.figures.items() if n.startswith("check/")}
        if checks:
            parts.append(f"## Checks\n\n{sum(v == 1.0 for v in checks.values())} of {len(checks)} passed.")
        parts += [_table("Relative errors against fp64 on the CPU", ["what", "error"], self._errors())]
        for size in dict.fromkeys(n.split("/")[1] for n in self.figures if n.startswith("speed/")):
            parts.append(
                _table(self._title(size), ["what", *(c for c, _ in SPEED_COLUMNS.values())], self._speed(size))
            )
        planned = ["size", "what", "planned GiB", "measured GiB", "error"]
        parts.append(_table("Planned and measured peaks", planned, self._plans()))
        rest = [[n, f"{v:.4g}"] for n, v in self.figures.items() if re.match(r"residency|demo", n)]
        parts.append(_table("Memory budget and demo", ["what", "value"], rest))
        parts.append(_table("Failed", ["what", "why"], [[w, _cell(y)] for w, y in self.failed]))
        parts.append(_table("Skipped", ["what", "why"], [[w, _cell(y)] for w, y in self.skipped]))
        parts.append(_table("Stages", ["stage", "seconds"], [[n, f"{s:.0f}"] for n, s in self.seconds.items()]))
        return "\n\n".join(part for part in parts if part) + "\n"

    def _errors(self) -> list[list[str]]:
        return [[n.removeprefix("error/"), f"{v:.1e}"] for n, v in self.figures.items() if n.startswith("error/")]

    def _title(self, size: str) -> str:
        number = self.figures.get(f"speed/{size}/parameters")
        layers, length = (self.figures.get(f"speed/{size}/{key}") for key in ("layers", "length"))
        about = "" if number is None else f": {number / 1e6:.1f}M parameters, {layers:.0f} layers, {length:.0f} tokens"
        return f"Llama {size}{about}"

    def _speed(self, size: str) -> list[list[str]]:
        rows = {}
        for name in self.figures:
            if name.startswith(f"speed/{size}/") and name.count("/") == 3:
                rows[name.split("/")[2]] = None
        found = []
        for variant in rows:
            values = [self.figures.get(f"speed/{size}/{variant}/{key}") for key in SPEED_COLUMNS]
            cells = zip(values, SPEED_COLUMNS.values(), strict=True)
            found.append([variant, *("" if v is None else form.format(v) for v, (_, form) in cells)])
        return found

    def _plans(self) -> list[list[str]]:
        found = []
        for name, planned in self.figures.items():
            match = re.fullmatch(r"plan/(.+)/(.+)/peak_gib", name)
            if match:
                size, variant = match.groups()
                same = self.figures.get(f"plan/{size}/{variant}/batch") == self.figures.get(
                    f"speed/{size}/{variant}/batch"
                )
                measured = self.figures.get(f"speed/{size}/{variant}/peak_gib") if same else None
                cells = ["", ""] if measured is None else [f"{measured:.3f}", f"{planned / measured - 1:+.1%}"]
                found.append([size, variant, f"{planned:.3f}", *cells])
        return found


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join([f"## {title}", "", *lines])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:400]


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    os.replace(part, path)
