"""Does scalemlo learn as well as Betty on work that both can do, and what does each outer step cost?

    python benchmarks/beside_betty.py [--quick] [--json PATH] [--peers-python PATH]

Meta-Weight-Net by scalemlo and by Betty 0.2.1 on three data sets: the long tail of Fashion-MNIST, digits of which 40 %
have a wrong label, sentences of Rotten Tomatoes with weak labels; 100 clean examples above. Both start from the same
weights and see the same batches; one step below for each above; fp32, eager, one thread.

Accuracy: scalemlo's Identity and Betty's darts (its own example's choice), each with the upper learning rate, out of
three, that did best on the validation data with a seed of its own; then three other seeds, test accuracy at the end and
at the best moment on the validation data.

Cost: CPU-seconds per outer step and the growth of memory over a run, an estimator beside its equal, the packages in
processes of their own and in turn; beside them the two gradients and steps without a hypergradient in plain torch:
no method can do without. Growth is that of the second of two runs in one process, so that imports are no part of it.

The aims are 0.8 of Betty's CPU-seconds and 0.6 of its growth. `--quick` takes a few steps on digits alone,
and weighs the first estimator of each package only.
"""

import copy
import gc
import importlib
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import measure
from reweighting import ESTIMATORS, PACKAGES, accuracy, estimators, write_task

AIM_SECONDS, AIM_GROWTH = 0.8, 0.6
SEARCH_SEED, SEEDS = 100, (0, 1, 2)
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
STEPS = {"long tail": 150, "label noise": 200, "weak labels": 200}
QUICK_STEPS = dict.fromkeys(STEPS, 10)
NUM_LOOKS = 10  # evaluations of a run
TIMED_STEPS, WEIGHED_STEPS, WARM_UP = 30, 10, 5
PAGE_BYTES = 4096  # what memory is counted in


# ---- in a process of its own -----------------------------------------------------------------------------------------
def load(path: str) -> Any:
    """Read a task."""
    import torch

    torch.set_num_threads(1)
    return torch.load(path, weights_only=False)


