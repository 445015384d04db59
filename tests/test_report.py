"""The report of a run: its sections, its figures, nothing that is fetched, and what a browser shows of it."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from scalemlo.reporting import write_report
from scalemlo.reporting.charts import Frame, histogram, line_chart, ticks

SECTIONS = ["headline", "weights", "losses", "norms", "phases", "configuration"]
NASTY = "<script>document.title='broken'</script> & \"quoted\" <b>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def run(tmp_path):
    """The folder of a run of 30 steps, as the recipe leaves it."""
    steps = np.arange(1, 31)
    history = {"step": steps, "loss/rater": 3 / steps, "loss/finetune": 2 + 1 / steps}
    history |= {"gradient_norm/rater": 0.02 / steps, "gradient_norm/finetune": 1 / steps, "lr/rater": 0.3}
    (tmp_path / "reweighted").mkdir()
    pd.DataFrame(history).to_csv(tmp_path / "reweighted/history.csv", index=False)
    phase = {"num_calls": 30, "wall_seconds": 4.5, "cpu_seconds": 4.0, "peak_bytes": 3 * 2**20, "moved_bytes": 2**21}
    phases = {"phases": {"finetune/direct gradient": phase}, "skipped": {}, "solves": {}}
    (tmp_path / "reweighted/phases.json").write_text(json.dumps(phases))
    frame = {"example_id": range(20), "weight": np.linspace(0.05, 0.95, 20), "corrupted": [True, False] * 10}
    pd.DataFrame(frame | {"prompt": [NASTY, *["what is a level?"] * 19]}).to_csv(tmp_path / "weights.csv", index=False)
    summary = {"header": ["model", "held-out loss"], "rows": [["reweighted", "1.2345"]], "note": "weights: mean 0.5"}
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"heldout": {"reweighted": [[0, 3.0], [30, 2.0]]}}))
    plan = {"verdict": "peak 5 MiB per rank.", "phases": []}
    plan["phases"] = [{"name": "finetune/direct gradient", "seconds": s, "peak_bytes": 5 * 2**20} for s in (0.25, 0.5)]
    plan["peak_by_phase"] = {"finetune/direct gradient": 5 * 2**20}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "run.yaml").write_text(
        "recipe: reweight_instructions\nseed: 3\nprovenance: {date: '2026-01-01', versions: {torch: 2.13.0}}\n"
    )
    return tmp_path


class Page(HTMLParser):
    """Checks that tags close in order; collects sections, text and whatever could be fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sections, self.fetched, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "section":
            self.sections.append(attributes["id"])
        self.fetched += [v for k, v in attributes.items() if k in ("src", "href") and not v.startswith("data:")]
        assert tag != "script"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_sections_numbers_and_escapes(run):
    text = write_report(run).read_text()
    page = Page(text)
    assert page.sections == SECTIONS
    assert page.fetched == [] and "url(" not in text and "@import" not in text
    assert NASTY in page.text and NASTY not in text  # as text, not as tags
    cells = page.text
    for shown in ("1.2345", "weights: mean 0.5", "corrupted", "not corrupted", "0.950", "0.050", "torch 2.13.0"):
        assert shown in cells, shown
    row = cells[cells.index("finetune/direct gradient") :][:8]
    assert row == ["finetune/direct gradient", "30", "4.5", "0.150", "3", "2", "0.750", "5"]  # planned: both ticks


def test_what_is_missing_is_left_out(run, tmp_path):
    for name in ("weights.csv", "summary.json", "plan.json", "run.yaml"):
        (run / name).unlink()
    assert Page(write_report(run).read_text()).sections == ["losses", "norms", "phases"]
    with pytest.raises(ValueError, match="no run in it"):
        write_report(tmp_path / "reweighted")


def test_charts():
    frame = Frame(0, 10, -1, 1)
    assert frame.x(0) < frame.x(10) and frame.y(-1) > frame.y(1)
    assert [text for _, text in ticks(0.0, 1.0, 5)] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [text for _, text in ticks(-30.0, 70.0, 5)] == ["-20", "0", "20", "40", "60"]
    assert line_chart({"a": [(0, float("nan"))]}, x_label="x", y_label="y") == ""
    constant = histogram({"all": np.full(4, 0.5)}, x_label="x", y_label="y")
    assert constant.count("<rect") == 1 and "all: 4 in" in constant
    assert "nan" not in line_chart({"flat": [(1, 2.0)]}, x_label="x", y_label="y")


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")
def test_a_browser_shows_every_section_and_fits_every_text(run):
    """The page measures itself: sections that have no height, texts in drawings that overlap or stick out."""
    path = write_report(run)
    script = """<script>
    addEventListener("load", () => {
      const boxes = (root, what) => [...root.querySelectorAll(what)].map(e => e.getBoundingClientRect());
      const found = {sections: {}, overlaps: 0, outside: 0, title: document.title};
      for (const s of document.querySelectorAll("section")) found.sections[s.id] = s.getBoundingClientRect().height;
      for (const svg of document.querySelectorAll("svg")) {
        const frame = svg.getBoundingClientRect(), texts = boxes(svg, "text");
        for (const [i, a] of texts.entries()) {
          if (a.left < frame.left || a.right > frame.right || a.bottom > frame.bottom + 1) found.outside++;
          for (const b of texts.slice(i + 1))
            if (a.left < b.right && b.left < a.right && a.top < b.bottom - 3 && b.top < a.bottom - 3) found.overlaps++;
        }
      }
      found.wide = document.documentElement.scrollWidth > innerWidth;
      const pre = document.createElement("pre"); pre.id = "found"; pre.textContent = JSON.stringify(found);
      document.body.replaceChildren(pre);
    });
    </script>"""
    path.write_text(path.read_text().replace("</head>", script + "</head>"))
    for width in (420, 1280):
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
        command += [f"--user-data-dir={run}/profile", "--dump-dom", "--enable-logging=stderr", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert "CONSOLE" not in done.stderr, done.stderr
        found = json.loads(done.stdout.partition('<pre id="found">')[2].partition("</pre>")[0])
        assert list(found["sections"]) == SECTIONS and min(found["sections"].values()) > 60
        assert found["overlaps"] == found["outside"] == 0 and not found["wide"], (width, found)
        assert found["title"] == run.name.replace("_", " ")
