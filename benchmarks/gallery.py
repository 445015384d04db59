"""Runs the recipes that compare a method with its baselines, three seeds each, and writes the gallery page.

    python benchmarks/gallery.py [--only NAME ...] [--page] [--quick] [--json PATH]

Each is `scalemlo train configs/NAME.yaml`, in a process of its own; some also run with other values of a key. Results
and pictures go to docs/gallery/, the page docs/gallery.md is made from them and from the first lines of the YAML files.
`--page` makes the page alone. `--quick` runs a few steps of two recipes, one seed, on the digits of scikit-learn, and
writes no page.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import measure

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, RESULTS, PAGE = ROOT / "configs", ROOT / "docs" / "gallery", ROOT / "docs" / "gallery.md"
QUICK = {
    "long_tail": ["data=digits", "num_largest=80", "steps=20"],
    "label_noise": ["data=digits", "steps=20"],
}
VARIANTS = {"long_tail": ["imbalance=50", "imbalance=200"]}
"""What else a recipe runs with."""
HEAD = """\
# Gallery

Recipes beside plain baselines with the same data and budget: mean and standard deviation over three seeds, whatever
came out. Made by `python benchmarks/gallery.py` from the runs' own files in `docs/gallery/`; all on two CPU cores.
`scalemlo cp NAME` copies a configuration, [the recipes](../scalemlo/recipes) are short.
"""


def comparisons() -> list[str]:
    """Names of the configurations whose recipes compare, in the order of the recipes."""
    from scalemlo.recipes import RECIPES
    from scalemlo.recipes.study.study import ComparisonConfig

    return [name for name, recipe in RECIPES.items() if issubclass(recipe.config, ComparisonConfig)]


def introduction(name: str) -> str:
    """What the first lines of a YAML file say, without the command and what editors read."""
    lines = []
    for line in (CONFIGS / f"{name}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        if not text.startswith(("scalemlo train", "yaml-language-server")):
            lines.append(text)
    return "\n".join(lines).strip()


def page() -> str:
    """The gallery as Markdown, of all recipes that have a result."""
    from scalemlo.recipes import RECIPES

    parts = [HEAD]
    for name in comparisons():
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text())
        recipe = RECIPES[name]
        parts.append(
            f"## {name}\n\n{recipe.description[0].upper()}{recipe.description[1:]}. {recipe.paper}.\n\n"
            f"```bash\nscalemlo train configs/{name}.yaml\n```\n\n{table(result)}\n\n![{name}](gallery/{name}.png)\n\n"
            f"{introduction(name)}\n"
        )
        for change in VARIANTS.get(name, []):
            other = variant_path(name, change)
            if other.is_file():
                parts.append(f"With `{change}`:\n\n{table(json.loads(other.read_text()))}\n")
        parts.append(
            f"{len(result['seeds'])} seeds; {result['device']}, torch "
            f"{result['versions']['torch'].partition('+')[0]}.\n"
        )
    return "\n".join(parts)


def variant_path(name: str, change: str) -> Path:
    """Where the result of a recipe with another value of a key lies."""
    return RESULTS / f"{name}-{change.replace('=', '-')}.json"


def table(result: dict) -> str:
    """Arms and scores as Markdown."""
    rows = [["arm", *result["header"][1:]], ["---"] * len(result["header"]), *result["rows"]]
    return "\n".join(markdown_row(row) for row in rows)


def markdown_row(cells: Iterable[object]) -> str:
    """Of a table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def train(name: str, overrides: list[str], folder: Path) -> dict:
    """Run a recipe; return its result."""
    command = [sys.executable, "-m", "scalemlo", "train", f"configs/{name}.yaml", f"output_dir={folder}", *overrides]
    print(f"== {name}", file=sys.stderr, flush=True)
    subprocess.run(command, cwd=ROOT, env={**os.environ, **measure.ONE_THREAD}, check=True, stdout=sys.stderr)
    return json.loads((folder / "result.json").read_text())


def write(path: Path, result: dict) -> None:
    """For the page to be made from."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def figures_of(name: str, result: dict) -> dict[tuple[str, str, str], float]:
    """Mean of every score of every arm, by recipe, arm and score."""
    found = {}
    for arm, scores in result["arms"].items():
        for score, values in scores.items():
            known = [v for v in values if v is not None]
            if known:
                found[name, arm, score] = sum(known) / len(known)
    return found


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=comparisons(), metavar="NAME", help="these recipes only")
    parser.add_argument("--page", action="store_true", help="make the page from what is there, run nothing")
    parser.add_argument("--quick", action="store_true", help="under 45 seconds on two cores; writes no page")
    parser.add_argument("--json", type=Path, help="write the figures to this file, one flat object")
    options = parser.parse_args()
    figures: dict[tuple[str, str, str], float] = {}
    if not options.page:
        print(measure.machine())
        names = options.only or (list(QUICK) if options.quick else comparisons())
        for name in names:
            with tempfile.TemporaryDirectory() as scratch:
                quick = [*QUICK.get(name, []), "num_seeds=1"] if options.quick else []
                result = train(name, quick, Path(scratch))
                figures |= figures_of(name, result)
                if options.quick:
                    continue
                RESULTS.mkdir(exist_ok=True)
                shutil.copy(Path(scratch) / "result.png", RESULTS / f"{name}.png")
                write(RESULTS / f"{name}.json", result)
            for change in VARIANTS.get(name, []):
                with tempfile.TemporaryDirectory() as scratch:
                    other = train(name, [change], Path(scratch))
                write(variant_path(name, change), other)
                figures |= figures_of(f"{name} {change}", other)
        print("\n| recipe | arm | score | mean |\n| --- | --- | --- | --- |")
        for key, value in figures.items():
            print(markdown_row([*key, f"{value:.4g}"]))
    if not options.quick:
        PAGE.write_text(page())
    measure.write_figures(options.json, {"/".join(key): value for key, value in figures.items()})


if __name__ == "__main__":
    main()