def train(package: str, path: str, estimator: str, learning_rate: float) -> dict[str, float]:
    """Train; validation and test accuracy at the end and at the best moment."""
    task = load(path)
    advance = PACKAGES[package](task, estimator, learning_rate)
    best, kept = -1.0, {}
    for _ in range(NUM_LOOKS):
        advance(len(task.train_order) // NUM_LOOKS)
        validation = accuracy(task.classifier, task.validation)
        if validation > best:
            best, kept = validation, copy.deepcopy(task.classifier.state_dict())
    test = accuracy(task.classifier, task.test)
    task.classifier.load_state_dict(kept)
    best_test = accuracy(task.classifier, task.test)
    return {"validation": validation, "test": test, "best validation": best, "best test": best_test}


def seconds(package: str, path: str, estimator: str) -> float:
    """CPU-seconds per outer step."""
    advance = PACKAGES[package](load(path), estimator, LEARNING_RATES[0])
    advance(WARM_UP)
    return measure.cpu_seconds(partial(advance, TIMED_STEPS)) / TIMED_STEPS


def growth(package: str, path: str, estimator: str) -> int:
    """Peak of resident bytes over those before the run was set up."""

    def run(task: Any) -> None:
        PACKAGES[package](task, estimator, LEARNING_RATES[0])(WEIGHED_STEPS)

    run(load(path))
    task = load(path)
    gc.collect()
    return measure.peak_growth_bytes(partial(run, task))


WORK = {"train": train, "seconds": seconds, "growth": growth}


def worker(package: str, jobs: Sequence[Sequence[Any]]) -> list[Any]:
    """Some jobs, ``(key of WORK, arguments)`` each; growth in forks of this process. Or why there is nothing."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        return [{"unsupported": f"not installed ({error})"}]
    return [
        measure.on_ranks(1, growth, package, *job) if work == "growth" else WORK[work](package, *job)
        for work, *job in jobs
    ]


# ---- the comparison --------------------------------------------------------------------------------------------------
Choice = tuple[str, float]
"""Estimator and upper learning rate."""


@dataclass
class Package:
    """One package, and what was found of it."""

    name: str
    python: str
    chosen: dict[str, Choice] = field(default_factory=dict)  # by task
    scores: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))  # one for each seed
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))  # task, estimator
    growth: dict[tuple[str, str], int] = field(default_factory=dict)

    def run(self, environment: Mapping[str, str], jobs: Sequence[Sequence[Any]]) -> list[Any]:
        """What some jobs give, in one process."""
        return measure.in_fresh_process(__file__, environment, python=self.python, package=self.name, jobs=jobs)

    def missing(self) -> str | None:
        """Why it cannot run."""
        found = self.run({}, [])
        return found[0]["unsupported"] if found else None

    def search(self, files: Mapping[str, str]) -> None:
        """Choose the upper learning rate by the best validation accuracy, then by the last one."""
        tried = {name: [(ESTIMATORS[self.name][0], rate) for rate in LEARNING_RATES] for name in files}
        jobs = [("train", files[name], *options) for name in files for options in tried[name]]
        found = iter(self.run(measure.STEADY_TIME, jobs))
        for name, options in tried.items():
            scores = {option: next(found) for option in options}
            self.chosen[name] = max(scores, key=lambda o: (scores[o]["best validation"], scores[o]["validation"]))

    def train_and_time(self, files: Mapping[str, str], *, timed_only: bool = False) -> None:
        """Train on all tasks as chosen, and time all estimators."""
        pairs = [(name, estimator) for name in files for estimator in estimators(self.name, name)]
        trained = [] if timed_only else list(files)
        jobs = [("train", files[name], *self.chosen[name]) for name in trained]
        found = self.run(measure.STEADY_TIME, jobs + [("seconds", files[name], e) for name, e in pairs])
        for name, scores in zip(trained, found, strict=False):
            self.scores[name].append(scores)
        for pair, value in zip(pairs, found[len(trained) :], strict=True):
            self.seconds[pair].append(value)

    def weigh(self, files: Mapping[str, str], *, first_only: bool) -> None:
        """Measure the growth with all estimators, or with the first one."""
        end = 1 if first_only else None
        pairs = [(name, estimator) for name in files for estimator in estimators(self.name, name)[:end]]
        found = self.run(measure.EXACT_MEMORY, [("growth", files[name], e) for name, e in pairs])
        self.growth = dict(zip(pairs, found, strict=True))


def compare(packages: Sequence[Package], plain: Package, *, quick: bool) -> None:
    """Everything, packages in turn."""
    steps = QUICK_STEPS if quick else STEPS
    seeds = SEEDS[:1] if quick else SEEDS
    with tempfile.TemporaryDirectory() as folder:
        files: dict[int, dict[str, str]] = defaultdict(dict)
        for seed, name in product((*seeds, *([] if quick else [SEARCH_SEED])), steps):
            files[seed][name] = f"{folder}/{name.replace(' ', '_')}-{seed}.pt"
            write_task(name, seed, steps[name], Path(files[seed][name]), tiny=quick)
        for package in packages:
            package.chosen = {name: (ESTIMATORS[package.name][0], LEARNING_RATES[0]) for name in steps}
            if not quick:
                package.search(files[SEARCH_SEED])
        for seed in seeds:
            for package in packages:
                package.train_and_time(files[seed])
            plain.train_and_time(files[seed], timed_only=True)
        for package in packages:
            package.weigh(files[seeds[0]], first_only=quick)


# ---- the tables ------------------------------------------------------------------------------------------------------
def accuracy_rows(package: Package, figures: dict[str, float]) -> list[list[str]]:
    """Rows of the first table; adds figures."""
    rows = []
    for name, scores in package.scores.items():
        values = {label: [score[key] for score in scores] for label, key in (("end", "test"), ("best", "best test"))}
        for label, found in values.items():
            figures[f"accuracy_{label}_{package.name}_{name.replace(' ', '_')}"] = statistics.mean(found)
        estimator, rate = package.chosen[name]
        rows.append([name, package.name, estimator, f"{rate:.0e}", *map(spread, values.values())])
    return rows


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def cost_rows(own: Package, theirs: Package | None, plain: Package, figures: dict[str, float]) -> list[list[str]]:
    """Rows of the second table; adds figures."""
    rows = []
    equal = dict(zip(ESTIMATORS["scalemlo"], ESTIMATORS["betty"], strict=True))
    for (name, estimator), times in own.seconds.items():
        task = name.replace(" ", "_")
        least, growth = plain.seconds[name, "none"], own.growth.get((name, estimator))
        figures[f"milliseconds_{estimator}_{task}"] = 1e3 * statistics.median(times)
        figures[f"seconds_over_plain_{estimator}_{task}"] = ratio(times, least)
        row = [name, estimator, "", milliseconds(least), milliseconds(times), "", "", mebibytes(growth), "", ""]
        if theirs is not None:
            peer = name, equal[estimator]
            peer_times, peer_growth = theirs.seconds[peer], theirs.growth.get(peer)
            figures[f"plain_seconds_over_betty_{estimator}_{task}"] = ratio(least, peer_times)
            figures[f"seconds_over_betty_{estimator}_{task}"] = times_ratio = ratio(times, peer_times)
            row[2], row[5:7] = peer[1], [milliseconds(peer_times), f"{times_ratio:.2f}"]
            row[8] = mebibytes(peer_growth)
            if growth is not None and peer_growth is not None:
                figures[f"growth_over_betty_{estimator}_{task}"] = growth_ratio = growth / max(peer_growth, PAGE_BYTES)
                row[9] = f"{growth_ratio:.2f}"
        rows.append(row)
    return rows


def milliseconds(seconds: Sequence[float]) -> str:
    """The median."""
    return f"{1e3 * statistics.median(seconds):.1f}"


def mebibytes(num_bytes: int | None) -> str:
    """Or nothing where it was not measured."""
    return "" if num_bytes is None else f"{num_bytes / 2**20:.2f}"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median, round by round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def main() -> None:
    """Run, print the tables, write the figures."""
    options = measure.arguments(__doc__)
    if options.worker:
        print(json.dumps(worker(**json.loads(options.worker))))
        return
    from scalemlo.reporting.tables import markdown_table

    own, theirs = Package("scalemlo", sys.executable), Package("betty", options.peers_python)
    plain = Package("torch", sys.executable)
    missing = theirs.missing()
    packages = [own] if missing else [own, theirs]
    compare(packages, plain, quick=options.quick)
    figures: dict[str, float] = {}
    rows = [row for package in packages for row in accuracy_rows(package, figures)]
    steps = QUICK_STEPS if options.quick else STEPS
    print(f"{measure.machine()}; one thread; outer steps: {steps}; {len(next(iter(own.scores.values())))} seed(s)\n")
    if missing:
        print(f"Betty: {missing}\n")
    header = [
        "data",
        "package",
        "estimator",
        "upper learning rate",
        "test accuracy at the end, %",
        "at the best moment",
    ]
    print(markdown_table(header, sorted(rows, key=lambda row: list(steps).index(row[0]))))
    print(f"\nOne outer step; the aims are {AIM_SECONDS} of Betty's time and {AIM_GROWTH} of its growth of memory.\n")
    header = ["data", "scalemlo", "Betty", "CPU-ms without", "scalemlo's", "Betty's", "ratio"]
    header += ["growth MiB", "Betty's", "ratio"]
    print(markdown_table(header, cost_rows(own, None if missing else theirs, plain, figures)))
    measure.write_figures(options.json, {name: float(f"{value:.4g}") for name, value in figures.items()})


if __name__ == "__main__":
    main()
