"""Plain YAML data to the frozen dataclasses, strict about keys and types; every message names the field by its path.

omegaconf's structured configs would check the same, but their messages are theirs: a user of ours gets one line with the
field, its value, the rule and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tandem.trainer.config.sections import BTLM, FAMILIES, LEARNING_RATES, LearningRate, StableLM, UserError


def section_from(kind: Any, tree: Any, where: str) -> Any:
    """One section, or the whole config, as its frozen dataclass; `where` is its path, for messages.

    Raises: UserError for an unknown or missing key and a value of the wrong type.
    """
    return _build(kind, tree, where)


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` (plain YAML data) as an instance of the annotation `kind`; strict about keys and types."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise UserError(f"{where}: {value!r}; must be one of {', '.join(map(str, arguments))}; change it")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{where}: {value!r}; must be a list; write one entry per line with a dash")
        return [_build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: {value!r}; must be a mapping of names; write name: value")
        return {str(key): _build(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if type(None) in arguments:
        (present,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _build(present, value, where)
    if kind == StableLM | BTLM:
        kind = _chosen(FAMILIES, value, where, "family")
    elif kind is LearningRate:
        kind = _chosen(LEARNING_RATES, value, where, "kind")
    if dataclasses.is_dataclass(kind):
        return _build_section(kind, value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{where}: {value!r} is {type(value).__name__}; must be {kind.__name__}; change it")
    return value


def _build_section(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r}; must be a section with fields; see configs/ for a complete file")
    hints, fields = get_type_hints(kind), {entry.name: entry for entry in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"
            raise UserError(f"{prefix}{key}: {_shown(value[key])}; no such field; {remedy}")
    for name, entry in fields.items():
        if name not in value and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            if dataclasses.is_dataclass(hints[name]) and all(
                inner.default is not dataclasses.MISSING for inner in dataclasses.fields(hints[name])
            ):
                continue
            raise UserError(f"{prefix}{name}: missing; the config has no value for it; add {prefix}{name}")
    return kind(**{
        name: _build(hints[name], value.get(name, {}), f"{prefix}{name}")
        for name, entry in fields.items()
        if name in value or (entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING)
    })  # fmt: skip


def _chosen(kinds: dict[str, Any], value: Any, where: str, key: str) -> Any:
    chosen = value.get(key) if isinstance(value, dict) else None
    if chosen not in kinds:
        raise UserError(f"{where}.{key}: {chosen!r}; must be one of {', '.join(kinds)}; change it")
    return kinds[chosen]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
