"""What a run left in its folder, read back."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf


@dataclass
class RunFolder:
    """The files of a run.

    Attributes:
        name: Of the folder.
        config: ``run.yaml`` without its provenance; empty without the file.
        provenance: Versions, device, command; empty without.
        summary: Headline ``header`` and ``rows``, a ``note``, and ``heldout``: (step, loss) points by name.
        weights: One row per example: ``example_id``, ``weight``, perhaps ``prompt``, and columns to group by.
        histories: One row per step, by program.
        phases: Statistics by phase, by program.
        resident_at_start: See :class:`scalemlo.history.History`, by program.
        plan: As :meth:`scalemlo.planning.plan.Plan.as_dict`, perhaps with ``program``, which it is of.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    weights: pd.DataFrame | None = None
    histories: dict[str, pd.DataFrame] = field(default_factory=dict)
    phases: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    resident_at_start: dict[str, int | None] = field(default_factory=dict)
    plan: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path) -> "RunFolder":
        """Read what is there.

        Args:
            folder: The run's.

        Returns:
            Its contents.

        Raises:
            ValueError: If there is no history in it.
        """
        histories = {path.parent.name: pd.read_csv(path) for path in sorted(folder.glob("*/history.csv"))}
        if not histories:
            raise ValueError(
                f"{folder}: there is no run in it, that is, no */history.csv; give the output_dir of a run of "
                "reweight_instructions. Recipes that compare methods have their table in report.md and result.png."
            )
        run, weights = folder / "run.yaml", folder / "weights.csv"
        config: Any = OmegaConf.to_container(OmegaConf.load(run)) if run.exists() else {}
        measured = {name: _json(folder / name / "phases.json") or {} for name in histories}
        return cls(
            name=folder.resolve().name,
            provenance=config.pop("provenance", None) or {},
            config=config,
            summary=_json(folder / "summary.json") or {},
            weights=pd.read_csv(weights) if weights.exists() else None,
            histories={name: history for name, history in histories.items() if len(history)},
            phases={name: found.get("phases", {}) for name, found in measured.items()},
            resident_at_start={name: found.get("resident_at_start") for name, found in measured.items()},
            plan=_json(folder / "plan.json"),
        )

    @property
    def title(self) -> str:
        """The run's name."""
        return self.name.replace("_", " ")

    @property
    def subtitle(self) -> str:
        """Recipe, model, data and when, as far as they are known."""
        model, data = self.config.get("model") or {}, self.config.get("data") or {}
        parts = [self.config.get("recipe"), model.get("name"), data.get("name"), self.provenance.get("date")]
        return " · ".join(str(part) for part in parts if part)

    @property
    def domain_columns(self) -> list[str]:
        """Columns of the weights by which examples are grouped: of few distinct values, none of them a number."""
        if self.weights is None:
            return []
        others = self.weights.drop(columns=["example_id", "weight", "prompt"], errors="ignore")
        return [c for c in others if not pd.api.types.is_float_dtype(others[c]) and 1 < others[c].nunique() <= 12]


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
