"""The sections of the report, each from the files it needs; empty where they are not there."""

from collections import defaultdict
from functools import partial
from html import escape

import pandas as pd
from omegaconf import OmegaConf

from .charts import Points, histogram, line_chart
from .page import Section, grid, table
from .run_folder import RunFolder
from .tables import MIB, planned_peaks

NUM_EXAMPLES = 8
"""Heaviest and lightest examples that are shown."""
MAX_CHARACTERS = 280
"""Of an example's text."""


def sections(run: RunFolder) -> list[Section]:
    """All of them, top to bottom."""
    return [
        Section("headline", "Headline", headline(run)),
        Section("weights", "Learned weights", weights(run)),
        Section("losses", "Losses", losses(run)),
        Section("norms", "Gradient norms", norms(run)),
        Section("phases", "Time and memory", phases(run)),
        Section("configuration", "Configuration and versions", configuration(run)),
    ]


def headline(run: RunFolder) -> str:
    """The recipe's table."""
    if not run.summary.get("rows"):
        return ""
    return table(run.summary["header"], run.summary["rows"]) + _note(run.summary.get("note", ""))


def weights(run: RunFolder) -> str:
    """Distribution by group, numbers by group, heaviest and lightest examples."""
    frame = run.weights
    if frame is None or frame.empty:
        return ""
    parts = []
    draw = partial(histogram, x_label="weight", y_label="examples")
    if not run.domain_columns:
        parts.append(draw({"all": frame["weight"].to_numpy()}))
    for column in run.domain_columns:
        groups = {_group(column, value): part["weight"] for value, part in frame.groupby(column)}
        parts.append(draw({name: values.to_numpy() for name, values in groups.items()}))
        rows = [[name, len(v), *(f"{x:.3f}" for x in (v.mean(), v.median(), v.min(), v.max()))]
                for name, v in groups.items()]  # fmt: skip
        parts.append(table(["group", "examples", "mean", "median", "min", "max"], rows))
    body = grid(parts)
    ordered = frame.sort_values("weight", kind="stable")
    most = min(NUM_EXAMPLES, len(ordered) // 2) or 1
    for title, part in (("Heaviest", ordered.iloc[::-1][:most]), ("Lightest", ordered[:most])):
        body += f"<h3>{title} examples</h3>" + _examples(part, run.domain_columns)
    return body


def losses(run: RunFolder) -> str:
    """Held-out losses, and each level's own."""
    heldout = {name: points for name, points in run.summary.get("heldout", {}).items() if len(points) > 1}
    figures = [line_chart(heldout, x_label="outer step", y_label="held-out loss")]
    for name, history in run.histories.items():
        series = {f"{name}: {level}": points for level, points in _columns(history, "loss").items()}
        figures.append(line_chart(series, x_label="step", y_label="training loss", smooth=True))
    return grid(figures)


def norms(run: RunFolder) -> str:
    """Norms of gradients by level; of the levels above they are the hypergradients."""
    figures = []
    for name, history in run.histories.items():
        for level, points in _columns(history, "gradient_norm").items():
            series = {f"{name}: {level}": points}
            figures.append(line_chart(series, x_label="step", y_label="norm", smooth=True))
    text = "Before clipping. For a level above others: the norm of the hypergradient, direct part included."
    return grid(figures) + _note(text) if any(figures) else ""


def phases(run: RunFolder) -> str:
    """Seconds and bytes by phase, measured beside planned."""
    seconds: dict[str, float] = defaultdict(float)
    for phase in (run.plan or {}).get("phases", []):
        seconds[phase["name"]] += phase["seconds"]
    header = ["program", "phase", "calls", "seconds", "s / call", "peak MiB", "moved MiB"]
    header += ["planned s / step", "planned peak MiB"] if seconds else []
    rows: list[list[object]] = []
    for name, statistics in run.phases.items():
        peaks, _ = planned_peaks(run.plan, name, run.resident_at_start.get(name))
        for phase, s in statistics.items():
            row: list[object] = [name, phase, f"{s['num_calls']:,}", f"{s['wall_seconds']:.1f}",
                                 f"{s['wall_seconds'] / max(1, s['num_calls']):.3f}", f"{s['peak_bytes'] / MIB:,.0f}",
                                 f"{s.get('moved_bytes', 0) / MIB:,.0f}"]  # fmt: skip
            if seconds:
                row += [f"{seconds[phase]:.3f}", f"{peaks[phase] / MIB:,.0f}"] if phase in peaks else ["", ""]
            rows.append(row)
    if not rows:
        return ""
    verdict = (run.plan or {}).get("verdict", "")
    text = "Peaks are those of the device; on a CPU, of the whole process."
    return table(header, rows, text=(0, 1)) + _note(f"{text} Plan: {verdict}" if verdict else text)


def configuration(run: RunFolder) -> str:
    """Where the run came from, and the whole configuration."""
    facts = {key: value for key, value in run.provenance.items() if key != "versions" and value is not None}
    rows = [[key.replace("_", " "), value] for key, value in facts.items()]
    rows += [["versions", ", ".join(f"{n} {v}" for n, v in run.provenance.get("versions", {}).items())]] if rows else []
    body = table(["", ""], rows, text=(0, 1)) if rows else ""
    if run.config:
        text = escape(OmegaConf.to_yaml(OmegaConf.create(run.config)))
        body += f"<details open><summary>Configuration</summary><pre>{text}</pre></details>"
    return body


def _columns(history: pd.DataFrame, what: str) -> dict[str, Points]:
    found = {}
    for column in history.columns:
        kind, _, level = str(column).partition("/")
        if kind == what and level:
            known = history[["step", column]].dropna()
            found[level] = list(zip(known["step"].tolist(), known[column].tolist(), strict=True))
    return found


def _group(column: str, value: object) -> str:
    """How a group is called: a flag's by its name."""
    if isinstance(value, bool) or str(value) in ("True", "False"):
        return column if str(value) == "True" else f"not {column}"
    return str(value)


def _examples(part: pd.DataFrame, groups: list[str]) -> str:
    has_text = "prompt" in part
    rows = []
    for _, row in part.iterrows():
        text = " ".join(str(row["prompt"]).split()) if has_text else None
        if text and len(text) > MAX_CHARACTERS:
            text = text[:MAX_CHARACTERS].rstrip() + " …"
        cells = [f"{row['weight']:.3f}", row.get("example_id", ""), *(_group(g, row[g]) for g in groups)]
        rows.append([*cells, text] if has_text else cells)
    header = ["weight", "example", *groups, *(["text"] if has_text else [])]
    return table(header, rows, text=range(2, len(header)))


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""
