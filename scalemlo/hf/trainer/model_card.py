"""The model card: what was trained on what and how, so that a reader can judge and repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import yaml

from ...reporting.tables import markdown_table

_PACKAGES = ("scalemlo", "transformers", "peft", "torch")


def model_card(
    *,
    name: str,
    base_model: str | None,
    is_adapter: bool,
    estimators: Mapping[str, Any],
    data: Mapping[str, str],
    hyperparameters: Mapping[str, Any],
    metrics: Mapping[str, float],
    tags: list[str],
    extra: Mapping[str, Any],
) -> str:
    """The text of a card.

    Args:
        name: Of the model.
        base_model: Name on the hub of what it was fine-tuned from, or None.
        is_adapter: Whether it is a PEFT adapter.
        estimators: Estimator by level.
        data: Description by role.
        hyperparameters: By name.
        metrics: Of the last evaluation and of training.
        tags: For the hub.
        extra: Further metadata.

    Returns:
        Markdown with metadata on top.
    """
    metadata = {
        "library_name": "peft" if is_adapter else "transformers",
        "model_name": name,
        "tags": sorted({"scalemlo", "multilevel-optimization", "generated_from_trainer", *tags}),
        **({"base_model": base_model} if base_model else {}),
        **extra,
    }
    papers = []
    for level, estimator in estimators.items():
        papers.append(
            f"- level `{level}`: `{estimator!r}`. {vars(type(estimator)).get('citation') or type(estimator).__name__}"
        )
    sections = {
        "Hypergradient": "\n".join(papers),
        "Data": "\n".join(f"- {role}: {text}" for role, text in data.items()),
        "Hyperparameters": _table(hyperparameters),
        "Results": _table(metrics) if metrics else "Not evaluated.",
        "Versions": "\n".join(f"- {package} {version(package)}" for package in _PACKAGES),
    }
    what = "An adapter for" if is_adapter else "Fine-tuned from"
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    lines.append(f"{what} {base_model or 'a model that is not on the hub'} by multilevel optimization with scalemlo.")
    for title, text in sections.items():
        lines += ["", f"## {title}", "", text]
    return "\n".join(lines) + "\n"


def _table(values: Mapping[str, Any]) -> str:
    rows = [[key, f"{value:.6g}" if isinstance(value, float) else value] for key, value in values.items()]
    return markdown_table(["name", "value"], rows).rstrip()
