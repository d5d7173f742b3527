"""A small corpus of real text, prepared by the real verb, for every promise about runs."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import mpmath
import pytest
import torch
import yaml

from tandem.trainer.checkpoint.layout import STATE_KINDS
from tandem.trainer.checkpoint.read import Checkpoint
from tests import tiny_configs
from tests.ranks import FORKSERVER
from tests.timeouts import TEST_TIMEOUT_SECONDS

# torch needs sympy, which needs this mpmath: every Python reads the same text, so a figure measured on it is the same too.
TEXT_FOLDER = Path(mpmath.__file__).parent
TEXT_FILES = sorted(
    path for part in ("calculus", "functions", "matrices") for path in (TEXT_FOLDER / part).glob("*.py")
)
VOCAB_SIZE = 500


def run_tandem(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command line of `tandem`, in its own process, as a user types it."""
    command = [sys.executable, "-m", "tandem.trainer", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TEST_TIMEOUT_SECONDS,
        env=clean_environment() | environment,
        check=False,
    )


def clean_environment() -> dict[str, str]:
    """This process's environment without what a launcher would have left there."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
    return {name: value for name, value in os.environ.items() if name not in launcher} | {"OMP_NUM_THREADS": "1"}


def fork_tandem(
    *commands: list[object], log: Path | None = None, environment: dict[str, str] | None = None
) -> BaseProcess:
    """Run commands of `tandem`, one after the other, in one fork of the ranks' server: what a user types, but seconds faster.

    The fork appends stdout and stderr to `log` and ends with the exit code of the first command that fails.
    """
    words = [list(map(str, command)) for command in commands]
    process = FORKSERVER.Process(target=_run_commands, args=(words, log, environment or {}))
    process.start()
    return process


def _run_commands(commands: list[list[str]], log: Path | None, environment: dict[str, str]) -> None:
    from jaxtyping import config

    from tandem.trainer.__main__ import main

    if log:
        with log.open("ab") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    config.update("jaxtyping_disable", True)  # as in a command, whose steps would take half as long again

    def run(command: list[str]) -> int:
        sys.argv[1:] = command  # what a run records
        return main()

    sys.exit(next(filter(None, map(run, commands)), 0))


def wait_for_exit(process: BaseProcess) -> int | None:
    """The exit code; minus the signal that killed it."""
    process.join(TEST_TIMEOUT_SECONDS)
    hung = process.is_alive()
    process.kill()
    process.join()
    assert not hung, f"still running after {TEST_TIMEOUT_SECONDS} s"
    return process.exitcode


def has_signal_handler(pid: int, signal_number: int) -> bool:
    """Whether the process has a handler for the signal. Source: proc(5), status."""
    found = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return found is not None and bool(int(found[1], 16) >> (signal_number - 1) & 1)


@contextmanager
def start_command(
    command: list[object], folder: Path = Path(__file__).parents[2], **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """The command running, this Python's scripts first on its path; it and its children are gone when the block ends."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        [*map(str, command)], env={**clean_environment(), "PATH": path, **environment}, text=True,
        cwd=folder, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Some modules of mpmath, a document every forty lines, in several small shards; shared by all workers, never changed."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "promises-corpus"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            prepare_corpus(folder)
            (folder / "done").touch()
    return folder / "prepared"


def prepare_corpus(folder: Path) -> None:
    """Prepare it as `prepared` with the command `tandem prepare`."""
    modules = [path.read_text(encoding="utf-8").splitlines(keepends=True) for path in TEXT_FILES]
    texts = ["".join(lines[first : first + 40]) for lines in modules for first in range(0, len(lines), 40)]
    (folder / "modules.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"input": folder / "modules.jsonl", "output": folder / "prepared", "vocab-size": VOCAB_SIZE,
               "held-out": 0.1, "sample-tokens": 512, "shard-tokens": 40_000, "workers": 1}  # fmt: skip
    command = ["prepare", *(word for name, value in options.items() for word in (f"--{name}", value))]
    assert wait_for_exit(fork_tandem(command)) == 0


@pytest.fixture
def write_config(tmp_path, corpus):
    """write_config("btlm", run={...}, ...): the path of a config over the corpus, two phases of 6 steps."""

    def write(variant: str, file: str = "config.yaml", **sections: dict) -> Path:
        tree = two_phase_config(variant, corpus, tmp_path / "runs", **sections)
        (tmp_path / file).write_text(yaml.safe_dump(tree))
        return tmp_path / file

    return write


def two_phase_config(variant: str, corpus: Path, root: Path, *, steps: int = 6, **sections: dict) -> dict:
    """A tiny config tree over the corpus: `steps` steps of 8 rows of 32 tokens, then as many of 2 rows of 128, in two
    micro-batches each on one data-parallel rank.
    """
    tree = tiny_configs.config_tree(variant)
    tokens = steps * 256
    tree["run"]["root"] = str(root)
    tree["data"] = {"sources": {"corpus": str(corpus)}, "prefetch_steps": 2}
    tree["schedule"]["phases"] = [
        {
            "name": "short",
            "tokens": tokens,
            "seq_len": 32,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "mixture": {"corpus": 1.0},
        },
        {
            "name": "long",
            "tokens": tokens,
            "seq_len": 128,
            "global_batch_size": 2,
            "micro_batch_size": 1,
            "mixture": {"corpus": 1.0},
        },
    ]
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    return tree


def differing_tensors(one: Checkpoint, other: Checkpoint) -> list[str]:
    """Names of the tensors, of any kind, that are not the same bits."""
    assert sorted(one.parameter_names) == sorted(other.parameter_names)
    return [
        f"{kind} {name}" for name in one.parameter_names for kind in STATE_KINDS
        if not torch.equal(one.read_tensor(kind, name).view(torch.int32), other.read_tensor(kind, name).view(torch.int32))
    ]  # fmt: skip


def read_step_records(folder: Path) -> dict[int, dict]:
    """The last record of every step in a run folder."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return {record["step"]: record for record in records if record["kind"] == "step"}
