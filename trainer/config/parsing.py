"""Convert plain data from YAML or JSON into frozen dataclasses, strictly: unknown keys, missing keys, values of another type
and values that break a constraint (`constraints`) are errors.

Everything that comes from a file of others passes here: configs, manifests, tables of checkpoints, records of journals, Hugging
Face configs. omegaconf's structured configs would check some of it, but their errors do not fit our form: one line with the
field's path, the value, the rule and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from tandem.trainer.config.constraints import HomePath, Pattern, Range, SelectedBy
from tandem.trainer.config.sections import UserError

ParsedClass = TypeVar("ParsedClass")


class FieldError(UserError):
    """A value that does not fit its field. `problem` names the field and the value, `remedy` what to write instead."""

    def __init__(self, problem: str, remedy: str):
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem


def parse_content(dataclass_type: type[ParsedClass], tree: Any, path: Any, remedy: str) -> ParsedClass:
    """Convert the content of a file that a program wrote. `remedy` says how the user gets a right file.

    Raises: UserError that names the file, the field, the value and the rule.
    """
    try:
        parsed: ParsedClass = parse_dataclass(dataclass_type, tree, "")
        return parsed
    except FieldError as error:
        raise UserError(f"{path}: {error.problem.removeprefix(': ')}; {remedy}") from None


def parse_dataclass(dataclass_type: Any, tree: Any, key_path: str) -> Any:
    """Convert a section, or the whole config, into its dataclass. `key_path` is its path in error messages.

    Raises: FieldError for an unknown key, a missing key, or a value of the wrong type or outside its range.
    """
    if not isinstance(tree, dict):
        problem = f"{key_path}: {_short_repr(tree)} is not a section with fields"
        raise FieldError(problem, "the configs that ship are complete files")
    hints, fields = fields_of(dataclass_type)
    prefix = f"{key_path}." if key_path else ""
    for key in tree:
        if key not in fields:
            close_matches = difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"did you mean {close_matches[0]}?" if close_matches else f"the fields are {', '.join(fields)}"
            raise FieldError(f"{prefix}{key}: {_short_repr(tree[key])} is given, but there is no such field", remedy)
    values = {}
    for name, entry in fields.items():
        if name in tree:
            values[name] = tree[name]
        elif _is_required(entry):
            # A section whose fields all have defaults may be left out.
            if not dataclasses.is_dataclass(hints[name]) or any(map(_is_required, dataclasses.fields(hints[name]))):
                raise FieldError(f"{prefix}{name}: is missing", f"add {prefix}{name} to the config")
            values[name] = {}
    parsed = {name: _parse_value(hints[name], value, f"{prefix}{name}") for name, value in values.items()}
    return dataclass_type(**parsed)


@cache
def fields_of(dataclass_type: Any) -> tuple[dict[str, Any], dict[str, dataclasses.Field[Any]]]:
    """Return the annotations and the fields of a dataclass by name."""
    fields = {entry.name: entry for entry in dataclasses.fields(dataclass_type)}
    return get_type_hints(dataclass_type, include_extras=True), fields


def _parse_value(annotation: Any, value: Any, key_path: str) -> Any:
    type_origin, arguments = get_origin(annotation), get_args(annotation)
    if type_origin is Annotated:
        return _parse_annotated(arguments[0], arguments[1:], value, key_path)
    if annotation is Any:
        return value
    if type_origin is Literal:
        if not any(value == each and type(value) is type(each) for each in arguments):
            remedy = f"it must be one of {', '.join(map(str, arguments))}"
            raise FieldError(f"{key_path}: {_short_repr(value)} is not valid; {remedy}", "use one of them")
        return value
    if type_origin is list:
        if not isinstance(value, list):
            raise FieldError(f"{key_path}: {_short_repr(value)} is not a list", "write one entry per line with a dash")
        return [_parse_value(arguments[0], item, f"{key_path}[{index}]") for index, item in enumerate(value)]
    if type_origin is dict:
        if not isinstance(value, dict):
            raise FieldError(f"{key_path}: {_short_repr(value)} is not a mapping", "write one `name: value` per line")
        return _parse_mapping(arguments, value, key_path)
    if type(None) in arguments:
        (present,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _parse_value(present, value, key_path)
    if arguments == (int, float):  # a number that stays as it was written
        annotation = int if type(value) is int else float
    if dataclasses.is_dataclass(annotation):
        return parse_dataclass(annotation, value, key_path)
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise FieldError(f"{key_path}: {_short_repr(value)} does not fit in 64 bits", "use a smaller number")
    if isinstance(value, str) and "\0" in value:
        raise FieldError(f"{key_path}: {_short_repr(value)} contains a NUL character", "remove it")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        # Half a surrogate pair; Python also reads a byte of the command line as one if it is not UTF-8.
        raise FieldError(f"{key_path}: {_short_repr(value)} is not UTF-8 text", "write it in UTF-8")
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not annotation:
        found, wanted = type(value).__name__, annotation.__name__
        examples = {str: f"; quote it: '{value}'", bool: ": true or false", int: ""}
        if annotation is int and isinstance(value, float) and value.is_integer():
            examples[int] = f": {int(value)}"
        remedy = f"write a value of type {wanted}{examples.get(annotation, '')}"
        raise FieldError(f"{key_path}: {_short_repr(value)} is of type {found}", remedy)
    return value


def _parse_mapping(arguments: tuple[Any, ...], mapping: dict[Any, Any], key_path: str) -> dict[str, Any]:
    """Convert a mapping. Keys that YAML takes for numbers become text."""
    parsed: dict[str, Any] = {}
    for key, item in mapping.items():
        name = _parse_value(arguments[0], str(key), f"{key_path}: the key {key!r}")
        if name in parsed:
            raise FieldError(f"{key_path}.{name}: is given twice, once as a number", "remove one of them")
        parsed[name] = _parse_value(arguments[1], item, f"{key_path}.{name}")
    return parsed


def _parse_annotated(annotation: Any, constraints: tuple[Any, ...], value: Any, key_path: str) -> Any:
    for constraint in constraints:
        if isinstance(constraint, SelectedBy):
            annotation = _select_class(constraint, value, key_path)
    parsed = _parse_value(annotation, value, key_path)
    for constraint in constraints:
        if isinstance(constraint, Range | Pattern) and parsed is not None and not constraint.contains(parsed):
            raise FieldError(f"{key_path}: {_short_repr(value)} is not {constraint}", "use a value that is")
        if isinstance(constraint, HomePath) and parsed is not None:
            parsed = constraint.expand(parsed)
            if parsed is None:
                problem = f"{key_path}: {_short_repr(value)} begins with ~, but no such home folder is known"
                raise FieldError(problem, "write the whole path, or ./~ for a file of this name")
    return parsed


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _select_class(selected_by: SelectedBy, value: Any, key_path: str) -> Any:
    name = value.get(selected_by.key) if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in selected_by.classes:
        remedy = f"it must be one of {', '.join(selected_by.classes)}"
        raise FieldError(f"{key_path}.{selected_by.key}: {_short_repr(name)} is not valid", remedy)
    return selected_by.classes[name]


def _short_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
