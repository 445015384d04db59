"""Configuration files: YAML and ``key=value`` overrides, checked against dataclasses.

``load`` reads a YAML file whose first key ``recipe`` names the recipe, merges ``key=value`` overrides (dotted keys
reach into sections), and validates the whole against the recipe's config dataclass: unknown keys, wrong types and
values out of range are errors that name the key.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_type_hints

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Discriminator, TypeAdapter, ValidationError
from transformers import get_scheduler
from yaml import YAMLError

from .engines import ENGINES, EngineSpec
from .hypergradients import ESTIMATORS, Hypergradient

STRICT = {"extra": "forbid"}
"""Put it into a config dataclass as ``__pydantic_config__``: unknown keys are errors."""


class ConfigError(ValueError):
    """A configuration is wrong; the message lists every problem with its key."""


@dataclass(kw_only=True)
class EngineConfig:
    """How modules are held.

    Args:
        type: ``auto`` is ``single`` in one process and ``ddp`` in several.
        dtype: Precision of forward and backward.
    """

    __pydantic_config__ = STRICT
    type: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"

    def build(self, num_processes: int) -> EngineSpec:
        """The engine for a number of processes."""
        name = self.type if self.type != "auto" else ("single" if num_processes == 1 else "ddp")
        return ENGINES[name](dtype=self.dtype)


@dataclass(kw_only=True)
class OptimizerConfig:
    """An optimizer of torch and a learning-rate schedule of transformers.

    Args:
        type: ``adamw``, or ``sgd``, which keeps the size of the gradient: for tables whose rows are rarely visited.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay.
        betas: Decay rates of AdamW's moments.
        momentum: Of SGD.
        lr_scheduler_type: A name that ``transformers.get_scheduler`` knows.
        warmup_steps: Steps of linear warm-up.
    """

    __pydantic_config__ = STRICT
    type: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if self.type == "sgd" and self.betas != (0.9, 0.999):
            raise ValueError(f"betas={self.betas} have no effect with type='sgd'; set momentum")
        if self.type == "adamw" and self.momentum:
            raise ValueError(f"momentum={self.momentum} has no effect with type='adamw'; set betas")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must not be negative")

    def optimizer(self):
        """A function from parameters to their optimizer."""
        common = dict(lr=self.learning_rate, weight_decay=self.weight_decay)
        if self.type == "sgd":
            return partial(torch.optim.SGD, momentum=self.momentum, **common)
        return partial(torch.optim.AdamW, betas=self.betas, **common)

    def scheduler(self, num_steps: int):
        """A function from an optimizer to its scheduler over a number of its steps."""
        return partial(
            get_scheduler, self.lr_scheduler_type, num_warmup_steps=self.warmup_steps, num_training_steps=num_steps
        )


def _estimator_config(name: str, estimator: type[Hypergradient]) -> type:
    """A config dataclass with the fields of an estimator, and ``type``, its name; ``build`` makes the estimator."""
    types = get_type_hints(estimator)
    names = [f.name for f in dataclasses.fields(estimator)]

    def build(self: Any) -> Hypergradient:
        return estimator(**{n: getattr(self, n) for n in names})

    return make_dataclass(
        estimator.__name__ + "Config",
        [
            ("type", Literal[name], field(default=name)),  # type: ignore[valid-type]
            *((f.name, types[f.name], dataclasses.field(default=f.default)) for f in dataclasses.fields(estimator)),
        ],
        kw_only=True,
        # Built once at the start, so that a value out of range is an error of the configuration.
        namespace={"__pydantic_config__": STRICT, "__doc__": estimator.__doc__, "build": build, "__post_init__": build},
    )


ESTIMATOR_CONFIGS = {name: _estimator_config(name, estimator) for name, estimator in ESTIMATORS.items()}
"""Config dataclass by estimator: ``type`` and the estimator's own fields."""

HypergradientConfig = Annotated[Union[tuple(ESTIMATOR_CONFIGS.values())], Discriminator("type")]  # noqa: UP007
"""How upper levels differentiate through a lower one; ``type`` says which of :data:`ESTIMATOR_CONFIGS`."""


@dataclass(kw_only=True)
class RunConfig:
    """What every recipe's configuration has.

    Args:
        recipe: Name of the recipe.
        output_dir: Where the run writes.
        seed: Seeds data, initialisation, shuffling and dropout.
        num_processes: If set, the run refuses to start with another number of processes.
        engine: How modules are held.
        nonfinite: ``raise`` or ``skip`` when a value is NaN or infinite.
    """

    __pydantic_config__ = STRICT
    recipe: str
    output_dir: str
    seed: int = 0
    num_processes: int | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    nonfinite: Literal["raise", "skip"] = "raise"


def load(path: str | Path, overrides: Sequence[str], recipes: dict[str, type[RunConfig]]) -> RunConfig:
    """Read, merge and validate a configuration.

    Args:
        path: YAML file.
        overrides: ``key=value`` each; ``engine=fsdp`` is short for ``engine.type=fsdp``.
        recipes: Config dataclass by recipe name.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: Naming file, key, value and rule.
    """
    malformed = [o for o in overrides if "=" not in o or o.startswith("-")]
    if malformed:
        raise ConfigError(f"overrides must look like key=value, got {malformed}.")
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such configuration file.")
    try:
        expanded = [o.replace("engine=", "engine.type=", 1) if o.startswith("engine=") else o for o in overrides]
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(expanded))
        raw: Any = OmegaConf.to_container(merged, resolve=True)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    name = raw.get("recipe") if isinstance(raw, dict) else None
    if name not in recipes:
        raise ConfigError(f"{path}: recipe={name!r} is unknown; recipes are {sorted(recipes)}.")
    if isinstance(raw.get("engine"), str):
        raw["engine"] = {"type": raw["engine"]}
    try:
        return TypeAdapter(recipes[name]).validate_python(raw)
    except ValidationError as error:
        problems = [_explain(problem, recipes[name]) for problem in error.errors()]
        raise ConfigError(f"{path}: {len(problems)} problem(s)\n  " + "\n  ".join(problems)) from None


def save(config: RunConfig, path: str | Path) -> None:
    """Write a configuration that :func:`load` reads back."""
    plain = TypeAdapter(type(config)).dump_python(config, mode="json")
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))


def _explain(problem: Any, root: type) -> str:
    location = [part for i, part in enumerate(problem["loc"]) if not _is_tag(problem["loc"], i)]
    key = ".".join(str(part) for part in location)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        tag = next((part for i, part in enumerate(problem["loc"]) if _is_tag(problem["loc"], i)), None)
        known = _fields(root, location[:-1]) if tag is None else _fields(ESTIMATOR_CONFIGS[str(tag)], ())
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else f" Keys here: {known}."
        return f"{key}: unknown key.{hint}"
    value = "" if problem["type"] == "missing_argument" else f" (got {problem['input']!r})"
    return f"{key}: {problem['msg']}{value}"


def _is_tag(location: Sequence, i: int) -> bool:
    """Whether a part of a location says which estimator was meant, and is no key of the file."""
    return i > 0 and location[i - 1] == "hypergradient" and location[i] in ESTIMATOR_CONFIGS


def _fields(cls: type, location: Sequence) -> list[str]:
    for part in location:
        types = {f.name: f.type for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        found = types.get(str(part))
        if isinstance(found, type) and dataclasses.is_dataclass(found):
            cls = found
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
