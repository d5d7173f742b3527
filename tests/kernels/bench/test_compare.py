"""The harness, on the CPU: what its rows say, and that nobody is timed who computes something else."""

import math
from dataclasses import asdict, replace
from importlib.util import find_spec

import pytest
import torch
import triton
from torch.utils.flop_counter import FlopCounterMode

from kernels.bench import one_rank
from kernels.bench.compare import Refused, agree, example_of, function_of, results, rows
from kernels.bench.measure import Ceilings
from kernels.bench.operation import DIRECTIONS, Example, Operation, Rival, Work
from kernels.bench.ops import OPERATIONS
from kernels.bench.ops.attention import documents
from kernels.bench.shapes import Stream

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e9, 1e12)
TOKENS = 8
SMALLEST = {"qkv": "demo-stablelm 128 tp1", "attention": "mup-check 128 tp1", "residual_norm": "mup-check"}
EVERY_OPERATION = pytest.mark.parametrize("op", OPERATIONS.values(), ids=OPERATIONS)
UNMEASURABLE = {"flash-attn", "liger CuTe", "megatron rope", "sdpa cudnn", "flex", "our kernel"}
"""Not installed, or nothing without a GPU, or nothing at the shape."""
ARGUMENTS_IN_PYTHON = {"liger", "liger, halves apart", "torch, liger norm", "liger fused buffer"}
"""Their kernels take a number for a tensor, or compute in bf16: the interpreter can do neither."""


def smallest(op: Operation):
    name = SMALLEST.get(op.name, "mup-check tp1")
    return next(shape for shape in op.more_shapes if shape.name == name).with_tokens(TOKENS)


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.fixture
def eager():
    """What is compiled runs as it was written; who wants ranks gets one."""
    with torch.compiler.set_stance("force_eager"):
        yield
    one_rank.end()


@EVERY_OPERATION
def test_a_row_says_all_of_a_measurement(op):
    shape = smallest(op)
    plain = ("ours", "torch")
    found = list(rows(op, shape, CPU, CEILINGS, lambda name: name in plain))
    assert [row.direction for row in found] == [*DIRECTIONS] * len(found[::3])
    assert {row.rival for row in found} == {rival.name for rival in op.rivals} & set(plain)
    for row in found:
        work = op.work(shape, row.direction, 2)
        assert {name for name, value in asdict(row).items() if value is None} == {"peak_extra_bytes"}
        assert (row.op, row.shape, row.dtype, row.card, row.ceiling) == (
            op.name,
            shape.name,
            "bfloat16",
            "cpu",
            op.ceiling,
        )
        assert 0 < row.time_us_20 <= row.time_us_50 <= row.time_us_80
        assert (row.bytes, row.flops, row.executed_flops) == (work.bytes, work.flops, work.executed_flops)
        assert math.isclose(row.gb_per_second, work.bytes / row.time_us_50 / 1e3)
        assert math.isclose(row.tflops_per_second, work.flops / row.time_us_50 / 1e6)
        rate = row.gb_per_second if op.ceiling == "copy" else row.tflops_per_second
        assert math.isclose(row.fraction, rate)


@EVERY_OPERATION
def test_every_rival_computes_the_same_as_ours(op, eager):
    """In Triton's interpreter, so that no figure is lost on a GPU to a wrong argument."""
    shape, reference = smallest(op), None
    example = example_of(op.example, shape, CPU)
    for rival in op.rivals:
        if rival.name in UNMEASURABLE or (rival.name in ARGUMENTS_IN_PYTHON and "cross_entropy" not in op.name):
            continue
        if rival.gpu and not triton.knobs.runtime.interpret:
            continue  # beside a GPU kernels are compiled, and tensors on the CPU are not for them
        if "liger" in rival.name and find_spec("liger_kernel") is None:
            continue
        if rival.instead(shape) == shape:
            found, _, _ = results(function_of(rival, shape, CPU), example)
            agree(reference, found)
            reference = reference or (rival.name, found)


