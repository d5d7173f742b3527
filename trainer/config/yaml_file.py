"""Read a YAML file into plain dicts, lists and scalars, strictly. The file must be UTF-8.

Scalars are those of YAML 1.2's core schema: YAML 1.1 would read `no` as false, `0123` as 83, `1:30` as 90 and `3e-4` as text.
Decimal integers may contain underscores. A key is the text that was written, and may not be written twice in a mapping.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from tandem.trainer.config.outside import read_file
from tandem.trainer.config.sections import UserError

MAX_YAML_BYTES = 1 << 20
"""Largest file. The shipped configs take 4 KB."""
MAX_EXPANDED_VALUES = 1 << 24
"""Largest number of values after aliases are replaced, and largest number of characters after interpolations are."""
_INTEGER = "[-+]?(0|[1-9][0-9_]*)"
_FLOAT = rf"{_INTEGER}\.[0-9_]*([eE][-+]?[0-9]+)?|{_INTEGER}[eE][-+]?[0-9]+|[-+]?\.[0-9]+([eE][-+]?[0-9]+)?"
_IMPLICIT_TYPES = {
    "null": ("null|Null|NULL|~|", ["~", "n", "N", ""]),
    "bool": ("true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (_INTEGER, list("-+0123456789")),
    "float": (rf"{_FLOAT}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+0123456789.")),
    "merge": ("<<", ["<"]),
}
"""Type of an unquoted scalar -> its form, and the characters with which it can begin. Source: YAML 1.2.2, section 10.3."""
_BYTE_ORDER_MARKS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  (PyYAML reads it from the class)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first_lines: dict[str, int] = {}
        for key, _value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"line {key.start_mark.line + 1}: a key is a list or a mapping; write a name")
            if key.value in first_lines:
                lines = f"lines {first_lines[key.value]} and {key.start_mark.line + 1}"
                raise UserError(f"{lines}: both give {key.value}; remove one of them")
            first_lines[key.value] = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


for _name, (_form, _first_characters) in _IMPLICIT_TYPES.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_form})$"), _first_characters)
for _name in ("binary", "timestamp", "omap", "pairs", "set"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _Loader.construct_undefined)


def read_yaml(path: Path) -> Any:
    """Read a YAML file. Raises: UserError naming the file and the fault."""
    content = read_file(path, MAX_YAML_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = _BYTE_ORDER_MARKS.get(content[:2], f"not UTF-8: byte {error.start} is {content[error.start]:#04x}")
        raise UserError(f"{path}: is {encoding}; save the file as UTF-8") from None
    with yaml_errors(path):
        return parse_yaml(text)


def parse_yaml(text: str) -> Any:
    """Parse YAML. Raises: UserError without the file's name, or PyYAML's errors; see `yaml_errors`."""
    if "\0" in text:  # PyYAML takes it for the end of the text
        raise UserError("contains a NUL byte, so it is not a text file; save the file as UTF-8")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if _count_values(node, {}) > MAX_EXPANDED_VALUES:
            raise UserError("has aliases (*name) that multiply its size without bounds; write the values out")
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def end_of_value(text: str) -> int:
    """Return the index after the value that a text of YAML begins with. A comment can follow."""
    node = yaml.compose(text, Loader=_Loader)
    return 0 if node is None else int(node.end_mark.index)


@contextmanager
def yaml_errors(subject: str | Path) -> Iterator[None]:
    """Raises: UserError that begins with the subject, instead of an error of PyYAML or one without a subject."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{subject}: {error}") from None
    except RecursionError:
        raise UserError(f"{subject}: is nested too deeply; correct the file or the override") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of too many digits
        raise UserError(f"{subject}: is not valid YAML ({one_line(error)}); correct it") from None


def one_line(error: Exception) -> str:
    """Return the text of an error on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def _count_values(node: yaml.Node | None, counts: dict[int, int]) -> int:
    """Count the values below a node, those below an alias each time that it is used."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counts:
        children = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]
