"""A small corpus of real text, prepared by the real verb, for every promise about runs."""

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

from tandem.trainer.checkpoint.layout import KINDS
from tandem.trainer.checkpoint.read import Snapshot
from tests import tiny_configs
from tests.ranks import SERVER
from tests.timeouts import PATIENCE_SECONDS

# torch needs sympy, which needs this mpmath: every Python reads the same text, so a figure measured on it is the same too.
PACKAGE = Path(mpmath.__file__).parent
TEXTS = sorted(path for part in ("calculus", "functions", "matrices") for path in (PACKAGE / part).glob("*.py"))
VOCAB = 500


def tandem(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command line of `tandem`, in its own process, as a user types it."""
    command = [sys.executable, "-m", "tandem.trainer", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=clean_environment() | environment,
        check=False,
    )


def clean_environment() -> dict[str, str]:
    """This process's environment without what a launcher would have left there."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
    return {name: value for name, value in os.environ.items() if name not in launcher} | {"OMP_NUM_THREADS": "1"}


def forked(*commands: list[object]) -> BaseProcess:
    """These commands of `tandem`, one after the other in one fork of the ranks' server: not what a user types, and seconds
    sooner. Ends with the exit code of the first that fails.
    """
    process = SERVER.Process(target=_run, args=([list(map(str, command)) for command in commands],))
    process.start()
    return process


def _run(commands: list[list[str]]) -> None:
    from jaxtyping import config

    from tandem.trainer.__main__ import main

    config.update("jaxtyping_disable", True)  # as in a command, whose steps would take half as long again

    sys.exit(next(filter(None, map(main, commands)), 0))


def ended(process: BaseProcess) -> int | None:
    """The exit code; minus the signal that killed it."""
    process.join(PATIENCE_SECONDS)
    hung = process.is_alive()
    process.kill()
    process.join()
    assert not hung, f"still running after {PATIENCE_SECONDS} s"
    return process.exitcode


def listens(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal. Source: proc(5), status."""
    found = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


@contextmanager
def begun(command: list[object], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command running, this Python's scripts first on its path; it and its children are gone when the block ends."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        [*map(str, command)], env={**clean_environment(), "PATH": path, **environment}, text=True,
        cwd=Path(__file__).parents[2], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Some modules of mpmath, a document every forty lines, in several small shards."""
    folder = tmp_path_factory.mktemp("corpus")
    modules = [path.read_text(encoding="utf-8").splitlines(keepends=True) for path in TEXTS]
    texts = ["".join(lines[first : first + 40]) for lines in modules for first in range(0, len(lines), 40)]
    (folder / "modules.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = tandem(
        "prepare", "--input", folder / "modules.jsonl", "--output", folder / "prepared", "--vocab", VOCAB, "--held-out", 0.1,
        "--sample-tokens", 512, "--shard-tokens", 40_000, "--workers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "prepared"


@pytest.fixture
def write_config(tmp_path, corpus):
    """write_config("btlm", run={...}, ...): the path of a config over the corpus, two phases of 6 steps."""

    def write(variant: str, file: str = "config.yaml", **sections: dict) -> Path:
        tree = two_phases(variant, corpus, tmp_path / "runs", **sections)
        (tmp_path / file).write_text(yaml.safe_dump(tree))
        return tmp_path / file

    return write


def two_phases(variant: str, corpus: Path, root: Path, *, steps: int = 6, **sections: dict) -> dict:
    """A tiny config tree over the corpus: `steps` steps of 8 rows of 32 tokens, then as many of 2 rows of 128."""
    tree = tiny_configs.tree(variant)
    tokens = steps * 256
    tree["run"]["root"] = str(root)
    tree["data"] = {"sources": {"corpus": str(corpus)}, "prefetch_steps": 2}
    tree["schedule"]["phases"] = [
        {"name": "short", "tokens": tokens, "seq_len": 32, "rows": 8, "micro_rows": 2, "mixture": {"corpus": 1.0}},
        {"name": "long", "tokens": tokens, "seq_len": 128, "rows": 2, "micro_rows": 1, "mixture": {"corpus": 1.0}},
    ]
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    return tree


def differing(one: Snapshot, other: Snapshot) -> list[str]:
    """Names of the tensors, of any kind, that are not the same bits."""
    assert sorted(one.names) == sorted(other.names)
    return [
        f"{kind} {name}" for name in one.names for kind in KINDS
        if not torch.equal(one.tensor(kind, name).view(torch.int32), other.tensor(kind, name).view(torch.int32))
    ]  # fmt: skip


def steps_of(folder: Path) -> dict[int, dict]:
    """The last record of every step in a run folder."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return {record["step"]: record for record in records if record["kind"] == "step"}