@EVERY_OPERATION
def test_bytes_are_those_of_all_inputs_and_results_read_or_written_once(op):
    shape = smallest(op)
    example = example_of(op.example, shape, CPU)
    first = op.rivals[0]
    found, _, _ = results(function_of(first, shape, CPU), example)
    outputs, gradients = found[: len(example.out_gradients)], found[len(example.out_gradients) :]
    between = {
        "attention": 4 * example.inputs[0][..., 0].numel(),
        "cross_entropy": 4 * TOKENS,
        "linear_cross_entropy": 4 * TOKENS,
    }
    given, made = nbytes(example.inputs) + between.get(op.name, 0), nbytes(outputs)
    loss = made if "cross_entropy" in op.name else 0  # the mean is the harness's, not the operation's
    assert op.forward(shape, 2).bytes == given + made - loss
    read = given + nbytes(example.out_gradients) - loss
    if op.name == "attention":
        read += made
    if op.name == "qkv":
        read -= nbytes(outputs[2:])  # values need no second reading
    if op.name == "residual_norm":
        read -= nbytes(example.inputs[:2]) + nbytes(example.inputs[3:]) - nbytes(outputs[:1])  # the sum instead of both
        gradients = gradients[1:]  # the update's is the stream's
    assert op.backward(shape, 2).bytes == read + nbytes(gradients)


@pytest.mark.parametrize("name", ["swiglu_linear", "linear_cross_entropy"])
def test_flops_are_those_that_torch_counts(name):
    op = OPERATIONS[name]
    shape = smallest(op)
    example = example_of(op.example, shape, CPU)
    plain = next(rival for rival in op.rivals if rival.name == "torch").function(shape)
    with FlopCounterMode(display=False) as counter:
        output = plain(*example.inputs)
        forward = counter.get_total_flops()
        torch.autograd.grad(output, example.differentiated, example.out_gradients)
    assert op.forward(shape, 2).flops == forward
    assert op.backward(shape, 2).flops == counter.get_total_flops() - forward


def test_attention_counts_the_pairs_that_see_each_other():
    op = OPERATIONS["attention"]
    shape = next(shape for shape in op.shapes if shape.documents).with_tokens(3_000)
    apart = documents(shape, CPU)
    seen = torch.stack([(row[:, None] == row).tril() for row in apart])
    assert 1 < len(apart[0].unique()) < 100
    assert op.forward(shape, 2).flops == 4 * int(seen.sum()) * shape.heads * shape.head_dim


def squares(rivals: list[Rival]) -> Operation:
    def example(shape, device, dtype, generator) -> Example:
        x = torch.randn(shape.tokens, device=device, dtype=dtype, generator=generator)
        return Example((x.requires_grad_(),), (torch.ones(shape.tokens, dtype=dtype),))

    def work(shape, element_bytes) -> Work:
        return Work(2 * shape.tokens * element_bytes)

    return Operation("square", "copy", [Stream("tiny", 64, 1)], [], example, work, work, rivals)


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
            Rival("ours", lambda shape: torch.square, gpu=False),
            Rival("another gradient", lambda shape: lambda x: x.square() + (x - x.detach()), gpu=False),
            Rival("not a number", lambda shape: lambda x: (x - 9).sqrt(), gpu=False),
            Rival("missing", failing, gpu=False),
            Rival("sine", lambda shape: torch.sin, gpu=False, other="a sine", instead=lambda s: replace(s, tokens=9)),
            Rival("same", lambda shape: lambda x: x * x, gpu=False),
        ]
    )  # fmt: skip
    notes = {row.rival: row.note for row in rows(op, op.shapes[0], CPU, CEILINGS)}
    assert notes["ours"] == notes["same"] == ""
    assert notes["another gradient"].startswith("not measured: result 1 differs from ours's by ")
    assert notes["not a number"] == "not measured: a result is not finite"
    assert notes["missing"] == "not measured: ImportError: no such package"
    assert notes["sine"] == "a sine"


def test_who_overwrites_its_inputs_is_named_and_spoils_no_others():
    op = squares(
        [Rival("greedy", lambda shape: Greedy.apply, gpu=False), Rival("ours", lambda shape: torch.square, gpu=False)]
    )
    notes = {row.rival: row.note for row in rows(op, op.shapes[0], CPU, CEILINGS)}
    assert notes == {"greedy": "overwrites its inputs", "ours": ""}


def test_a_difference_of_one_rounding_is_none_and_of_a_hundredth_is_one():
    x = torch.linspace(1, 2, 100)
    agree(("ours", [x]), [x.bfloat16()])
    with pytest.raises(Refused, match=r"result 0 differs from ours's by 0\.02"):
        agree(("ours", [x]), [1.02 * x])
