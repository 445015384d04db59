"""A plugin of pytest: the kit hears of every test when it has run."""

import pytest
from results import say


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Figures of a test, whether it passed, and why not."""
    name = report.nodeid.split("tests/gpu/")[-1].replace("::", "/")
    if report.skipped:
        why = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        say(skipped=[name, why.removeprefix("Skipped: ")])
    elif report.failed:
        lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
        say(figures={f"check/{name}": 0.0}, failed=[name, " ".join(lines[-3:]) or report.longreprtext[-400:]])
    elif report.when == "call":
        say(figures={f"check/{name}": 1.0})
    if report.when == "call":
        for key, value in report.user_properties:
            say(figures={key: value})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported is a failed check."""
    if report.failed:
        say(figures={f"check/{report.nodeid}": 0.0}, failed=[report.nodeid, str(report.longrepr)[-400:]])
