"""Checks of an estimator's fields: each says the field, its value and the rule."""

import math


def require_count(estimator: object, field: str) -> None:
    """Check that a field is an integer of at least 1.

    Args:
        estimator: The estimator.
        field: Name of the field.

    Raises:
        ValueError: If it is not.
    """
    value = getattr(estimator, field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{type(estimator).__name__}: {field}={value!r} must be an integer of at least 1.")


def require_number(estimator: object, field: str, *, positive: bool) -> None:
    """Check that a field is a finite number, greater than zero or at least zero.

    Args:
        estimator: The estimator.
        field: Name of the field.
        positive: Whether zero is out of range.

    Raises:
        ValueError: If it is not.
    """
    value = getattr(estimator, field)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (positive and value == 0):
        rule = "greater than 0" if positive else "of at least 0"
        raise ValueError(f"{type(estimator).__name__}: {field}={value!r} must be a finite number {rule}.")
