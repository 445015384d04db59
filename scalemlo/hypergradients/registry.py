"""Estimators by name: what configurations, trainers, schemas and model cards know of them."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .base import Hypergradient

ESTIMATORS: dict[str, type[Hypergradient]] = {}
"""Estimator by the name configurations use."""

EstimatorT = TypeVar("EstimatorT", bound=type[Hypergradient])


def estimator(name: str, *, citation: str) -> Callable[[EstimatorT], EstimatorT]:
    """Register a class of estimators; decorate it with this.

    From then on ``hypergradient="<name>"`` makes one, in a level, in the trainers' arguments and in YAML, whose schema
    has its fields with their docstrings. A name that another class has is a ``ValueError``.

    Args:
        name: How configurations call it.
        citation: Authors, year and title, for model cards.

    Returns:
        The decorator.
    """

    def register(cls: EstimatorT) -> EstimatorT:
        known = ESTIMATORS.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"estimator {name!r} is {known.__name__} already; give {cls.__name__} another name.")
        cls.citation = citation
        ESTIMATORS[name] = cls
        return cls

    return register


def estimator_of(given: str | Hypergradient, options: Mapping[str, Any] | None = None) -> Hypergradient:
    """Make an estimator from its name.

    Args:
        given: A name of :data:`ESTIMATORS`; an estimator is returned as it is.
        options: Fields of one that is given by name.

    Returns:
        The estimator.

    Raises:
        ValueError: If the name or an option is unknown, or one without a default is missing.
    """
    options = dict(options or {})
    if isinstance(given, Hypergradient):
        if options:
            raise ValueError(f"hypergradient_options={options!r}: put them into hypergradient={given!r}.")
        return given
    if given not in ESTIMATORS:
        close = difflib.get_close_matches(str(given), ESTIMATORS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"hypergradient={given!r} is unknown; choose one of {sorted(ESTIMATORS)}, or an estimator.{hint}"
        )
    fields = dataclasses.fields(ESTIMATORS[given])
    known = [f.name for f in fields]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"hypergradient_options: {unknown} are unknown to {given!r}; its options are {known}.")
    missing = [f.name for f in fields if f.name not in options and _has_no_default(f)]
    if missing:
        kind = ESTIMATORS[given].__name__
        raise ValueError(
            f"hypergradient={given!r} needs {missing}, which have no default: give hypergradient_options with them, or "
            f"hypergradient={kind}({', '.join(f'{name}=...' for name in missing)})."
        )
    return ESTIMATORS[given](**options)


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
