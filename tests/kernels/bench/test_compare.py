"""The harness on the CPU: what its rows contain, and that nothing is timed that computes something else."""

import itertools
import math
import time
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tandem.kernels.bench import measure
from tandem.kernels.bench.compare import (
    DIRECTIONS,
    NotMeasured,
    check_agreement,
    measure_shape,
    run_forward_backward,
    seeded_example,
)
from tandem.kernels.bench.ops import OPERATIONS, document_ids
from tests.kernels.bench.smallest import TOKENS, smallest
from tests.kernels.bench.square import CEILINGS, CPU, Square, overwriting_square
from tests.rivals.kernels.ops.residual_norm import RESIDUAL_NORM

COUNTED = {**OPERATIONS, "residual_norm": RESIDUAL_NORM}


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("op", OPERATIONS.values(), ids=OPERATIONS)
def test_a_row_says_all_of_a_measurement(op):
    shape = smallest(op)
    found = list(measure_shape(op, shape, CPU, CEILINGS))
    assert [(row["rival"], row["direction"]) for row in found] == list(
        itertools.product(op.implementations, DIRECTIONS)
    )
    for row in found:
        forward, backward = op.work(shape)
        both = [sum(pair) for pair in zip(forward, backward, strict=True)]
        work = dict(zip(DIRECTIONS, (forward, backward, both), strict=True))[row["direction"]]
        assert {name for name, value in row.items() if value is None} == {"peak_extra_bytes"}
        expected = op.name, shape.name, "bfloat16", "cpu", op.ceiling
        assert (row["op"], row["shape"], row["dtype"], row["device"], row["ceiling"]) == expected
        assert 0 < row["time_p20_us"] <= row["time_p50_us"] <= row["time_p80_us"]
        assert [row["bytes"], row["flops"], row["executed_flops"]] == list(work)
        assert math.isclose(row["gb_per_second"], row["bytes"] / row["time_p50_us"] / 1e3)
        assert math.isclose(row["tflops_per_second"], row["flops"] / row["time_p50_us"] / 1e6)
        rate = row["gb_per_second"] if op.ceiling == "copy" else row["tflops_per_second"]
        assert math.isclose(row["fraction"], rate)


def test_rows_are_in_the_precision_of_the_config():
    op = OPERATIONS["swiglu"]
    shape = next(shape for shape in op.extra_shapes if shape.name == "mup-check tp1").with_tokens(TOKENS)
    found = list(measure_shape(op, shape, CPU, CEILINGS, "ours"))
    assert {row["dtype"] for row in found} == {"float32"}
    assert found[0]["bytes"] == op.work(shape)[0].bytes == 3 * 4 * TOKENS * shape.ffn_hidden_size


@pytest.mark.parametrize("op", COUNTED.values(), ids=COUNTED)
def test_bytes_are_those_of_all_inputs_and_results_read_or_written_once(op):
    shape = smallest(op)
    example = seeded_example(op.make_example, shape, CPU)
    first = next(iter(op.implementations.values()))
    found = run_forward_backward(first(shape), example)
    outputs, gradients = found[: len(example.out_gradients)], found[len(example.out_gradients) :]
    between = {
        "attention": 4 * example.inputs[0][..., 0].numel(),
        "cross_entropy": 4 * TOKENS,
        "linear_cross_entropy": 4 * TOKENS,
    }
    given, made = nbytes(example.inputs) + between.get(op.name, 0), nbytes(outputs)
    loss = made if "cross_entropy" in op.name else 0  # the mean belongs to the harness
    assert op.work(shape)[0].bytes == given + made - loss
    read = given + nbytes(example.out_gradients) - loss
    if op.name == "attention":
        read += made
    if op.name == "qkv":
        read -= nbytes(outputs[2:])  # values need no second reading
    if op.name == "residual_norm":
        read -= nbytes(example.inputs[:2]) + nbytes(example.inputs[3:]) - nbytes(outputs[:1])  # the sum instead of both
        gradients = gradients[1:]  # the update's is the stream's
    assert op.work(shape)[1].bytes == read + nbytes(gradients)


@pytest.mark.parametrize("name", ["swiglu_linear", "linear_cross_entropy"])
def test_flops_are_those_that_torch_counts(name):
    op = OPERATIONS[name]
    shape = smallest(op)
    example = seeded_example(op.make_example, shape, CPU)
    plain = op.plain(shape)
    with FlopCounterMode(display=False) as counter:
        output = plain(*example.inputs)
        forward = counter.get_total_flops()
        torch.autograd.grad(output, example.inputs_with_grad, example.out_gradients)
    assert op.work(shape)[0].flops == forward
    assert op.work(shape)[1].flops == counter.get_total_flops() - forward


def test_attention_counts_the_pairs_that_see_each_other():
    op = OPERATIONS["attention"]
    shape = next(shape for shape in op.shapes if shape.document_masking).with_tokens(3_000)
    apart = document_ids(shape, CPU)
    seen = torch.stack([(row[:, None] == row).tril() for row in apart])
    assert 1 < len(apart[0].unique()) < 100
    assert op.work(shape)[0].flops == 4 * int(seen.sum()) * shape.num_heads * shape.head_dim


