"""Configuration files: YAML and ``key=value`` overrides, checked against dataclasses.

``load`` reads a YAML file whose first key ``recipe`` names the recipe, merges ``key=value`` overrides (dotted keys
reach into sections), and validates the whole against the recipe's config dataclass: unknown keys, wrong types and
values out of range are errors that name the key. ``engine`` and ``hypergradient`` have a ``type``, and the keys of what
it names; the launcher that started this process has a say in the engine, see :mod:`scalemlo.runs.launched`.
"""

import dataclasses
import difflib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BeforeValidator, Discriminator, TypeAdapter, ValidationError
from transformers import SchedulerType, get_scheduler
from yaml import YAMLError

from ..distributed.group import world_size
from ..engines import DDP, ENGINE_SHORTHANDS, ENGINES, EngineSpec, Single
from ..engines.base import DType
from ..hypergradients import ESTIMATORS
from ..loop.trackers import TrackWith, tracker_names
from ..loop.verification import Verify
from ..memory.budget import Memory
from . import launched
from .provenance import Provenance

logger = logging.getLogger(__name__)

STRICT = {"extra": "forbid"}
"""Put it into a config dataclass as ``__pydantic_config__``: unknown keys are errors."""


class ConfigError(ValueError):
    """A configuration is wrong; the message lists every problem with its key."""


_SCHEDULERS = sorted(kind.value for kind in SchedulerType if kind is not SchedulerType.REDUCE_ON_PLATEAU)


@dataclass(kw_only=True)
class OptimizerConfig:
    """An optimizer of torch and a learning-rate schedule of transformers.

    Args:
        type: ``adamw``, or ``sgd``, which keeps the size of the gradient: for tables whose rows are rarely visited.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay.
        betas: Decay rates of AdamW's moments.
        momentum: Of SGD.
        lr_scheduler_type: A name that ``transformers.get_scheduler`` knows and that needs no metric.
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
        if self.lr_scheduler_type not in _SCHEDULERS:
            raise ValueError(f"lr_scheduler_type={self.lr_scheduler_type!r} is unknown; choose one of {_SCHEDULERS}")
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


def _config_of(name: str, cls: Any) -> type:
    """A config dataclass with the fields of another one, and ``type``, its name; ``build`` makes the other."""
    types = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]

    def build(self: Any) -> Any:
        return cls(**{n: getattr(self, n) for n in names})

    def check(self: Any) -> None:
        """Build once at the start: a value out of range is an error of the configuration."""
        built = build(self)
        # What was read from a file that a value names (DeepSpeed's) is kept, so that a saved run replays without it.
        vars(self).update({n: _nested(getattr(built, n)) for n in names})

    return make_dataclass(
        cls.__name__ + "Config",
        [
            ("type", Literal[name], field(default=name)),  # ty: ignore[invalid-type-form]
            *((f.name, types[f.name], dataclasses.field(default=f.default)) for f in dataclasses.fields(cls)),
        ],
        kw_only=True,
        namespace={"__pydantic_config__": STRICT, "__doc__": cls.__doc__, "build": build, "__post_init__": check},
    )


def _nested(value: Any) -> Any:
    """Pairs of dotted key and value, as specs keep them to be hashable, as the mapping they are; others unchanged."""
    if not (isinstance(value, tuple) and value and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)):
        return value
    tree = OmegaConf.create({})
    for key, leaf in value:
        OmegaConf.update(tree, key, list(leaf) if isinstance(leaf, tuple) else leaf)
    return OmegaConf.to_container(tree)


@dataclass(kw_only=True)
class AutoConfig:
    """The launcher's engine; where it names none, ``single`` in one process and ``ddp`` in several.

    Args:
        type: ``auto``.
        dtype: Precision of forward and backward.
    """

    __pydantic_config__ = STRICT
    type: Literal["auto"] = "auto"
    dtype: DType = "fp32"

    def build(self) -> EngineSpec:
        """The engine for the number of processes that run."""
        return self.for_ranks(world_size())

    def for_ranks(self, num_ranks: int) -> EngineSpec:
        """The engine for a number of processes."""
        return (Single if num_ranks == 1 else DDP)(dtype=self.dtype)


ENGINE_CONFIGS = {"auto": AutoConfig} | {name: _config_of(name, engine) for name, engine in ENGINES.items()}
"""Config dataclass by engine: ``type`` and the engine's own fields."""

EngineConfig = Annotated[Union[tuple(ENGINE_CONFIGS.values())], Discriminator("type")]  # noqa: UP007  # ty: ignore[invalid-type-form]
"""How modules are held; ``type`` says which of :data:`ENGINE_CONFIGS`."""

ESTIMATOR_CONFIGS = {name: _config_of(name, estimator) for name, estimator in ESTIMATORS.items()}
"""Config dataclass by estimator: ``type`` and the estimator's own fields."""

