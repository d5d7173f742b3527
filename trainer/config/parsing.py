"""Convert plain YAML data into the frozen dataclasses, strictly: unknown keys, missing keys and wrong types are errors.

omegaconf's structured configs would check the same, but their errors do not fit our form: one line with the field's path, the
value, the rule and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tandem.trainer.config.sections import LR_CONFIGS, MODEL_CONFIGS, AnyModelConfig, LRConfig, UserError


def parse_dataclass(dataclass_type: Any, tree: Any, key_path: str) -> Any:
    """Convert a section, or the whole config, into its dataclass. `key_path` is its path in error messages.

    Raises: UserError for an unknown key, a missing key or a value of the wrong type.
    """
    if not isinstance(tree, dict):
        raise UserError(
            f"{key_path}: {_short_repr(tree)} is not a section with fields; the configs that ship are complete files"
        )
    hints, fields = get_type_hints(dataclass_type), {entry.name: entry for entry in dataclasses.fields(dataclass_type)}
    prefix = f"{key_path}." if key_path else ""
    for key in tree:
        if key not in fields:
            close_matches = difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"did you mean {close_matches[0]}?" if close_matches else f"the fields are {', '.join(fields)}"
            raise UserError(f"{prefix}{key}: {_short_repr(tree[key])} is given, but there is no such field; {remedy}")
    values = {}
    for name, entry in fields.items():
        if name in tree:
            values[name] = tree[name]
        elif _is_required(entry):
            # A section whose fields all have defaults may be left out.
            if not dataclasses.is_dataclass(hints[name]) or any(map(_is_required, dataclasses.fields(hints[name]))):
                raise UserError(f"{prefix}{name}: is missing; add {prefix}{name} to the config")
            values[name] = {}
    parsed = {name: _parse_value(hints[name], value, f"{prefix}{name}") for name, value in values.items()}
    return dataclass_type(**parsed)


def _parse_value(annotation: Any, value: Any, key_path: str) -> Any:
    type_origin, arguments = get_origin(annotation), get_args(annotation)
    if type_origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise UserError(
                f"{key_path}: {_short_repr(value)} is not valid; it must be one of {', '.join(map(str, arguments))}"
            )
        return value
    if type_origin is list:
        if not isinstance(value, list):
            raise UserError(f"{key_path}: {_short_repr(value)} is not a list; write one entry per line with a dash")
        return [_parse_value(arguments[0], item, f"{key_path}[{index}]") for index, item in enumerate(value)]
    if type_origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{key_path}: {_short_repr(value)} is not a mapping; write one `name: value` per line")
        return {str(key): _parse_value(arguments[1], item, f"{key_path}.{key}") for key, item in value.items()}
    if type(None) in arguments:
        (present,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _parse_value(present, value, key_path)
    if annotation == AnyModelConfig:
        annotation = _select_class(MODEL_CONFIGS, value, key_path, "family")
    elif annotation is LRConfig:
        annotation = _select_class(LR_CONFIGS, value, key_path, "kind")
    if dataclasses.is_dataclass(annotation):
        return parse_dataclass(annotation, value, key_path)
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise UserError(f"{key_path}: {_short_repr(value)} does not fit in 64 bits; use a smaller number")
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not annotation:
        found, wanted = type(value).__name__, annotation.__name__
        raise UserError(f"{key_path}: {_short_repr(value)} is of type {found}; write a value of type {wanted}")
    return value


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _select_class(classes: dict[str, Any], value: Any, key_path: str, key: str) -> Any:
    name = value.get(key) if isinstance(value, dict) else None
    if name not in classes:
        raise UserError(f"{key_path}.{key}: {_short_repr(name)} is not valid; it must be one of {', '.join(classes)}")
    return classes[name]


def _short_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
