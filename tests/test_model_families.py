"""Every family that transformers builds at a tiny size: exact products, or a refusal by a sentence."""

import pytest

from tests.families import differences
from tests.families.differences import PRODUCTS, measure
from tests.families.table import all_families, figures_of, status_of

FAST = (
    "llama", "gpt2", "mixtral", "mamba", "bert", "t5", "vit", "resnet", "wav2vec2", "whisper", "llava", "clip",
)  # fmt: skip
"""One of each way to build a model; all of their products are exact."""
ROWS = {row["family"]: row for row in all_families()}


@pytest.mark.parametrize("family", FAST)
def test_products_of_a_family_are_exact(family: str) -> None:
    row = measure(**arguments(family))
    assert status_of(row) == "exact", row
    assert set(figures_of(row)["errors"]) == set(PRODUCTS)


@pytest.mark.full
@pytest.mark.parametrize("family", [name for name in ROWS if name not in FAST])
def test_a_family_is_exact_or_refused_by_a_sentence(family: str) -> None:
    row = measure(**arguments(family))
    if row["status"] in ("not built", "not run"):
        pytest.skip(row["reason"])
    assert status_of(row) in ("exact", "refused"), row


def arguments(family: str) -> dict[str, str]:
    row = ROWS[family]
    return {"kind": row["kind"], "model_type": family, "architecture": row["architecture"]}


def test_the_comparison_notices_a_small_error(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = differences.hessian_product
    monkeypatch.setattr(
        differences,
        "hessian_product",
        lambda *args: {n: t * (1 + 1e-7) for n, t in exact(*args).items()},
    )
    row = measure(**arguments("gpt2"))
    assert status_of(row) == "wrong" and row["errors"]["identity"] < 1e-8 < row["errors"]["remat"], row
