"""Which blocks of a module are taken as a unit: gathered, rematerialised and prefetched together."""

from collections.abc import Iterable, Sequence

from torch import nn


def find_units(module: nn.Module, class_names: Sequence[str] | None, level: str) -> list[str]:
    """Names of the submodules to shard as a unit each.

    Args:
        module: The module to shard.
        class_names: Class names to look for; None for the defaults that :class:`FSDP` documents.
        level: Name for messages.

    Returns:
        Submodule names, outermost first, none nested in another.

    Raises:
        ValueError: If ``class_names`` is given and none of them occurs.
    """
    wanted = set(class_names or ())
    if class_names is None:
        for m in module.modules():
            wanted |= set(getattr(m, "_no_split_modules", None) or ())
    found = _outermost(n for n, m in module.named_modules() if n and type(m).__name__ in wanted)
    if class_names is not None and not found:
        known = sorted({type(m).__name__ for m in module.modules()})
        raise ValueError(
            f"level {level!r}: no submodule has a class of units={list(class_names)}; classes here: {known}."
        )
    if found:
        return found
    lists = {n: m for n, m in module.named_modules() if n and isinstance(m, nn.ModuleList)}
    members = {f"{n}.{i}": m for n in _outermost(lists) for i, m in enumerate(lists[n])}
    first = {id(m): name for name, m in reversed(members.items())}  # a block that occurs twice is one unit
    return [n for n, m in members.items() if first[id(m)] == n and any(True for _ in m.parameters())]


def _outermost(names: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for name in names:
        if not any(name.startswith(k + ".") for k in kept):
            kept.append(name)
    return kept
