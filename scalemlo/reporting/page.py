"""The page around the sections: its styles, light and dark, and nothing that is fetched."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fbfbf9; --card: #ffffff; --ink: #1d2125; --soft: #5c646c; --rule: #e1e3e0;
  --c0: #1b7f5f; --c1: #c2512f; --c2: #3b6fb5; --c3: #8a5fb0; --c4: #a8791a; --c5: #4d8c99;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #15181b; --card: #1d2125; --ink: #e8eaec; --soft: #a2abb3; --rule: #343a40;
    --c0: #4fbf98; --c1: #ee8763; --c2: #7fb0f0; --c3: #c09ae6; --c4: #dcb04e; --c5: #84c4d1;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 48px 28px 80px; }
h1 { font-size: 34px; line-height: 1.2; letter-spacing: -0.015em; margin: 0; }
.subtitle { color: var(--soft); margin: 6px 0 0; overflow-wrap: anywhere; }
section { margin-top: 52px; }
h2 { font-size: 21px; margin: 0 0 14px; padding-bottom: 7px; border-bottom: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 24px 0 8px; color: var(--soft); font-weight: 600; }
p { margin: 10px 0; max-width: 76ch; }
.note { color: var(--soft); font-size: 14px; }
.grid {
  display: grid; gap: 18px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(460px, 100%), 1fr));
}
figure {
  margin: 0; padding: 14px 16px 8px; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
}
svg { display: block; width: 100%; height: auto; }
.legend {
  display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 8px; padding: 0; list-style: none; font-size: 14px;
}
.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 7px; vertical-align: -1px; }
text { font-size: 13px; fill: var(--soft); }
.tick { font-variant-numeric: tabular-nums; }
line.grid { stroke: var(--rule); } line.axis { stroke: var(--soft); }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.faint { opacity: 0.28; stroke-width: 1.2; }
.dot { fill: var(--c); } .bar { fill: var(--c); fill-opacity: 0.62; }
.c0, .k0 { --c: var(--c0); } .c1, .k1 { --c: var(--c1); } .c2, .k2 { --c: var(--c2); }
.c3, .k3 { --c: var(--c3); } .c4, .k4 { --c: var(--c4); } .c5, .k5 { --c: var(--c5); }
.key { background: var(--c); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 7px 14px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.number { width: 1%; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.label, th.label { width: 1%; white-space: nowrap; }
.grid th, .grid td { padding: 7px 9px; }
.grid td.text { white-space: nowrap; }
td.text { overflow-wrap: break-word; max-width: 640px; }
.headline table { font-size: 17px; } .headline td { padding: 11px 14px; }
details {
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 16px; margin-top: 18px;
}
summary { cursor: pointer; font-weight: 600; font-size: 14px; }
pre { margin: 10px 0 4px; overflow-x: auto; font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
@media print { details { display: block; } }
"""


class Section(NamedTuple):
    """A part of the report; ``body`` is HTML, ``key`` names it in links."""

    key: str
    title: str
    body: str


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole file.

    Args:
        title: Of the run.
        subtitle: Below it.
        sections: Those that have a body are shown.

    Returns:
        HTML.
    """
    shown = "\n".join(
        f'<section id="{s.key}" class="{s.key}"><h2>{escape(s.title)}</h2>\n{s.body}</section>'
        for s in sections
        if s.body
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n'
        f'<body>\n<main>\n<header><h1>{escape(title)}</h1><p class="subtitle">{escape(subtitle)}</p></header>\n'
        f"{shown}\n</main>\n</body>\n</html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, text: Sequence[int] = (0,)) -> str:
    """A table; cells are escaped.

    Args:
        header: Names of the columns; without names it is left out.
        rows: Cells.
        text: Columns that are aligned left, of which the last one takes what width there is; the others are numbers.

    Returns:
        HTML.
    """

    def line(cells: Sequence[object], tag: str) -> str:
        css = ("text" if i == max(text) else "label" if i in text else "number" for i in range(len(cells)))
        shown = [f'<{tag} class="{c}">{escape(str(cell))}</{tag}>' for c, cell in zip(css, cells, strict=True)]
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    head = f"<thead>{line(header, 'th')}</thead>" if any(header) else ""
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def grid(figures: Sequence[str]) -> str:
    """Figures beside each other where there is room; empty ones are left out."""
    shown = [figure for figure in figures if figure]
    return f'<div class="grid">{"".join(shown)}</div>' if shown else ""