def test_what_differs_or_fails_has_a_row_with_the_reason():
    def failing(shape):
        raise ImportError("no such package\nand more")

    op = Square(
        {
            "ours": lambda shape: torch.square,
            "another gradient": lambda shape: lambda x: x.square() + (x - x.detach()),
            "not a number": lambda shape: lambda x: (x - 9).sqrt(),
            "missing": failing,
            "same": lambda shape: lambda x: x * x,
        }
    )
    notes = {row["rival"]: row["note"] for row in measure_shape(op, op.shapes[0], CPU, CEILINGS)}
    assert notes["ours"] == notes["same"] == ""
    assert notes["another gradient"].startswith("not measured: result 1 differs from that of ours by ")
    assert notes["not a number"] == "not measured: a result is not finite"
    assert notes["missing"] == "not measured: ImportError: no such package"


def test_what_fails_while_its_memory_is_measured_leaves_the_other_its_figures(monkeypatch):
    calls = []

    def peak_extra_bytes(call, device):
        calls.append(call)
        if len(calls) == 2:  # backward of ours
            raise MemoryError("as much as there is")

    monkeypatch.setattr(measure, "peak_extra_bytes", peak_extra_bytes)
    op = Square({"ours": lambda shape: torch.square, "torch": lambda shape: torch.square})
    rows = list(measure_shape(op, op.shapes[0], CPU, CEILINGS))
    assert [(row["rival"], row["direction"]) for row in rows] == [*(("torch", d) for d in DIRECTIONS), ("ours", "all")]
    assert [row["note"] for row in rows] == ["", "", "", "not measured: MemoryError: as much as there is"]


def test_no_implementation_starts_after_the_deadline(monkeypatch):
    monkeypatch.setattr(time, "monotonic", partial(next, itertools.count()))
    op = Square({"ours": lambda shape: torch.square, "torch": lambda shape: torch.square})
    notes = {row["rival"]: row["note"] for row in measure_shape(op, op.shapes[0], CPU, CEILINGS, deadline=2)}
    assert notes == {"ours": "", "torch": "not measured: out of time"}


def test_what_fails_in_a_turn_leaves_the_other_its_figures():
    calls = []

    def square(x):
        calls.append(x)
        if len(calls) == 4:
            raise MemoryError("as much as there is")
        return x.square()

    op = Square({"ours": lambda shape: torch.square, "torch": lambda shape: square})
    found = list(measure_shape(op, op.shapes[0], CPU, CEILINGS))
    assert [(row["rival"], row["direction"]) for row in found] == [*(("ours", d) for d in DIRECTIONS), ("torch", "all")]
    assert found[-1]["note"] == "not measured: MemoryError: as much as there is"
    assert found[-1]["time_p50_us"] is None


def test_ours_is_compared_with_and_not_timed_if_only_the_other_is_asked_for():
    op = Square({"ours": lambda shape: torch.sin, "torch": lambda shape: torch.square})
    found = list(measure_shape(op, op.shapes[0], CPU, CEILINGS, "torch"))
    assert [row["note"][:50] for row in found] == ["not measured: result 0 differs from that of ours b"]


def test_inputs_that_backward_overwrites_are_restored():
    seen = []

    def noted(x):
        seen.append(x.detach().clone())
        return overwriting_square(x)

    op = Square({"ours": lambda shape: noted, "torch": lambda shape: torch.square})
    notes = {row["note"] for row in measure_shape(op, op.shapes[0], CPU, CEILINGS)}
    assert notes == {""}
    num_peaks = len(DIRECTIONS)  # they come last
    assert len(seen) > 10
    assert all(torch.equal(x, seen[0]) for x in seen[: -num_peaks + 1])


def test_a_steady_function_is_called_no_more_often_than_needed(monkeypatch):
    monkeypatch.setattr(measure, "_host_time_us", lambda call, argument: (call(argument), 7.0)[1])
    op = Square({"ours": lambda shape: torch.square})
    found = list(measure_shape(op, op.shapes[0], CPU, CEILINGS))
    assert [(row["time_p50_us"], row["num_repetitions"]) for row in found] == [(7, 4), (7, 4), (14, 4)]


def test_both_directions_are_the_sum_for_each_set(monkeypatch):
    given = itertools.cycle([1.0, 2.0, 30.0, 40.0])  # forward with either set, backward with either set
    monkeypatch.setattr(measure, "_host_time_us", lambda call, argument: (call(argument), next(given))[1])
    op = Square({"ours": lambda shape: torch.square})
    found = list(measure_shape(op, op.shapes[0], CPU, CEILINGS))
    assert [(row["time_p20_us"], row["time_p80_us"]) for row in found] == [(1, 2), (30, 40), (31, 42)]


def test_nothing_starts_after_the_deadline():
    op = Square({"ours": lambda shape: torch.square})
    [row] = measure_shape(op, op.shapes[0], CPU, CEILINGS, deadline=time.monotonic())
    assert (row["rival"], row["direction"], row["note"]) == ("all", "all", "not measured: out of time")


def test_a_difference_of_one_rounding_is_none_and_of_a_hundredth_is_one():
    x = torch.linspace(1, 2, 100)
    check_agreement(("ours", [x]), [x.bfloat16()])
    with pytest.raises(NotMeasured, match=r"result 0 differs from that of ours by 0\.02"):
        check_agreement(("ours", [x]), [1.02 * x])
