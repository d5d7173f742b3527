"""Apply overrides of the command line, `section.field=value`, to the plain tree of a config.

The type of the field decides how the value is read. A text field takes what was typed: `run.name=0123`, `run.name="trial #3"`.
Every other value is YAML.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Literal, get_args, get_origin

from tandem.trainer.config.constraints import SelectedBy
from tandem.trainer.config.parsing import fields_of
from tandem.trainer.config.sections import TrainConfig, UserError
from tandem.trainer.config.yaml_file import end_of_value, parse_yaml, yaml_errors

_EXAMPLE = "write section.field=value, for example optim.max_grad_norm=0.5"


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Replace the value of one field in `tree`. Raises: UserError that names the override."""
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise UserError(f"override {override!r}: has no field or no value; {_EXAMPLE}")
    names = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    if not all(names):
        raise UserError(f"override {override!r}: {key!r} is not the path of a field; {_EXAMPLE}")
    parent, name, annotation = _find_field(tree, names, override)
    parent[name] = _read_value(annotation, text, override)


def _find_field(tree: dict[str, Any], names: list[str], override: str) -> tuple[Any, Any, Any]:
    """Return the section or list that contains the field, the field's name or index in it, and its annotation."""
    node: Any = tree
    annotation: Any = TrainConfig
    key_path = ""
    while True:
        if isinstance(node, list):
            if not names[0].isdigit() or int(names[0]) >= len(node):
                found = f"{key_path} has {len(node)} entries, numbered from 0; name one of them"
                raise UserError(f"override {override!r}: {found}")
            name: Any = int(names[0])
        elif get_origin(annotation) is dict and not dataclasses.is_dataclass(get_args(annotation)[1]):
            name, names = ".".join(names), names[:1]  # a source may have a dot in its name
        else:
            name = names[0]
        annotation = _annotation_of(annotation, name, node)
        names = names[1:]
        if not names:
            return node, name, annotation
        key_path = f"{key_path}.{name}".lstrip(".")
        if not isinstance(name, int) and node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict | list):
            raise UserError(f"override {override!r}: {key_path} is {node!r}, not a section; {_EXAMPLE}")
        annotation = _section_class(annotation, node)


def _annotation_of(annotation: Any, name: Any, node: Any) -> Any:
    """Return the annotation of a field, an entry or an element. Any if there is no such field, which parsing reports."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return fields_of(annotation)[0].get(name, Any)
    return get_args(annotation)[-1] if get_origin(annotation) in (list, dict) else Any


def _section_class(annotation: Any, node: Any) -> Any:
    """Return the class of a section: without `None`, and of two classes the one that the section's own key selects."""
    if get_origin(annotation) is Annotated:
        inner, *constraints = get_args(annotation)
        selected = [each for each in constraints if isinstance(each, SelectedBy)]
        if selected:
            chosen = node.get(selected[0].key) if isinstance(node, dict) else None
            return selected[0].classes.get(chosen, Any) if isinstance(chosen, str) else Any
        return _section_class(inner, node)
    present = [each for each in get_args(annotation) if each is not type(None)]
    return present[0] if type(None) in get_args(annotation) and len(present) == 1 else annotation


def _read_value(annotation: Any, text: str, override: str) -> Any:
    is_optional = type(None) in get_args(annotation)
    bare = _section_class(annotation, {})
    if get_origin(bare) is Annotated:
        bare = get_args(bare)[0]
    is_text = bare is str or (get_origin(bare) is Literal and all(isinstance(each, str) for each in get_args(bare)))
    if is_text:
        if is_optional and text in ("", "null", "~"):
            return None
        quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]
        return text[1:-1] if quoted else text
    with yaml_errors(f"override {override!r}"):
        if rest := text[end_of_value(text) :].strip():
            raise UserError(f"{rest!r} would be left out; quote it")
        return parse_yaml(text)
