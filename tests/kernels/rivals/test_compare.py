"""The harness of the rivals on the CPU: they take turns, and one that fails or spoils its inputs costs the others nothing."""

import itertools
import math
import re
import time
from dataclasses import replace

import torch

from tandem.kernels.bench import measure
from tandem.kernels.bench.compare import DIRECTIONS
from tests.kernels.bench.square import CEILINGS, CPU, Square, overwriting_square
from tests.rivals.kernels import compare
from tests.rivals.kernels.compare import measure_rivals
from tests.rivals.kernels.operation import ContestedOperation, Rival


def squares(rivals: list[Rival]) -> ContestedOperation:
    op = Square({})
    op.extra_shapes = []
    return ContestedOperation(op, rivals)


def failing(shape):
    raise ImportError("no such package\nand more")


def test_who_differs_fails_or_is_missing_has_a_row_with_the_reason():
    op = squares(
        [
            Rival("ours", lambda shape: torch.square, needs_gpu=False),
            Rival("another gradient", lambda shape: lambda x: x.square() + (x - x.detach()), needs_gpu=False),
            Rival("not a number", lambda shape: lambda x: (x - 9).sqrt(), needs_gpu=False),
            Rival("missing", failing, needs_gpu=False),
            Rival(
                "sine",
                lambda shape: torch.sin,
                needs_gpu=False,
                deviation="a sine",
                substitute_shape=lambda s: replace(s, tokens=9),
            ),
            Rival("same", lambda shape: lambda x: x * x, needs_gpu=False),
        ]
    )
    notes = {row["rival"]: row["note"] for row in measure_rivals(op, op.shapes[0], CPU, CEILINGS)}
    assert notes["ours"] == notes["same"] == ""
    assert notes["another gradient"].startswith("not measured: result 1 differs from that of ours by ")
    assert notes["not a number"] == "not measured: a result is not finite"
    assert notes["missing"] == "not measured: ImportError: no such package"
    assert notes["sine"] == "a sine"


def test_rivals_take_turns_and_who_fails_in_one_leaves_the_others_theirs(monkeypatch):
    called = []

    def noted(name, failing_at=math.inf):
        def square(x):
            called.append(name)
            if called.count(name) == failing_at:
                raise MemoryError("as much as there is")
            return x.square()

        return Rival(name, lambda shape: square, needs_gpu=False)

    monkeypatch.setattr(measure, "MAX_STEADY_SPREAD", -1.0)  # none is steady, so all use their full time
    op = squares([noted("a"), noted("b", failing_at=6), noted("c")])
    found = list(measure_rivals(op, op.shapes[0], CPU, CEILINGS))
    assert [(row["rival"], row["direction"]) for row in found] == [
        *(("a", direction) for direction in DIRECTIONS),
        ("b", "all"),
        *(("c", direction) for direction in DIRECTIONS),
    ]
    assert found[3]["note"] == "not measured: MemoryError: as much as there is"
    # Each is checked, then has an uncounted and a counted round; b fails in the next; last comes the memory count.
    told = re.fullmatch("abcaabbccaabbccaabcc((?:aacc)*)aacc", "".join(called))
    assert told is not None, called
    assert found[0]["num_repetitions"] == found[4]["num_repetitions"] == 2 + 2 + len(told[1]) // 2


def test_nothing_is_begun_after_the_deadline(monkeypatch):
    """A late shape gets one row, a late rival gets its row, and what has started is measured."""
    op = squares([Rival(name, lambda shape: torch.square, needs_gpu=False) for name in ("a", "b", "c")])
    late = list(measure_rivals(op, op.shapes[0], CPU, CEILINGS, deadline=time.monotonic()))
    assert [(row["rival"], row["direction"], row["note"]) for row in late] == [
        ("all", "all", "not measured: out of time")
    ]
    clock = itertools.count()
    monkeypatch.setattr(compare.time, "monotonic", lambda: next(clock))
    some = list(measure_rivals(op, op.shapes[0], CPU, CEILINGS, deadline=2))
    assert [(row["rival"], row["direction"]) for row in some] == [
        *(("a", d) for d in DIRECTIONS),
        ("b", "all"),
        ("c", "all"),
    ]
    assert [row["note"] for row in some[-2:]] == ["not measured: out of time"] * 2


def test_who_overwrites_its_inputs_is_named_and_spoils_no_others():
    op = squares(
        [
            Rival("greedy", lambda shape: overwriting_square, needs_gpu=False),
            Rival("ours", lambda shape: torch.square, needs_gpu=False),
        ]
    )
    notes = {row["rival"]: row["note"] for row in measure_rivals(op, op.shapes[0], CPU, CEILINGS)}
    assert notes == {"greedy": "overwrites its inputs", "ours": ""}