HypergradientConfig = Annotated[Union[tuple(ESTIMATOR_CONFIGS.values())], Discriminator("type")]  # noqa: UP007  # ty: ignore[invalid-type-form]
"""How upper levels differentiate through a lower one; ``type`` says which of :data:`ESTIMATOR_CONFIGS`."""

UNIONS = {"engine": ENGINE_CONFIGS, "hypergradient": ESTIMATOR_CONFIGS}
"""Config dataclasses by ``type``, by the key of the section."""


def _memory(given: Any) -> Memory | None:
    """A budget from a size of the device, or from a mapping."""
    if given is None or isinstance(given, Memory):
        return given
    if not isinstance(given, dict):
        return Memory(device=given)
    known = [f.name for f in dataclasses.fields(Memory)]
    unknown = sorted(set(given) - set(known))
    if unknown or "device" not in given:
        wrong = f"unknown key {unknown[0]!r}" if unknown else "device is missing"
        raise ValueError(f"{wrong}; give a size such as 70GiB, or a mapping with keys {known}, of which device must be")
    return Memory(**given)


MemoryConfig = Annotated[Memory | None, BeforeValidator(_memory, json_schema_input_type=Memory | int | str | None)]
"""A memory budget: a size, or a mapping with the fields of :class:`scalemlo.Memory`."""


@dataclass(kw_only=True)
class RunConfig:
    """What every recipe's configuration has.

    Args:
        recipe: Name of the recipe.
        output_dir: Where the run writes.
        seed: Seeds data, initialisation, shuffling and dropout.
        num_processes: If set, the run refuses to start with another number of processes.
        engine: How modules are held: a name, or ``type`` and the options of that engine.
        nonfinite: ``raise`` or ``skip`` when a value is NaN or infinite.
        verify: When derivatives are compared with the live modules: at ``first`` use, ``always``, or ``off``.
        verify_every: Outer steps after which they are compared again.
        memory: What a rank may take of its device, such as ``70GiB``, or a mapping with ``device``, ``host`` and
            ``disk``; states that a phase does not need leave the device where they must. ``null`` moves nothing.
        plan: Whether to plan the run's memory beside it, in a process of low priority, and to show planned beside
            measured peaks at the end.
        report_to: Trackers that follow the run, such as ``tensorboard`` or ``[wandb, mlflow]``; ``none`` for none.
        provenance: Where a run came from; written by runs into their ``run.yaml``. A replay ignores it, but warns of
            versions that differ.
    """

    __pydantic_config__ = STRICT
    recipe: str
    output_dir: str
    seed: int = 0
    num_processes: int | None = None
    engine: EngineConfig = field(default_factory=AutoConfig)
    nonfinite: Literal["raise", "skip"] = "raise"
    verify: Verify = "first"
    verify_every: int = 1000
    memory: MemoryConfig = None
    plan: bool = True
    report_to: Annotated[list[str] | str, AfterValidator(tracker_names)] = field(default_factory=list)
    provenance: Provenance | None = None

    def program_options(self) -> dict[str, Any]:
        """Arguments of :class:`scalemlo.Program` that every recipe passes on."""
        return dict(nonfinite=self.nonfinite, verify=self.verify, verify_every=self.verify_every, memory=self.memory)

    def tracker(self, run_name: str) -> TrackWith:
        """What sends one program of the run to the trackers of ``report_to``: a callback of that program.

        Args:
            run_name: Which program it is.

        Returns:
            The callback.
        """
        folder, values = Path(self.output_dir), plain(self) | {"run": run_name}
        return TrackWith(self.report_to, folder / "trackers", run_name=run_name, project=folder.name, config=values)


