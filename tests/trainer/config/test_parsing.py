"""Trees from files become dataclasses only if every value has the type and the range of its field."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from tandem.trainer.config import UserError, parse_content
from tandem.trainer.config.constraints import COUNT, SHA256, Range


@dataclass(frozen=True)
class Inner:
    sha256: Annotated[str, SHA256]


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, COUNT]
    share: Annotated[float | None, Range(above=0, below=1)] = None
    stage: Literal[0, 1] = 0
    named: dict[str, Annotated[int, COUNT]] = field(default_factory=dict)
    inner: list[Inner] = field(default_factory=list)


def parsed(**tree) -> Outer:
    return parse_content(Outer, {"count": 1} | tree, "folder/file.json", "restore it")


def test_values_within_their_ranges_are_taken_as_they_are():
    assert parsed(count=0, share=0.5, stage=1, named={"a": 2, 3: 4}, inner=[{"sha256": "a" * 64}]) == Outer(
        0, 0.5, 1, {"a": 2, "3": 4}, [Inner("a" * 64)]
    )
    assert parsed(share=None) == Outer(1)


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"count": -1}, "count: -1 is not a finite number at least 0"),
        ({"count": 1 << 63}, "count: 9223372036854775808 does not fit in 64 bits"),
        ({"count": True}, "count: True is of type bool"),
        ({"count": 1.0}, "count: 1.0 is of type float"),
        ({"share": 1}, "share: 1 is not a finite number above 0 and below 1"),
        ({"share": float("nan")}, "share: nan is not a finite number above 0 and below 1"),
        ({"stage": 1.0}, "stage: 1.0 is not valid; it must be one of 0, 1"),
        ({"stage": True}, "stage: True is not valid; it must be one of 0, 1"),
        ({"named": {1: 2, "1": 3}}, "named.1: is given twice, once as a number"),
        ({"named": {"a": -1}}, "named.a: -1 is not a finite number at least 0"),
        ({"named": {"a\0": 1}}, r"named: the key 'a\x00': 'a\x00' contains a NUL character"),
        ({"named": {"caf\udce9": 1}}, r"named: the key 'caf\udce9': 'caf\udce9' is not UTF-8 text"),
        ({"inner": [{"sha256": "\ud800"}]}, r"inner[0].sha256: '\ud800' is not UTF-8 text"),
        ({"inner": [{"sha256": "a" * 63}]}, f"inner[0].sha256: {'a' * 63!r:.57}... is not a SHA-256 in hexadecimal"),
        ({"inner": [{"sha256": "a" * 64 + "\n"}]}, f"inner[0].sha256: {'a' * 63!r:.57}... is not a SHA-256 in hexadecimal"),
        ({"inner": [{}]}, "inner[0].sha256: is missing"),
        ({"inner": {}}, "inner: {} is not a list"),
        ({"named": []}, "named: [] is not a mapping"),
        ({"other": 1}, "other: 1 is given, but there is no such field"),
    ],
)  # fmt: skip
def test_every_other_value_is_refused_in_one_line_that_names_file_and_field(tree, problem):
    with pytest.raises(UserError) as caught:
        parsed(**tree)
    assert str(caught.value) == f"folder/file.json: {problem}; restore it"


@pytest.mark.parametrize("tree", [None, [], 1, "text"])
def test_a_tree_that_is_no_section_is_refused(tree):
    with pytest.raises(UserError, match=r"^file: .* is not a section with fields; restore it$"):
        parse_content(Outer, tree, "file", "restore it")
