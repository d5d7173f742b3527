"""The table of errors on the CPU: kernels run in Triton's interpreter, and errors above the limit are reported."""

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import triton

import tests.rivals.kernels.__main__ as command_line
from tests.rivals.kernels.__main__ import main
from tests.rivals.kernels.errors import MAX_ERROR_RATIO, PRECISIONS, ErrorMeasurement, measure_errors
from tests.rivals.kernels.ops import OPERATIONS
from tests.triton_interpreter import run_kernels_on_cpu

CPU = torch.device("cpu")
OURS = {name: OPERATIONS[name] for name in PRECISIONS}
SMALL = {"qkv": "demo-stablelm 128 tp1", "attention": "demo-stablelm 128 tp1"}
TOKENS = 20
KERNELS = {
    "swiglu": {"swiglu", "swiglu_backward"},
    "swiglu_linear": {"swiglu", "swiglu_backward"},
    "qkv": {"split_and_rotate_qkv", "split_and_rotate_qkv_backward"},
    "cross_entropy": {"cross_entropy_add", "cross_entropy_gradient"},
    "linear_cross_entropy": {"cross_entropy_add", "cross_entropy_gradient"},
    "attention": {"attention", "attention_backward"},
}
for module in ("attention", "cross_entropy", "linear_cross_entropy", "qkv", "swiglu"):
    import_module(f"tandem.kernels.{module}")  # registers its operations before a test replaces their CPU versions


def small(name: str):
    wanted = SMALL.get(name, "demo-stablelm tp1")
    shape = next(shape for shape in OURS[name].extra_shapes if shape.name == wanted).with_tokens(TOKENS)
    # Four chunks of 128 columns, the last with padding: a program of the interpreter takes milliseconds.
    return replace(shape, padded_vocab_size=512, vocab_size=500) if name == "linear_cross_entropy" else shape


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="runs the kernels where there is no GPU")
@pytest.mark.parametrize("name", OURS)
def test_kernels_are_within_the_mark_of_plain_torch(name, monkeypatch):
    ran = run_kernels_on_cpu(monkeypatch)
    found = list(measure_errors(OURS[name], small(name), CPU))
    assert ran == KERNELS[name]
    assert [row.result for row in found] == list(PRECISIONS[name].result_names)
    for row in found:
        exact_in_any_way = name == "qkv" and row.result == "value"
        assert (row.ours == row.plain == 0) if exact_in_any_way else (0 < row.ours <= MAX_ERROR_RATIO * row.plain), row
        # No error exceeds a few roundings of the dtype: bf16, or fp32 for losses.
        assert row.plain < 2**-6


def test_heads_without_norms_have_no_gradients_of_norms():
    op = OURS["qkv"]
    shape = next(shape for shape in op.shapes if not shape.qk_layernorm).with_tokens(TOKENS)
    assert [row.result for row in measure_errors(op, shape, CPU)] == ["query", "key", "value", "d qkv"]


def test_biases_of_plain_torch_are_not_rounded_to_bf16():
    """SDPA rounds biases to bf16, which would make plain torch worse and ours look better. Scores here are biases only.

    A weight and the result are rounded once each, by half a unit of bf16; the bias of a thousand tokens is off by four.
    """
    op = OURS["attention"]
    shape = next(shape for shape in op.shapes if shape.has_alibi).with_tokens(1_200)
    shape = replace(shape, num_heads=1, num_kv_heads=1, batch_size=1)
    nothing = torch.zeros(1, 1_200, 1, shape.head_dim, dtype=torch.bfloat16)
    first = nothing.index_fill(1, torch.tensor([0]), 1)

    def off(make):
        exact = PRECISIONS["attention"].make_plain(shape)(*(x.double() for x in (nothing, nothing, first)))
        return float(((make(shape)(nothing, nothing, first).double() - exact) / exact).abs().max())

    rounded = next(rival for rival in op.rivals if rival.name == "sdpa, mask written out").make_function
    assert off(PRECISIONS["attention"].make_plain) <= 2**-8
    assert off(rounded) > 2**-7


def far_off(shape):
    def twice(gate_up):
        return torch.nn.functional.silu(gate_up[:, 0]) * gate_up[:, 1] * 1.01

    return twice


def failing(shape):
    raise RuntimeError("no such kernel\nand more")


@pytest.mark.parametrize(
    ("ours", "code", "said"),
    [
        (None, 0, ""),
        (far_off, 1, f"above {MAX_ERROR_RATIO}"),
        (failing, 1, "not measured: RuntimeError: no such kernel\n"),
    ],
    ids=["ours", "too far off", "failing"],
)
def test_the_command_tells_who_is_too_far_off(ours, code, said, tmp_path, monkeypatch, capsys):
    if ours is not None:
        monkeypatch.setitem(PRECISIONS, "swiglu", replace(PRECISIONS["swiglu"], make_ours=ours))
    file = tmp_path / "errors.jsonl"
    command = ["swiglu", "--errors", "--device", "cpu", "--tokens", "20", "--shape", "demo-stablelm tp1"]
    assert main([*command, "--json", str(file)]) == code
    told = capsys.readouterr().out
    assert said in told
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(list(line) == [*ErrorMeasurement.__dataclass_fields__, "ratio"] for line in lines)
    assert [(line["result"], line["tokens"]) for line in lines] == (
        [] if ours is failing else [("out", 20), ("d gate_up", 20)]
    )


def test_without_a_shape_they_are_those_of_production(monkeypatch):
    asked = []
    monkeypatch.setattr(
        command_line, "measure_errors", lambda op, shape, device: asked.append((op.name, shape.name)) or []
    )
    assert main(["--errors", "--device", "cpu"]) == 0
    assert {shape.split()[0] for _, shape in asked} == {"btlm-3b-8k", "stablelm-2-12b"}
    assert {op for op, _ in asked} == set(OURS)
    assert len(asked) == 12


def test_time_that_is_over_is_no_success(capsys):
    assert main(["swiglu", "--errors", "--device", "cpu", "--seconds", "1e-9"]) == 1
    assert capsys.readouterr().out.count("not measured: out of time") == 2


def test_a_plain_result_that_is_exact_leaves_ours_no_error():
    row = ErrorMeasurement("op", "shape", 1, "bfloat16", "out", 0.0, 0.0, "cpu", "2", "3", "c")
    assert (row.ratio, row.is_within_limit) == (1, True)
    assert not replace(row, ours=1e-9).is_within_limit
