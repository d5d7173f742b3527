"""The harness on the CPU: what its rows contain, and that no rival is timed that computes something else."""

import itertools
import math
import re
import time
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tandem.kernels.bench import compare, measure
from tandem.kernels.bench.compare import (
    check_agreement,
    measure_rivals,
    rival_function,
    run_forward_backward,
    seeded_example,
)
from tandem.kernels.bench.measure import Ceilings
from tandem.kernels.bench.operation import DIRECTIONS, Example, Operation, Rival, SkipRival, Work
from tandem.kernels.bench.ops import OPERATIONS
from tandem.kernels.bench.ops.attention import document_ids
from tandem.kernels.bench.shapes import Shape
from tests.kernels.bench.smallest import TOKENS, smallest
from tests.rivals.kernels.ops.residual_norm import RESIDUAL_NORM

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e9, 1e12)
COUNTED = {**OPERATIONS, "residual_norm": RESIDUAL_NORM}
EVERY_OPERATION = pytest.mark.parametrize("op", COUNTED.values(), ids=COUNTED)


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@EVERY_OPERATION
def test_a_row_says_all_of_a_measurement(op):
    shape = smallest(op)
    plain = ("ours", "torch")
    found = list(measure_rivals(op, shape, CPU, CEILINGS, lambda name: name in plain))
    assert [row.direction for row in found] == [*DIRECTIONS] * len(found[::3])
    assert {row.rival for row in found} == {rival.name for rival in op.rivals} & set(plain)
    for row in found:
        work = op.work(shape, row.direction, 2)
        assert {name for name, value in asdict(row).items() if value is None} == {"peak_extra_bytes"}
        expected = op.name, shape.name, "bfloat16", "cpu", op.ceiling
        assert (row.op, row.shape, row.dtype, row.device, row.ceiling) == expected
        assert 0 < row.time_p20_us <= row.time_p50_us <= row.time_p80_us
        assert (row.bytes, row.flops, row.executed_flops) == (work.bytes, work.flops, work.executed_flops)
        assert math.isclose(row.gb_per_second, work.bytes / row.time_p50_us / 1e3)
        assert math.isclose(row.tflops_per_second, work.flops / row.time_p50_us / 1e6)
        rate = row.gb_per_second if op.ceiling == "copy" else row.tflops_per_second
        assert math.isclose(row.fraction, rate)


def test_rows_are_in_the_precision_of_the_config():
    op = OPERATIONS["swiglu"]
    shape = next(shape for shape in op.extra_shapes if shape.name == "mup-check tp1").with_tokens(TOKENS)
    found = list(measure_rivals(op, shape, CPU, CEILINGS, lambda name: name == "ours"))
    assert {row.dtype for row in found} == {"float32"}
    assert found[0].bytes == op.forward_work(shape, 4).bytes


@EVERY_OPERATION
def test_bytes_are_those_of_all_inputs_and_results_read_or_written_once(op):
    shape = smallest(op)
    example = seeded_example(op.make_example, shape, CPU)
    first = op.rivals[0]
    found, _, _ = run_forward_backward(rival_function(first, shape, CPU), example)
    outputs, gradients = found[: len(example.out_gradients)], found[len(example.out_gradients) :]
    between = {
        "attention": 4 * example.inputs[0][..., 0].numel(),
        "cross_entropy": 4 * TOKENS,
        "linear_cross_entropy": 4 * TOKENS,
    }
    given, made = nbytes(example.inputs) + between.get(op.name, 0), nbytes(outputs)
    loss = made if "cross_entropy" in op.name else 0  # the mean belongs to the harness
    assert op.forward_work(shape, 2).bytes == given + made - loss
    read = given + nbytes(example.out_gradients) - loss
    if op.name == "attention":
        read += made
    if op.name == "qkv":
        read -= nbytes(outputs[2:])  # values need no second reading
    if op.name == "residual_norm":
        read -= nbytes(example.inputs[:2]) + nbytes(example.inputs[3:]) - nbytes(outputs[:1])  # the sum instead of both
        gradients = gradients[1:]  # the update's is the stream's
    assert op.backward_work(shape, 2).bytes == read + nbytes(gradients)


@pytest.mark.parametrize("name", ["swiglu_linear", "linear_cross_entropy"])
def test_flops_are_those_that_torch_counts(name):
    op = OPERATIONS[name]
    shape = smallest(op)
    example = seeded_example(op.make_example, shape, CPU)
    plain = next(rival for rival in op.rivals if rival.name == "torch").make_function(shape)
    with FlopCounterMode(display=False) as counter:
        output = plain(*example.inputs)
        forward = counter.get_total_flops()
        torch.autograd.grad(output, example.inputs_with_grad, example.out_gradients)
    assert op.forward_work(shape, 2).flops == forward
    assert op.backward_work(shape, 2).flops == counter.get_total_flops() - forward


