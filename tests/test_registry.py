"""An estimator in a file of its own is found by name everywhere: configurations, schema, trainers and model cards."""

import subprocess
import sys

import pytest

import scalemlo as mlo
from scalemlo.hypergradients import ESTIMATORS, estimator, estimator_of

FILE = '''
"""Half of the identity."""

from dataclasses import dataclass

from scalemlo.hypergradients import ImplicitHypergradient, Result, Status, estimator


@estimator("half", citation="Me 2026, Half")
@dataclass(frozen=True, kw_only=True)
class Half(ImplicitHypergradient):
    """``s(v) = factor * v``.

    Args:
        factor: Of v.
    """

    factor: float = 0.5

    def solve(self, v, problem):
        return Result(v * self.factor, Status.EXACT)
'''
LOOK = """
import tempfile
import half
from scalemlo.hypergradients import ESTIMATORS, estimator_of
from scalemlo.recipes import CONFIGS
from scalemlo.runs import config as cfg, schema
from scalemlo.hf import MLOConfig

assert estimator_of("half", {"factor": 0.25}) == half.Half(factor=0.25)
loaded = cfg.load("configs/reweight_smollm2.yaml", ["hypergradient.type=half", "hypergradient.factor=0.25"], CONFIGS)
assert loaded.hypergradient.build() == half.Half(factor=0.25)
text = schema.as_text(schema.schema_of(CONFIGS["long_tail"], "long_tail"))
assert '"half"' in text and "Of v." in text
options = {"hypergradient": "half", "hypergradient_options": {"factor": 0.25}}
args = MLOConfig(output_dir=tempfile.mkdtemp(), report_to=[], **options)
assert args.build_hypergradient() == half.Half(factor=0.25)
print(half.Half.citation, *ESTIMATORS)
"""


def test_a_file_is_enough(tmp_path):
    (tmp_path / "half.py").write_text(FILE)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{LOOK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Me", "2026,", "Half", *ESTIMATORS, "half"]


def test_a_name_belongs_to_one_class():
    with pytest.raises(ValueError, match="estimator 'sama' is SAMA already; give Mine another name"):

        @estimator("sama", citation="Me 2026, Mine")
        class Mine(mlo.Identity):
            pass


def test_estimators_by_name():
    assert estimator_of("neumann", {"num_terms": 2}) == mlo.Neumann(num_terms=2)
    for given, options, message in (
        ("neumann", {"terms": 2}, "'terms'] are unknown to 'neumann'; its options are"),
        ("penalty", {}, "needs \\['learning_rate'\\]"),
        (mlo.SAMA(), {"mixed": "forward"}, "put them into hypergradient=SAMA"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator_of(given, options)
