"""Plain YAML data to the frozen dataclasses, strict about keys and types; every message names the field by its path.

omegaconf's structured configs would check the same, but their messages are theirs: a user of ours gets one line with the
field, its value, the rule and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tandem.trainer.config.sections import LR_CONFIGS, MODEL_CONFIGS, BTLMConfig, LRConfig, StableLMConfig, UserError


def parse_dataclass(dataclass_type: Any, tree: Any, key_path: str) -> Any:
    """One section, or the whole config, as its frozen dataclass; `key_path` is its path, for messages.

    Raises: UserError for an unknown or missing key and a value of the wrong type.
    """
    return _parse_value(dataclass_type, tree, key_path)


def _parse_value(annotation: Any, value: Any, key_path: str) -> Any:
    """`value` (plain YAML data) as an instance of the annotation `kind`; strict about keys and types."""
    type_origin, arguments = get_origin(annotation), get_args(annotation)
    if type_origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise UserError(f"{key_path}: {value!r}; must be one of {', '.join(map(str, arguments))}; change it")
        return value
    if type_origin is list:
        if not isinstance(value, list):
            raise UserError(f"{key_path}: {value!r}; must be a list; write one entry per line with a dash")
        return [_parse_value(arguments[0], item, f"{key_path}[{index}]") for index, item in enumerate(value)]
    if type_origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{key_path}: {value!r}; must be a mapping of names; write name: value")
        return {str(key): _parse_value(arguments[1], item, f"{key_path}.{key}") for key, item in value.items()}
    if type(None) in arguments:
        (present,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _parse_value(present, value, key_path)
    if annotation == StableLMConfig | BTLMConfig:
        annotation = _select_class(MODEL_CONFIGS, value, key_path, "family")
    elif annotation is LRConfig:
        annotation = _select_class(LR_CONFIGS, value, key_path, "kind")
    if dataclasses.is_dataclass(annotation):
        return _parse_fields(annotation, value, key_path)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not annotation:
        raise UserError(f"{key_path}: {value!r} is {type(value).__name__}; must be {annotation.__name__}; change it")
    return value


def _parse_fields(dataclass_type: Any, value: Any, key_path: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{key_path}: {value!r}; must be a section with fields; see configs/ for a complete file")
    hints, fields = get_type_hints(dataclass_type), {entry.name: entry for entry in dataclasses.fields(dataclass_type)}
    prefix = f"{key_path}." if key_path else ""
    for key in value:
        if key not in fields:
            close_matches = difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"did you mean {close_matches[0]}?" if close_matches else f"known: {', '.join(fields)}"
            raise UserError(f"{prefix}{key}: {_short_repr(value[key])}; no such field; {remedy}")
    for name, entry in fields.items():
        if name not in value and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            if dataclasses.is_dataclass(hints[name]) and all(
                inner.default is not dataclasses.MISSING for inner in dataclasses.fields(hints[name])
            ):
                continue
            raise UserError(f"{prefix}{name}: missing; the config has no value for it; add {prefix}{name}")
    return dataclass_type(**{
        name: _parse_value(hints[name], value.get(name, {}), f"{prefix}{name}")
        for name, entry in fields.items()
        if name in value or (entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING)
    })  # fmt: skip


def _select_class(classes: dict[str, Any], value: Any, key_path: str, key: str) -> Any:
    name = value.get(key) if isinstance(value, dict) else None
    if name not in classes:
        raise UserError(f"{key_path}.{key}: {name!r}; must be one of {', '.join(classes)}; change it")
    return classes[name]


def _short_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
