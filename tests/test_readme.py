"""Every command of the README runs, in its order; every path it names exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(language: str) -> list[str]:
    return "".join(re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)).splitlines()


@pytest.mark.dist
@pytest.mark.slow
def test_the_steps_run_as_written(tmp_path):
    for folder in ("trainer", "kernels", "tests", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    for command in block("console"):
        verb, *arguments = shlex.split(command)
        assert verb == "tandem"
        done = subprocess.run(
            [sys.executable, "-m", "tandem.trainer", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "runs/demo-btlm/report.html").stat().st_size > 10_000
    assert (tmp_path / "imports/demo-btlm/step-00000000/COMMITTED").is_file()


def test_the_two_commands_and_every_linked_path_exist():
    named = [line.split()[0] for line in block("sh")] + re.findall(r"\]\(([^)]+)\)", README)
    named += [f"tests/promises/{name}" for name in re.findall(r"`(test_\w+\.py)`", README)]
    named += re.findall(r"`(tests/[\w/.]+)`", README)
    assert [name for name in named if not (ROOT / name).exists()] == []
