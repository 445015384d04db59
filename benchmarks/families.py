"""Second-order products on every family of transformers that its configuration can make tiny, beside plain torch.

    python benchmarks/families.py [--only NAME ...] [--quick] [--json PATH] [--results PATH]

Random weights, two bilevel levels, one CPU thread; each family in a process of its own with a time limit. Results are
appended to a file of JSON lines as they come, what is in it is not run again, and docs/families.md is made from it.
`--quick` runs a few families and writes no page.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import measure  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
TIMEOUT_SECONDS = 120
QUICK = ("llama", "bert", "t5", "vit", "wav2vec2", "llava")


def _child(sender: Any, row: dict[str, Any]) -> None:
    import torch
    import transformers

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    from tests.families.differences import measure as measured

    sender.send(measured(row["kind"], row["family"], row["architecture"]))


def commit() -> str:
    """Of the working tree, with `-dirty` where something is not committed."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "?"


def in_time(row: dict[str, Any]) -> dict[str, Any]:
    """One family in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, row))
    process.start()
    sender.close()
    start = time.monotonic()
    try:
        found = receiver.recv() if receiver.poll(TIMEOUT_SECONDS) else None
        reason = f"more than {TIMEOUT_SECONDS} s"
    except EOFError:
        found, reason = None, "the process ended"
    process.kill()
    process.join()
    if found is None:
        found = row | {"status": "not run", "reason": reason}
    return found | {"commit": commit(), "wall_seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    """Run, print, write."""
    from tests.families.differences import PRODUCTS
    from tests.families.table import all_families, judged_errors, page, status_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these families only")
    parser.add_argument("--quick", action="store_true", help="a few families; writes no page")
    parser.add_argument("--json", type=Path, help="write the figures to this file, one flat object")
    parser.add_argument("--results", type=Path, help="JSON lines to go on from and to append to")
    options = parser.parse_args()
    chosen = options.only or (QUICK if options.quick else None)
    rows: dict[str, dict[str, Any]] = {}
    if options.results and options.results.is_file():
        rows = {r["family"]: r for r in map(json.loads, options.results.read_text().splitlines())}
    for row in all_families():
        if (chosen and row["family"] not in chosen) or (row["family"] in rows and not options.only):
            continue
        found = rows[row["family"]] = in_time(row)
        print(f"{found['family']}: {status_of(found)} ({found['wall_seconds']} s)", file=sys.stderr, flush=True)
        if options.results:
            with options.results.open("a") as file:
                file.write(json.dumps(found) + "\n")
    text = page(list(rows.values()))
    print(text)
    if not options.quick and not options.only:
        PAGE.write_text(text)
    figures = {f"num_{status}": float(n) for status, n in Counter(map(status_of, rows.values())).items()}
    for product in PRODUCTS:
        errors = [found[product] for r in rows.values() if product in (found := judged_errors(r))]
        figures[f"worst_{product}"] = max(errors, default=0.0)
    measure.write_figures(options.json, figures)


if __name__ == "__main__":
    main()
