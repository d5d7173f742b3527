"""The command `python -m tandem.kernels.bench`."""

import json
import shutil
import subprocess

import pytest
import torch

from tandem.kernels.bench import command as program
from tandem.kernels.bench.command import main
from tandem.kernels.bench.compare import git_commit
from tests.kernels.bench.square import CEILINGS

SMALL = ["swiglu", "--device", "cpu", "--tokens", "4", "--shape", "mup-check tp1", "--rival", "ours"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_without_a_gpu_one_line_names_what_works(capsys):
    assert main([]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "--device cpu --tokens N" in told


def test_rows_are_printed_and_kept(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    command = [*SMALL, "--json", str(file)]
    assert main(command) == 0
    assert main(command) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["op"] for line in lines] == ["ceilings", "swiglu", "swiglu", "swiglu"] * 2
    facts = ["op", "shape", "rival", "direction", "dtype", "ceiling"]
    times = ["time_p20_us", "time_p50_us", "time_p80_us", "num_repetitions", "bytes", "flops", "executed_flops"]
    rates = ["gb_per_second", "tflops_per_second", "executed_tflops_per_second", "fraction", "peak_extra_bytes"]
    assert all(
        list(line) == facts + times + rates + ["note", "device", "torch", "triton", "commit"] for line in lines[1:4]
    )
    assert capsys.readouterr().out.count("mup-check tp1") == 6


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("swigloo", ["op 'swigloo'", "swiglu_linear"]),
        ("swiglu --shape nosuch", ["--shape 'nosuch'", "'btlm-3b-8k tp1'", "mup-check"]),
        ("swiglu --rival nosuch", ["--rival 'nosuch'", "ours, torch"]),
        ("--tokens 0", ["--tokens 0", "at least 1"]),
        ("--tokens -3 --device cpu", ["--tokens -3"]),
        ("--seconds 0", ["--seconds 0", "more than 0"]),
        ("--production --shape tp2", ["--shape tp2", "--production", "use one of them"]),
        ("--json no/such/rows.jsonl", ["--json no/such/rows.jsonl", "folder"]),
    ],
)
def test_bad_usage_is_one_line(command, named, capsys):
    assert main(command.split()) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert all(words in told.err for words in named)


@pytest.fixture
def asked(monkeypatch):
    """asked(command) returns the shapes and rivals that would be measured, and measures none."""
    found = []
    monkeypatch.setattr(program, "measure_ceilings", lambda device: CEILINGS)

    def noted(op, shape, device, limits, wanted, deadline):
        found.append((op.name, shape.name, [name for name in op.implementations if wanted in name]))
        return ()

    monkeypatch.setattr(program, "measure_shape", noted)

    def ask(command: str) -> list[tuple[str, str, list[str]]]:
        found.clear()
        assert main(["--device", "cpu", *command.split()]) == 0
        return list(found)

    return ask


def test_production_is_both_recipes_over_one_rank(asked):
    shapes = [(op, shape) for op, shape, _ in asked("--production --rival ours")]
    btlm, stablelm = "btlm-3b-8k tp1", "stablelm-2-12b tp1"
    tokenwise = ("swiglu", "swiglu_linear", "cross_entropy", "linear_cross_entropy")
    heads = {("attention", f"btlm-3b-8k {seq} tp1") for seq in (2_048, 8_192)}
    assert len(shapes) == len(set(shapes))
    assert set(shapes) == heads | {(op, shape) for op in tokenwise for shape in (btlm, stablelm)} | {
        ("attention", "stablelm-2-12b 4096 tp1"),
        ("qkv", "stablelm-2-12b 4096 tp1"),
    }


def test_nothing_new_is_begun_after_so_many_seconds(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert main([*SMALL, "--seconds", "1e-9", "--json", str(file)]) == 0
    ceilings, row = map(json.loads, file.read_text().splitlines())
    assert ceilings["op"] == "ceilings"
    assert (row["op"], row["shape"], row["rival"]) == ("swiglu", "mup-check tp1", "all")
    assert row["note"] == "not measured: out of time"


def test_help_names_operations_and_no_empty_list(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = capsys.readouterr().out
    assert "[op ...]" in told
    assert "[]" not in told


@pytest.fixture
def fresh_commit():
    """Forget the cached commit for the test and after it."""
    git_commit.cache_clear()
    yield
    git_commit.cache_clear()


@pytest.mark.usefixtures("fresh_commit")
@pytest.mark.parametrize("told", ["0123abc", None])
def test_without_git_the_commit_is_that_of_the_environment(told, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    if told is None:
        monkeypatch.delenv("TANDEM_COMMIT", raising=False)
    else:
        monkeypatch.setenv("TANDEM_COMMIT", told)
    file = tmp_path / "rows.jsonl"
    assert main([*SMALL, "--json", str(file)]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["commit"] for line in lines} == {told or "no checkout"}
    assert f"commit {told or 'no checkout'}" in capsys.readouterr().out


@pytest.mark.usefixtures("fresh_commit")
@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_checkout_knows_its_commit_better_than_the_environment(monkeypatch):
    monkeypatch.setenv("TANDEM_COMMIT", "0123abc")
    asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    assert git_commit().removesuffix("+") == (asked.stdout.strip() if asked.returncode == 0 else "0123abc")