def test_attention_counts_the_pairs_that_see_each_other():
    op = OPERATIONS["attention"]
    shape = next(shape for shape in op.shapes if shape.document_masking).with_tokens(3_000)
    apart = document_ids(shape, CPU)
    seen = torch.stack([(row[:, None] == row).tril() for row in apart])
    assert 1 < len(apart[0].unique()) < 100
    assert op.forward_work(shape, 2).flops == 4 * int(seen.sum()) * shape.num_heads * shape.head_dim


def squares(rivals: list[Rival]) -> Operation:
    def example(shape, random) -> Example:
        return Example((random.leaf(shape.tokens),), (torch.ones(shape.tokens, dtype=shape.dtype),))

    def work(shape, element_bytes) -> Work:
        return Work(2 * shape.tokens * element_bytes)

    return Operation("square", "copy", example, work, work, rivals, [Shape("tiny", 64)])


class Greedy(torch.autograd.Function):
    """The square; backward writes the gradient over the input."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        ctx.x.data.mul_(2).mul_(gradient)
        return ctx.x.data


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
    notes = {row.rival: row.note for row in measure_rivals(op, op.shapes[0], CPU, CEILINGS)}
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
    assert [(row.rival, row.direction) for row in found] == [
        *(("a", direction) for direction in DIRECTIONS),
        ("b", "all"),
        *(("c", direction) for direction in DIRECTIONS),
    ]
    assert found[3].note == "not measured: MemoryError: as much as there is"
    # Each is checked, then has an uncounted and a counted round; b fails in the next; last comes the memory count.
    told = re.fullmatch("abcaabbccaabbccaabcc((?:aacc)*)aacc", "".join(called))
    assert told is not None, called
    assert found[0].num_repetitions == found[4].num_repetitions == 2 + 2 + len(told[1]) // 2


def test_a_steady_rival_is_called_no_more_often_than_needed(monkeypatch):
    monkeypatch.setattr(measure, "_host_time_us", lambda call, argument: (call(argument), 7.0)[1])
    op = squares([Rival("ours", lambda shape: torch.square, needs_gpu=False)])
    found = list(measure_rivals(op, op.shapes[0], CPU, CEILINGS))
    assert [(row.time_p50_us, row.num_repetitions) for row in found] == [(7, 4), (7, 4), (14, 4)]


def test_both_directions_are_the_sum_for_each_set(monkeypatch):
    given = itertools.cycle([1.0, 2.0, 30.0, 40.0])  # forward with either set, backward with either set
    monkeypatch.setattr(measure, "_host_time_us", lambda call, argument: (call(argument), next(given))[1])
    op = squares([Rival("ours", lambda shape: torch.square, needs_gpu=False)])
    found = list(measure_rivals(op, op.shapes[0], CPU, CEILINGS))
    assert [(row.time_p20_us, row.time_p80_us) for row in found] == [(1, 2), (30, 40), (31, 42)]


def test_nothing_is_begun_after_the_deadline(monkeypatch):
    """A late shape gets one row, a late rival gets its row, and what has started is measured."""
    op = squares([Rival(name, lambda shape: torch.square, needs_gpu=False) for name in ("a", "b", "c")])
    late = list(measure_rivals(op, op.shapes[0], CPU, CEILINGS, deadline=time.monotonic()))
    assert [(row.rival, row.direction, row.note) for row in late] == [("all", "all", "not measured: out of time")]
    clock = itertools.count()
    monkeypatch.setattr(compare.time, "monotonic", lambda: next(clock))
    some = list(measure_rivals(op, op.shapes[0], CPU, CEILINGS, deadline=2))
    assert [(row.rival, row.direction) for row in some] == [*(("a", d) for d in DIRECTIONS), ("b", "all"), ("c", "all")]
    assert [row.note for row in some[-2:]] == ["not measured: out of time"] * 2


def test_who_overwrites_its_inputs_is_named_and_spoils_no_others():
    op = squares(
        [
            Rival("greedy", lambda shape: Greedy.apply, needs_gpu=False),
            Rival("ours", lambda shape: torch.square, needs_gpu=False),
        ]
    )
    notes = {row.rival: row.note for row in measure_rivals(op, op.shapes[0], CPU, CEILINGS)}
    assert notes == {"greedy": "overwrites its inputs", "ours": ""}


def test_a_difference_of_one_rounding_is_none_and_of_a_hundredth_is_one():
    x = torch.linspace(1, 2, 100)
    check_agreement(("ours", [x]), [x.bfloat16()])
    with pytest.raises(SkipRival, match=r"result 0 differs from that of ours by 0\.02"):
        check_agreement(("ours", [x]), [1.02 * x])
