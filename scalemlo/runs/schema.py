"""JSON schemas of configurations, with the docstrings as descriptions: editors complete and check YAML with them."""

import dataclasses
import inspect
import json
import re
from typing import Any

from pydantic import TypeAdapter

from ..engines import ENGINE_SHORTHANDS
from .config import ENGINE_CONFIGS, UNIONS, RunConfig


def schema_of(config: type[RunConfig], recipe: str) -> dict[str, Any]:
    """The JSON schema of a recipe's YAML files.

    Args:
        config: The recipe's configuration dataclass.
        recipe: Its name.

    Returns:
        Every key with its type, its default and the description of its docstring; other keys are errors.
    """
    schema = TypeAdapter(config).json_schema()
    classes = {cls.__name__: cls for cls in _dataclasses_in(config)}
    for name, definition in [(config.__name__, schema), *schema.get("$defs", {}).items()]:
        if name in classes:
            _describe(definition, classes[name])
    schema["properties"]["recipe"] |= {"const": recipe}
    _add_shorthands(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def as_text(schema: dict[str, Any]) -> str:
    """A schema as the file that is written."""
    return json.dumps(schema, indent=2) + "\n"


def _dataclasses_in(root: type) -> list[type]:
    """A dataclass, those of its fields, and all that engines and estimators may be."""
    found: list[type] = [cls for configs in UNIONS.values() for cls in configs.values()]
    queue = [root, *found]
    while queue:
        cls = queue.pop()
        if cls not in found:
            found.append(cls)
        hints = inspect.get_annotations(cls)
        for base in cls.__mro__[1:]:
            hints = inspect.get_annotations(base) | hints
        inner = [t for hint in hints.values() for t in (hint, *getattr(hint, "__args__", ()))]
        queue += [t for t in inner if isinstance(t, type) and dataclasses.is_dataclass(t) and t not in found]
    return found


def _describe(definition: dict[str, Any], cls: type) -> None:
    definition.pop("description", None)
    text = _plain(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0])
    if text:
        definition["description"] = text
    described = {}
    for base in reversed(cls.__mro__):
        described |= described_arguments(base.__doc__ or "")
    for name, entry in definition.get("properties", {}).items():
        entry.pop("title", None)
        if name in described:
            entry["description"] = described[name]


def described_arguments(docstring: str) -> dict[str, str]:
    """Descriptions by argument from a Google-style docstring, from its sections Args and Attributes."""
    found: dict[str, str] = {}
    for section in re.findall(r"^(?:Args|Attributes):\n((?:[ ]+.*\n?|\n)*)", inspect.cleandoc(docstring), re.M):
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, re.M):
            found[name] = _plain(text)
    return found


def _plain(text: str) -> str:
    """Text without line breaks and markup of references."""
    text = re.sub(r":\w+:`~?\.?([^`]*)`", r"\1", text)
    return " ".join(text.replace("``", "").split())


def _add_shorthands(schema: dict[str, Any]) -> None:
    """The engine may be a name alone, and ``type`` a shorthand, which :func:`scalemlo.runs.config.load` writes out."""
    definitions, engine = schema["$defs"], schema["properties"]["engine"]
    names = [*ENGINE_CONFIGS, *ENGINE_SHORTHANDS]
    written_out = {key: engine.pop(key) for key in ("oneOf", "discriminator", "$ref") if key in engine}
    full = {ENGINE_CONFIGS[short["type"]].__name__ for short in ENGINE_SHORTHANDS.values()}
    shorthands = []
    for name in sorted(full):
        kind = {short for short, means in ENGINE_SHORTHANDS.items() if ENGINE_CONFIGS[means["type"]].__name__ == name}
        properties = definitions[name]["properties"] | {"type": {"enum": sorted(kind)}}
        shorthands.append({**definitions[name], "properties": properties, "required": ["type"]})
    engine["anyOf"] = [{"enum": names}, written_out, *shorthands]
