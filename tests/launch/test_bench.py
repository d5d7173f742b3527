"""launch/bench.sh as a bare GPU machine meets it, rehearsed without a GPU: no git, few packages, stages that are cut."""

import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rivals import tables

ROOT = Path(__file__).parents[2]
ABSENT = (
    "datatrove",
    "gigatoken",
    "grimp",
    "importlinter",
    "loguru",
    "mypy",
    "ruff",
    "wandb",
    "webdataset",
    "cloudpickle",
)
"""Packages of our environment that a machine with nothing but torch, and the wheels a person brings, does not have."""


ROW = {
    "op": "attention", "shape": "btlm-3b-8k 8192 tp1", "rival": "ours", "direction": "forward", "time_p20_us": 1.0,
    "time_p50_us": 2.0, "time_p80_us": 3.0, "ceiling": "matmul", "tflops_per_second": 449.0, "gb_per_second": 1.0,
    "fraction": 0.5, "note": "", "device": "a card", "torch": "2", "triton": "3", "commit": "0123abc",
}  # fmt: skip


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, str]:
    """The environment of a machine without git, without our extras, and whose libraries warn."""
    place = tmp_path_factory.mktemp("bare")
    programs = place / "bin"
    programs.mkdir()
    for folder in (Path(sys.executable).parent, *map(Path, os.environ["PATH"].split(":"))):
        for program in folder.iterdir() if folder.is_dir() else ():
            if program.name != "git" and not (programs / program.name).is_symlink():
                (programs / program.name).symlink_to(program)
    (place / "sitecustomize.py").write_text(
        "import sys, warnings\n"
        f"for name in {ABSENT!r}: sys.modules[name] = None\n"
        "warnings.warn('a foreign library says something about itself')\n"
    )
    here = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "TANDEM_COMMIT")}
    return here | {"PATH": str(programs), "PYTHONPATH": f"{place}:{ROOT}", "TANDEM_COMMIT": "0123abc"}


def bench(environment: dict[str, str], *arguments: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "launch/bench.sh", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a folder"),
        (("{folder}",), "give the stages to run"),
        (("{folder}", "kernel"), "unknown stage kernel"),
        (("{folder}", "first"), "this machine has no CUDA device"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, tmp_path):
    if "CUDA" in said and list(Path("/dev").glob("nvidia*")):
        pytest.skip("this machine has what it would lack")
    done = bench(dict(os.environ), *(argument.format(folder=tmp_path) for argument in arguments))
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def rehearsed(bare, tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("figures")
    return bench(bare, out, "rehearse"), out


@pytest.mark.slow
@pytest.mark.dist
def test_every_stage_runs_on_a_bare_machine(rehearsed):
    done, out = rehearsed
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "btlm-long.trace.json.gz", "btlm-short.trace.json.gz", "errors.jsonl", "kernels.jsonl", "log.txt.gz",
        "stablelm.trace.json.gz", "steps.jsonl", "sweep.jsonl",
    ]  # fmt: skip
    log = gzip.decompress((out / "log.txt.gz").read_bytes()).decode()
    for stage in ("tests", "kernels", "errors", "btlm", "stablelm", "rivals", "sweep", "profile", "states", "memory"):
        assert f"== {stage}: exit 0" in log


@pytest.mark.slow
@pytest.mark.dist
def test_every_line_says_where_it_comes_from(rehearsed):
    _, out = rehearsed
    for file in out.glob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert lines
        for line in lines:
            assert line["commit"].startswith("0123abc"), file.name
            assert line["torch"]
            assert line["triton"]
            assert line["device"]


@pytest.mark.slow
@pytest.mark.dist
def test_the_table_comes_last(rehearsed):
    done, out = rehearsed
    assert done.stdout.rstrip().endswith("\n\n".join(tables.format_tables(out)).rstrip())
    for said in ("| demo-btlm ", "| demo-stablelm ", "| swiglu", "| attention"):
        assert said in done.stdout


def test_a_stage_at_its_limit_is_cut_and_the_others_go_on(bare, tmp_path):
    (tmp_path / "log.txt.gz").write_bytes(gzip.compress(b"an earlier visit"))
    (tmp_path / "kernels.jsonl").write_text(json.dumps(ROW) + "\n" + '{"op": "torn')
    # The clock of the script counts whole seconds, so one may be over before the first stage begins.
    done = bench(bare | {"VISIT_SECONDS": "2"}, tmp_path.name, "kernels", "btlm", "rehearse", folder=tmp_path.parent)
    assert done.returncode == 1
    assert "== kernels: exit 124" in done.stdout
    assert "== btlm: exit 124" in done.stdout
    assert re.search("== kernels: .* cut at its limit of [12] s", done.stdout)
    assert "| attention | btlm-3b-8k 8192 tp1" in done.stdout
    assert "450: missed" in done.stdout
    assert "these stages failed or were cut short: kernels btlm" in done.stderr.splitlines()[-1]
    assert gzip.decompress((tmp_path / "log.txt.gz").read_bytes()).startswith(b"an earlier visit")


def test_ctrl_c_ends_the_visit_and_keeps_its_log(bare, tmp_path):
    command = [ROOT / "launch/bench.sh", tmp_path, "rehearse", "btlm", "states"]
    with subprocess.Popen(command, env=bare, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        shown = list(itertools.takewhile(lambda line: "warm-up step" not in line, running.stdout))
        running.send_signal(signal.SIGINT)  # to the script alone: stages have a process group of their own
        rest = running.stdout.read()  # ends when no process of the stage holds it any longer
    assert running.returncode == 130
    assert rest.splitlines()[-1] == "bench: interrupted in btlm"
    assert "== states" not in rest
    log = gzip.decompress((tmp_path / "log.txt.gz").read_bytes()).decode()
    assert shown[-1] in log
    assert re.search(r"^== btlm: exit [1-9]", log, re.MULTILINE), "1 or 130: whichever process of the stage ends first"
    assert not (tmp_path / ".stage").exists()


def test_a_package_that_is_missing_is_named_and_nothing_is_installed(bare, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.path = [p for p in sys.path if 'site-packages' not in p]\n"
    )
    done = bench(bare | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, tmp_path / "out", "kernels", "rehearse")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("bench: python3 has no torch triton deepspeed megatron omegaconf")
    assert not (tmp_path / "out").exists()