def load(path: str | Path, overrides: Sequence[str], recipes: dict[str, type[RunConfig]]) -> RunConfig:
    """Read, merge and validate a configuration.

    Args:
        path: YAML file.
        overrides: ``key=value`` each. ``engine=NAME`` puts another engine in the place of the file's, and keeps its
            ``dtype``; it also takes :data:`ENGINE_SHORTHANDS`.
        recipes: Config dataclass by recipe name.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: Naming file, key, value and rule.
    """
    raw, name = _read(path, overrides, recipes)
    problems = []
    engine = raw.pop("engine", None)
    try:
        raw["engine"] = _settle_engine(engine, path, overrides)
    except ValueError as error:
        problems.append(f"engine: {error}")
    try:
        config = TypeAdapter(recipes[name]).validate_python(raw)
    except ValidationError as error:
        problems += [_explain(problem, recipes[name]) for problem in error.errors()]
    else:
        problems += _wrong_counts(config)
    if problems:
        raise ConfigError(f"{path}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))
    _warn_of_differences(config, path)
    return config


_COUNTS = ("batch_size", "accumulation_steps", "unroll_steps", "verify_every")


def _wrong_counts(config: Any, prefix: str = "") -> list[str]:
    """Numbers of things of which there must be one at least, in all sections."""
    found = []
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if dataclasses.is_dataclass(value):
            found += _wrong_counts(value, f"{prefix}{option.name}.")
        elif option.name.endswith(_COUNTS) and isinstance(value, int) and value < 1:
            found.append(f"{prefix}{option.name}: must be at least 1 (got {value})")
    return found


def recipe_of(path: str | Path, overrides: Sequence[str], recipes: dict[str, type[RunConfig]]) -> str:
    """Which recipe a file is for, whatever else is wrong with it.

    Args:
        path: YAML file.
        overrides: ``key=value`` each.
        recipes: Config dataclass by recipe name.

    Returns:
        The name.
    """
    return _read(path, overrides, recipes)[1]


def save(config: RunConfig, path: str | Path) -> None:
    """Write a configuration that :func:`load` reads back, with the provenance of this process."""
    replay = f"# Replays this run: scalemlo train {path}\n"
    Path(path).write_text(replay + to_yaml(dataclasses.replace(config, provenance=Provenance.here())))


def to_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults included."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def plain(config: RunConfig) -> dict[str, Any]:
    """The whole configuration as nested dicts, as JSON takes them."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def _read(path: str | Path, overrides: Sequence[str], recipes: dict[str, type[RunConfig]]) -> tuple[dict, str]:
    malformed = [o for o in overrides if "=" not in o or o.startswith("-")]
    if malformed:
        raise ConfigError(f"overrides must look like key=value, got {malformed}.")
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such configuration file.")
    try:
        raw: Any = _merge(path, overrides)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    name = raw.get("recipe") if isinstance(raw, dict) else None
    if name not in recipes:
        raise ConfigError(f"{path}: recipe={name!r} is unknown; recipes are {sorted(recipes)}.")
    return raw, name


def _warn_of_differences(config: RunConfig, path: str | Path) -> None:
    if config.provenance is None or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    differences = config.provenance.differences()
    if differences:
        logger.warning("%s was written under other conditions:\n  %s", path, "\n  ".join(differences))


def _merge(path: str | Path, overrides: Sequence[str]) -> Any:
    file = OmegaConf.load(path)
    if isinstance(file, DictConfig) and isinstance(file.get("engine"), str):
        file.engine = {"type": file.engine}
    named = [o for o in overrides if re.fullmatch(r"engine=\w+", o)]
    if named and isinstance(file, DictConfig) and isinstance(file.get("engine"), DictConfig):
        file.engine = {k: v for k, v in file.engine.items() if k == "dtype"}
    dotted = [o.replace("engine=", "engine.type=", 1) if o in named else o for o in overrides]
    return OmegaConf.to_container(OmegaConf.merge(file, OmegaConf.from_dotlist(dotted)), resolve=True)


def _settle_engine(given: Any, path: str | Path, overrides: Sequence[str]) -> Any:
    """The section with its shorthand written out and with what the launcher asks for."""
    if not isinstance(given, dict | None):
        return given
    section = {"type": "auto"} | (given or {})
    known = [*ENGINE_CONFIGS, *ENGINE_SHORTHANDS]
    if section["type"] not in known:
        raise ValueError(f"type={section['type']!r} is unknown; engines are {known}.")
    short = ENGINE_SHORTHANDS.get(section["type"], {})
    clashes = [f"{k}={section[k]!r}" for k in short if k != "type" and section.get(k, short[k]) != short[k]]
    if clashes:
        raise ValueError(f"type={section['type']!r} is short for {short}, but {', '.join(clashes)} is given too.")

    def where(key: str) -> str:
        means = (f"engine.{key}=", "engine=" if key in {"type", *short} else f"engine.{key}=")
        return next((f"the override {o}" for o in reversed(overrides) if o.startswith(means)), str(path))

    return launched.agree(section | short, launched.claims(), where)


def _explain(problem: Any, root: type) -> str:
    tags = [i for i in range(1, len(problem["loc"])) if problem["loc"][i] in UNIONS.get(problem["loc"][i - 1], ())]
    location = [part for i, part in enumerate(problem["loc"]) if i not in tags]  # a tag is no key of the file
    key = ".".join(str(part) for part in location)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        cls, inside = root, location[:-1]
        if tags:
            section, name = problem["loc"][tags[0] - 1 : tags[0] + 1]
            cls, inside = UNIONS[section][name], ()
        known = _fields(cls, inside)
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"{key}: unknown key.{hint} Keys{f' of {name}' if tags else ' here'}: {known}."
    value = "" if problem["type"] == "missing_argument" else f" (got {problem['input']!r})"
    return f"{key}: {problem['msg']}{value}"


def _fields(cls: type, location: Sequence) -> list[str]:
    for part in location:
        types = {f.name: f.type for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        found = types.get(str(part))
        if isinstance(found, type) and dataclasses.is_dataclass(found):
            cls = found
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
