"""The harness, on the CPU: what its rows say, and that nobody is timed who computes something else.

To be seen on a GPU alone: what is in `UNMEASURABLE`, and the values of what is in `ARGUMENTS_IN_PYTHON`.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.util import find_spec

import pytest
import torch
import triton
from torch.utils.flop_counter import FlopCounterMode

from tandem.kernels.bench import compare, measure, single_rank
from tandem.kernels.bench.compare import (
    check_agreement,
    measure_rivals,
    rival_function,
    run_forward_backward,
    seeded_example,
)
from tandem.kernels.bench.documents import document_ids
from tandem.kernels.bench.measure import Ceilings
from tandem.kernels.bench.operation import DIRECTIONS, Example, Operation, Rival, SkipRival, Work
from tandem.kernels.bench.ops import OPERATIONS
from tandem.kernels.bench.ops import attention as attention_rivals
from tandem.kernels.bench.shapes import ResidualShape

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e9, 1e12)
TOKENS = 8
SMALLEST = {"qkv": "demo-stablelm 128 tp1", "attention": "mup-check 128 tp1", "residual_norm": "mup-check"}
EVERY_OPERATION = pytest.mark.parametrize("op", OPERATIONS.values(), ids=OPERATIONS)
UNMEASURABLE = {
    "flash-attn", "flex, flash-attn 4", "liger CuTe", "megatron rope", "sdpa cudnn", "flex", "our kernel", "varlen_attn",
}  # fmt: skip
"""Not installed, or nothing without a GPU, or nothing at the shape; flex has a forward pass without one, which is compared, and
varlen_attn runs on the meta device."""
ARGUMENTS_IN_PYTHON = {"liger", "liger, halves apart", "torch, liger norm", "liger fused buffer"}
"""Their kernels take a number for a tensor, or compute in bf16: the interpreter can do neither, so they are compiled only."""


def smallest(op: Operation, dtype: torch.dtype = torch.bfloat16):
    """In the precision of the real runs, which is not that of the smallest config."""
    name = SMALLEST.get(op.name, "mup-check tp1")
    return replace(next(shape for shape in op.extra_shapes if shape.name == name).with_tokens(TOKENS), dtype=dtype)


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.fixture
def eager():
    """What is compiled runs as it was written; who wants ranks gets one."""
    with torch.compiler.set_stance("force_eager"):
        yield
    single_rank.destroy_group()


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
        assert (row.op, row.shape, row.dtype, row.device, row.ceiling) == (
            op.name,
            shape.name,
            "bfloat16",
            "cpu",
            op.ceiling,
        )
        assert 0 < row.time_p20_us <= row.time_p50_us <= row.time_p80_us
        assert (row.bytes, row.flops, row.executed_flops) == (work.bytes, work.flops, work.executed_flops)
        assert math.isclose(row.gb_per_second, work.bytes / row.time_p50_us / 1e3)
        assert math.isclose(row.tflops_per_second, work.flops / row.time_p50_us / 1e6)
        rate = row.gb_per_second if op.ceiling == "copy" else row.tflops_per_second
        assert math.isclose(row.fraction, rate)


@EVERY_OPERATION
def test_every_rival_computes_the_same_as_ours(op, eager):
    """In Triton's interpreter, so that no figure is lost on a GPU to a wrong argument; but for the names above."""
    shape, reference = smallest(op), None
    example = seeded_example(op.make_example, shape, CPU)
    for rival in op.rivals:
        if rival.name in UNMEASURABLE or (rival.name in ARGUMENTS_IN_PYTHON and "cross_entropy" not in op.name):
            continue
        if rival.needs_gpu and not triton.knobs.runtime.interpret:
            continue  # beside a GPU kernels are compiled, and tensors on the CPU are not for them
        if "liger" in rival.name and find_spec("liger_kernel") is None:
            continue
        if rival.substitute_shape(shape) == shape:
            found, _, _ = run_forward_backward(rival_function(rival, shape, CPU), example)
            check_agreement(reference, found)
            reference = reference or (rival.name, found)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("documented", [False, True], ids=["biases", "documents and groups"])
def test_flex_is_given_the_biases_and_documents_that_ours_is(documented, eager):
    op = OPERATIONS["attention"]
    name = "demo-stablelm 128 tp1" if documented else "demo-btlm 128 tp1"
    shape = replace(next(shape for shape in op.extra_shapes if shape.name == name), tokens=1_500, batch_size=2)
    inputs = [x.detach() for x in seeded_example(op.make_example, shape, CPU).inputs]
    apart = document_ids(shape, CPU)
    assert (apart is not None and bool(apart.any())) == documented
    found = {rival.name: rival.make_function(shape)(*inputs) for rival in op.rivals if rival.name in ("ours", "flex")}
    check_agreement(("ours", [found["ours"]]), [found["flex"]])


