"""Programs whose hypergradient once was silently wrong, class by class, against live differences."""

import pytest

from tests.wrong import losses, modules, passes  # noqa: F401  # their programs are listed
from tests.wrong.reference import CASES, ESTIMATORS, compare


@pytest.mark.parametrize("way", ESTIMATORS)
@pytest.mark.parametrize("name", CASES)
def test_against_live_differences(name, way):
    if way not in CASES[name].ways:
        return
    found, expected = compare(CASES[name], ESTIMATORS[way])
    assert abs(expected) > 1e-6, "a program that shows nothing"
    assert found == pytest.approx(expected, rel=2e-6)
