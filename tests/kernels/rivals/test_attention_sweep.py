"""The command `python -m tests.rivals.kernels.attention_sweep`."""

import json

import pytest
import torch
import triton

from tandem.kernels.bench.shapes import attention_shapes
from tests.rivals.kernels import attention_candidates as table
from tests.rivals.kernels import attention_sweep
from tests.rivals.kernels.attention_candidates import ATTENTION_KERNELS, candidate_configs
from tests.rivals.kernels.attention_sweep import SWEPT_KERNELS, main

ALL_SHAPES = {shape.name: shape for shape in attention_shapes(tp_sizes=(1, 2))}
SMALL = {"QUERIES": 16, "KEYS": 16, "num_warps": 4, "num_stages": 1}
OTHER = {"QUERIES": 16, "KEYS": 32, "num_warps": 4, "num_stages": 1}


@pytest.fixture
def small(monkeypatch):
    """Sweep each kernel's own tile and two small ones, at BTLM's heads, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    monkeypatch.setattr(table, "CANDIDATE_CONFIGS", {kernel: {80: [SMALL, OTHER]} for kernel in ATTENTION_KERNELS})
    monkeypatch.setattr(attention_sweep, "SWEPT_KERNELS", {"btlm-3b-8k 2048 tp1": ATTENTION_KERNELS})


def swept(tmp_path, *options):
    file = tmp_path / "rows.jsonl"
    assert main(["--device", "cpu", "--tokens", "17", "--json", str(file), *options]) == 0
    return [json.loads(line) for line in file.read_text().splitlines()]


def times(rows):
    return [row["time_p50_us"] for row in rows]


def test_each_candidate_is_measured_and_one_of_each_kernel_is_the_best(small, tmp_path, capsys):
    rows = swept(tmp_path)
    assert [(row["kernel"], row["own"]) for row in rows] == [
        (kernel, own) for kernel in ATTENTION_KERNELS for own in (True, False, False)
    ]
    for kernel in ATTENTION_KERNELS:
        alike = [row for row in rows if row["kernel"] == kernel]
        assert [row["best"] for row in alike] == [time == min(times(alike)) for time in times(alike)]
        assert {row["note"] for row in alike} == {""}
        assert all(row["num_repetitions"] >= 3 and row["executed_tflops_per_second"] > 0 for row in alike)
    told = capsys.readouterr().out
    assert told.count("16x32, 4 warps") >= 3
    assert "counted TFLOP/s" in told


def test_a_candidate_that_fails_or_is_wrong_is_a_line_with_the_reason(small, tmp_path, monkeypatch):
    called = attention_sweep.run_kernel

    def call(kernel, values, sizes):
        if kernel == "queries" and sizes == SMALL:
            raise RuntimeError("out of everything\nand more")
        found = called(kernel, values, sizes)
        return (found[0] * 1.02, *found[1:]) if kernel == "forward" and sizes == OTHER else found

    monkeypatch.setattr(attention_sweep, "run_kernel", call)
    monkeypatch.setattr(attention_sweep, "SWEPT_KERNELS", {"btlm-3b-8k 2048 tp1": ("forward", "queries")})
    rows = swept(tmp_path)
    notes = {(row["kernel"], row["candidate"][:5]): row["note"] for row in rows if row["note"]}
    assert notes.keys() == {("queries", "16x16"), ("forward", "16x32")}
    assert notes["queries", "16x16"] == "not measured: RuntimeError: out of everything"
    assert "result 0 differs from that of its own sizes by 0.02" in notes["forward", "16x32"]
    assert all((row["time_p50_us"] is None) == bool(row["note"]) for row in rows)


def test_without_its_own_result_nothing_of_a_kernel_is_measured(small, tmp_path, monkeypatch):
    called = attention_sweep.run_kernel

    def call(kernel, values, sizes):
        if kernel == "keys" and sizes["num_stages"] == 3:
            raise RuntimeError("no")
        return called(kernel, values, sizes)

    monkeypatch.setattr(attention_sweep, "run_kernel", call)
    monkeypatch.setattr(attention_sweep, "SWEPT_KERNELS", {"btlm-3b-8k 2048 tp1": ("keys",)})
    assert [row["note"] for row in swept(tmp_path)] == [
        "not measured: RuntimeError: no",
        *["not measured: nothing to compare its results with"] * 2,
    ]


def test_where_inputs_cannot_be_made_the_next_shape_is_measured(small, tmp_path, monkeypatch):
    monkeypatch.setattr(
        attention_sweep, "SWEPT_KERNELS", {f"btlm-3b-8k 2048 tp{size}": ("forward",) for size in (1, 2)}
    )
    made = attention_sweep._kernel_inputs

    def values(shape, device):
        if shape.name.endswith("tp1"):
            raise RuntimeError("no room")
        return made(shape, device)

    monkeypatch.setattr(attention_sweep, "_kernel_inputs", values)
    first, second = (
        [row for row in swept(tmp_path) if row["shape"].endswith(name)] for name in ("tp1", "tp2")
    )  # fmt: skip
    assert {row["note"] for row in first} == {"not measured: the kernels' own sizes fail here: RuntimeError: no room"}
    assert {row["note"] for row in second} == {""}


def test_when_time_is_over_nothing_is_begun(small, tmp_path):
    assert {row["note"] for row in swept(tmp_path, "--seconds", "0")} == {"not measured: out of time"}


def test_what_its_own_sizes_are_comes_first_and_nothing_twice():
    for name, kernels in SWEPT_KERNELS.items():
        for kernel in kernels:
            found = candidate_configs(kernel, ALL_SHAPES[name])
            sizes = [tuple(sorted(sizes.items())) for _, sizes in found]
            assert len(set(sizes)) == len({name for name, _ in found}) == len(found) > 4
            assert found[0][1].items() >= {"num_warps": 4 if "btlm" in name and kernel == "keys" else 8}.items()


def test_grouped_heads_are_measured_together_and_apart():
    for name, own in (("stablelm-2-12b 4096 tp1", 4), ("stablelm-2-12b 4096 tp2", 2)):
        found = [sizes["HEADS_PER_PROGRAM"] for _, sizes in candidate_configs("keys", ALL_SHAPES[name])]
        assert found[0] == own
        assert set(found) == {1, 2, 4}
    assert all(
        "HEADS_PER_PROGRAM" not in sizes for _, sizes in candidate_configs("keys", ALL_SHAPES["btlm-3b-8k 8192 tp1"])
    )


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("--tokens 0 --device cpu", ["--tokens 0", "must be at least 1"]),
        ("--json no/such/rows.jsonl --device cpu", ["--json no/such/rows.jsonl", "folder"]),
        ("--resources", ["--resources", "TRITON_INTERPRET"]),
        ("--device cpu", ["--device cpu", "TRITON_INTERPRET"]),
        ("", ["--resources", "--device cpu --tokens N"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(command, named, capsys, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", command != "--device cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(command.split()) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert all(words in told.err for words in named)
