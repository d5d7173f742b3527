"""Every command of the README and of the guides runs, in this order, and prints what they show. Every path they name exists."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.ranks import FORKSERVER
from tests.timeouts import TEST_TIMEOUT_SECONDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "launch/guides").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The lines of all fenced blocks of one language."""
    return "".join(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)).splitlines()


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Every command of the console blocks, with the lines of output shown below it."""
    found: list[tuple[str, list[str]]] = []
    for line in blocks(page, "console"):
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def without_numbers(line: str) -> str:
    """Figures vary with the machine and with the text of this repository, which is the corpus."""
    return " ".join(re.sub(r"\d[\d.,:]*(e[+-]\d+)?([kM](?=[/ ]))?", "#", line).split())


def run_command(arguments: list[str], folder: Path, output: Path) -> int | None:
    """Run the verb in a fork of the ranks' server, which saves its imports."""
    process = FORKSERVER.Process(target=_run_here, args=(arguments, folder, output))
    process.start()
    process.join(TEST_TIMEOUT_SECONDS)
    process.kill()
    process.join()
    return process.exitcode


def _run_here(arguments: list[str], folder: Path, output: Path) -> None:
    from jaxtyping import config

    from tandem.trainer.__main__ import main

    config.update("jaxtyping_disable", True)
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "COLUMNS": "200"}
    os.chdir(folder)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(arguments))


@pytest.mark.dist
@pytest.mark.slow
def test_the_commands_run_and_print_what_is_shown(tmp_path):
    for folder in ("trainer", "kernels", "tests", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for page in PAGES:
        for command, shown in commands(page):
            program, *arguments = shlex.split(command)
            assert program == "tandem"
            exit_code = run_command(arguments, tmp_path, tmp_path / "output")
            output = (tmp_path / "output").read_text()
            assert exit_code == 0, f"{page.name}: {command}\n{output}"
            lines = iter(without_numbers(line) for line in output.splitlines())
            for line in shown:  # in this order, with other lines between them
                assert any(without_numbers(line) in printed for printed in lines), f"{command}: {line}\n{output}"
    assert (tmp_path / "runs/demo-btlm/report.html").stat().st_size > 10_000
    assert (tmp_path / "imports/demo-btlm/step-00000000/COMMITTED").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_on_the_page_exists(page):
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    links += re.findall(r"^\[[\w-]+\]: (?!https)(\S+)", page.read_text(), re.MULTILINE)
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    assert [line for line in blocks(page, "sh") if not (ROOT / line.split()[0]).exists()] == []


def test_every_test_of_the_table_of_promises_exists():
    table = (ROOT / "tests/README.md").read_text().split("## Promises")[1]
    named = [f"tests/promises/{name}" for name in re.findall(r"`(test_\w+\.py)`", table)]
    named += re.findall(r"`(tests/[\w/.]+)`", table)
    assert len(named) > 40
    assert [name for name in named if not (ROOT / name).exists()] == []