@pytest.mark.parametrize("model", ["stablelm-2-12b", "stablelm-2-1_6b"])
def test_varlen_takes_documents_of_grouped_and_other_heads(model):
    """On the meta device: arguments, and the shapes of results and gradients."""
    op = OPERATIONS["attention"]
    shape = next(shape for shape in op.shapes if shape.name == f"{model} 4096 tp1")
    rival = next(rival for rival in op.rivals if rival.name == "varlen_attn")
    query, key, value = inputs = [
        torch.empty(
            shape.batch_size, shape.tokens, count, shape.head_dim, dtype=shape.dtype, device="meta", requires_grad=True
        )
        for count in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    ]
    out = rival.make_function(shape)(*inputs)
    gradients = torch.autograd.grad(out, inputs, torch.empty_like(out))
    assert [x.shape for x in (out, *gradients)] == [x.shape for x in (query, query, key, value)]


def test_documents_lie_behind_one_another_as_the_rows_have_them():
    shape = replace(
        next(shape for shape in OPERATIONS["attention"].shapes if shape.document_masking), tokens=3_000, batch_size=2
    )
    longest, ends = attention_rivals._max_and_cu_seqlens(shape)
    bounds = ends(CPU)
    apart = (document_ids(shape, CPU) + torch.tensor([[0], [10_000]])).flatten()
    changes = (apart[1:] != apart[:-1]).nonzero().flatten() + 1
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, *changes.tolist(), 6_000]
    assert longest == int(bounds.diff().max())


def test_varlen_is_for_documents_alone():
    op = OPERATIONS["attention"]
    for name, reason in (("btlm-3b-8k 2048 tp1", "has no biases"), ("flash 2048 hd64", "is the kernel of sdpa flash")):
        shape = next(shape for shape in op.shapes if shape.name == name)
        with pytest.raises(SkipRival, match=reason):
            next(rival for rival in op.rivals if rival.name == "varlen_attn").make_function(shape)


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="Liger is not installed")
def test_what_cannot_be_interpreted_takes_its_arguments_and_compiles():
    """In a process where Triton compiles: shapes of results and gradients, on the meta device."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = "from tests.kernels.bench.rival_shapes import print_rival_shapes; print_rival_shapes()"
    command = [sys.executable, "-W", "ignore", "-c", program, str(TOKENS), *sorted(ARGUMENTS_IN_PYTHON)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert {line["rival"] for line in lines} == ARGUMENTS_IN_PYTHON
    assert {line["op"] for line in lines} == {"swiglu", "swiglu_linear", "residual_norm"}
    for line in lines:
        assert line["found"] == line["expected"], line
    assert sum(line["kernels"] for line in lines) >= 2 * 3  # both directions of both swiglus and the norm, each once


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
    loss = made if "cross_entropy" in op.name else 0  # the mean is the harness's, not the operation's
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
    def example(shape, device, dtype, generator) -> Example:
        x = torch.randn(shape.tokens, device=device, dtype=dtype, generator=generator)
        return Example((x.requires_grad_(),), (torch.ones(shape.tokens, dtype=dtype),))

    def work(shape, element_bytes) -> Work:
        return Work(2 * shape.tokens * element_bytes)

    return Operation("square", "copy", [ResidualShape("tiny", 64, 1)], [], example, work, work, rivals)


class Greedy(torch.autograd.Function):
    """The square, whose gradient is written over the input."""

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

    monkeypatch.setattr(measure, "MAX_STEADY_SPREAD", -1.0)  # nobody is, so that all have their time
    op = squares([noted("a"), noted("b", failing_at=6), noted("c")])
    found = list(measure_rivals(op, op.shapes[0], CPU, CEILINGS))
    assert [(row.rival, row.direction) for row in found] == [
        *(("a", direction) for direction in DIRECTIONS),
        ("b", "all"),
        *(("c", direction) for direction in DIRECTIONS),
    ]
    assert found[3].note == "not measured: MemoryError: as much as there is"
    # Each is checked, has a round that is not counted and one that is; b fails in the next; last comes the count of memory.
    told = re.fullmatch("abcaabbccaabbccaabcc((?:aacc)*)ac", "".join(called))
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
    """A shape whose turn comes too late is one row, a rival that is late keeps its row, and who has begun is measured."""
    op = squares([Rival(name, lambda shape: torch.square, needs_gpu=False) for name in ("a", "b", "c")])
    late = list(measure_rivals(op, op.shapes[0], CPU, CEILINGS, deadline=time.monotonic()))
    assert [(row.rival, row.direction, row.note) for row in late] == [
        ("all", "all", "not measured: left out, time was over")
    ]
    clock = itertools.count()
    monkeypatch.setattr(compare.time, "monotonic", lambda: next(clock))
    some = list(measure_rivals(op, op.shapes[0], CPU, CEILINGS, deadline=2))
    assert [(row.rival, row.direction) for row in some] == [*(("a", d) for d in DIRECTIONS), ("b", "all"), ("c", "all")]
    assert [row.note for row in some[-2:]] == ["not measured: left out, time was over"] * 2


def test_a_kernel_of_ours_is_not_named_where_none_runs():
    op = OPERATIONS["attention"]
    for name, reason in (("demo-btlm 128 tp1", "ours is this kernel already"), ("flash 2048 hd64", "needs a GPU")):
        shape = next(shape for shape in op.shapes + op.extra_shapes if shape.name == name).with_tokens(TOKENS)
        found = list(measure_rivals(op, shape, CPU, CEILINGS, lambda name: name == "our kernel"))
        assert [row.time_p50_us for row in found] == [None]
        assert found[0].note.startswith("not measured: ")
        assert found[0].note.endswith(reason)


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
