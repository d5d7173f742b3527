"""The tables of JSON lines, and the message if there are none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rivals import tables
from tests.rivals.kernels.__main__ import main as kernel_rivals

ROOT = Path(__file__).parents[2]
STEP = {
    "config": "stablelm-2-12b",
    "phase": "4k",
    "num_layers": 6,
    "recipe_num_layers": 40,
    "num_micro_batches": 4,
    "micro_batch_size": 1,
    "overrides": ["parallel.tp_size=1"],
    "step_seconds": 0.5,
    "tokens_per_second": 32_768.0,
    "mfu": 0.505,
    "mfu_causal": 0.47,
    "derived": {"mfu_at_full_batch": 0.5001},
    "peak_allocated_gib": 59.25,
    "part_seconds": {"data": 0.0, "forward": 0.1, "backward": 0.3, "update": 0.1, "other": 0.0},
    "kind_seconds": {"step": 0.5, "matmul": 0.25, "attention": 0.05},
    "device": "a card",
    "torch": "2",
    "triton": "3",
    "commit": "0123abc",
}


def cells(table: str, first: str) -> list[str]:
    [row] = [line for line in table.splitlines() if line.startswith(f"| {first} ")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_step_has_its_target_and_its_prediction(tmp_path):
    (tmp_path / "steps.jsonl").write_text(json.dumps(STEP) + "\n")
    header, steps = tables.format_tables(tmp_path)
    assert header == "a card; torch 2; triton 3; commit 0123abc"
    whole, kinds = steps.split("\n\n")
    assert cells(whole, "stablelm-2-12b") == [
        "stablelm-2-12b", "4k", "6 of 40", "4 x 1", "500.0", "32,768", "50.5 / 47.0", "50.0", "59.2", "100.0", "300.0",
        "100.0", "50 %: reached", "MFU 52 / 49 %",
    ]  # fmt: skip
    assert cells(kinds, "matmul") == ["matmul", "250.0", "50.0"]


@pytest.mark.parametrize(("mfu", "expected"), [(0.4999, "50 %: missed"), (0.5, "50 %: reached")])
def test_a_target_is_reached_or_missed(tmp_path, mfu, expected):
    (tmp_path / "steps.jsonl").write_text(json.dumps(STEP | {"derived": {"mfu_at_full_batch": mfu}}) + "\n")
    assert expected in [*tables.format_tables(tmp_path)][1]


def test_a_changed_step_has_no_target(tmp_path):
    changed = ["parallel.tp_size=1", "parallel.recompute=full", "--global-batch-size 8"]
    (tmp_path / "steps.jsonl").write_text(json.dumps(STEP | {"overrides": changed}) + "\n")
    assert " parallel.recompute=full --global-batch-size 8 " in [*tables.format_tables(tmp_path)][1]
    assert "50 %:" not in [*tables.format_tables(tmp_path)][1]


def test_an_error_is_next_to_that_of_plain_torch(tmp_path):
    """A line as `python -m tests.rivals.kernels --errors` writes it."""
    file = tmp_path / "errors.jsonl"
    command = ["swiglu", "--errors", "--device", "cpu", "--tokens", "8", "--shape", "demo-stablelm tp1"]
    assert kernel_rivals([*command, "--json", str(file)]) == 0
    line = json.loads(file.read_text().splitlines()[0])
    table = tables.error_table([line])
    assert cells(table, "swiglu") == [
        "swiglu", "demo-stablelm tp1", "out", f"{line['ours']:.2e}", f"{line['plain']:.2e}", f"{line['ratio']:.3f}"
    ]  # fmt: skip


def test_variants_are_sorted_by_time_and_include_the_shipped_one(tmp_path):
    line = {
        "kernel": "keys", "shape": "a shape", "time_p20_us": 1.0, "time_p80_us": 2.0, "executed_tflops_per_second": 400.4,
        "own": False, "device": "a card", "torch": "2", "triton": "3", "commit": "0123abc",
    }  # fmt: skip
    times = {"slowest": 30.0, "mine": 20.0, "third": 10.0, "second": 5.0, "first": 2.0, "failed": None}
    found = [line | {"candidate": name, "own": name == "mine", "time_p50_us": time} for name, time in times.items()]
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    _, table = tables.format_tables(tmp_path)
    assert [row.split(" | ")[2].strip() for row in table.splitlines()[2:]] == ["first", "second", "mine"]


def test_columns_without_a_figure_are_left_out():
    table = tables.markdown_table(["a", "b", "c"], [["1", "", "3"], ["2", "", ""]])
    assert table == "| a | c |\n| - | - |\n| 1 | 3 |\n| 2 |   |"


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "no line of a measurement"), ("{}}\n", "kernels.jsonl: Extra data"), ('{"op": "to', "no line")],
)
def test_nothing_to_print_is_one_line(tmp_path, capsys, content, expected):
    if content is not None:
        (tmp_path / "kernels.jsonl").write_text(content)
    assert tables.main([str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("tests.rivals.tables: ")
    assert expected in line


def test_the_tables_need_no_torch(tmp_path):
    (tmp_path / "steps.jsonl").write_text(json.dumps(STEP) + "\n")
    program = "import sys; sys.modules['torch'] = None; "
    program += "from tests.rivals.tables import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
