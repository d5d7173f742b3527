"""The end of a terminal, of a pipe or of a reader is not the end of a run: the run saves and exits with 85, or it continues.

One run meets one loss after the other: each start is a fork with its own session and terminal, or with pipes.
"""

import json
import os
import pty
import signal
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml

from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.read import open_checkpoint
from tandem.trainer.runtime.signals import REQUEUE_EXIT_CODE
from tests.promises.conftest import read_step_records, two_phase_config, wait_for_exit
from tests.ranks import FORKSERVER
from tests.timeouts import wait_until

pytestmark = [pytest.mark.dist, pytest.mark.slow]
STEPS = 60
CTRL_C, CTRL_BACKSLASH, CTRL_S = b"\x03", b"\x1c", b"\x13"


class Terminal:
    """A terminal, and a pipe that stands where a user types `2>&1 | tee log`. Either can be lost."""

    def __init__(self, folder: Path) -> None:
        self.master, self.slave = pty.openpty()
        self.name = os.ttyname(self.slave)
        self.pipe = str(folder / f"pipe-{self.name.replace('/', '-')}-{time.monotonic_ns()}")
        os.mkfifo(self.pipe)
        self.reader = os.open(self.pipe, os.O_RDONLY | os.O_NONBLOCK)

    def fill_pipe(self) -> None:
        """As a reader does that has stopped reading, such as a pager."""
        writer = os.open(self.pipe, os.O_WRONLY | os.O_NONBLOCK)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        os.close(writer)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def close(self) -> None:
        """Close the window, and the reader of the pipe."""
        for descriptor in (self.master, self.slave, self.reader):
            if descriptor >= 0:
                os.close(descriptor)
        self.master = self.slave = self.reader = -1

    def close_reader(self) -> None:
        os.close(self.reader)
        self.reader = -1


def start(terminal: Terminal, command: list[str], shell: str = "", **environment: str) -> BaseProcess:
    """Begin a command as the foreground job of the terminal; `shell` says what a shell's line would say after the command."""
    process = FORKSERVER.Process(
        target=run_in_terminal, args=(terminal.name, terminal.pipe, command, shell.split(), environment)
    )
    process.start()
    return process


def run_in_terminal(tty: str, pipe: str, command: list[str], shell: list[str], environment: dict[str, str]) -> None:
    from jaxtyping import config

    os.setsid()
    screen = os.open(tty, os.O_RDWR)  # the first terminal that a session opens becomes its own
    places = {"full": lambda: os.open("/dev/full", os.O_WRONLY), "pipe": lambda: os.open(pipe, os.O_WRONLY)}
    place = next((places[word]() for word in shell if word in places), screen)
    for descriptor in (0, 1, 2):
        os.dup2(screen if descriptor == 0 else place, descriptor)
    if "closed" in shell:
        os.closerange(0, 3)
    if "&" in shell:  # the shell waits, and a background job must not print
        modes = termios.tcgetattr(screen)
        modes[3] |= termios.TOSTOP
        termios.tcsetattr(screen, termios.TCSANOW, modes)
        if job := os.fork():
            os._exit(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]))
        os.setpgid(0, 0)
    if "nohup" in shell:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.environ.update(environment)
    config.update("jaxtyping_disable", True)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    for name, descriptor in (("stdout", 1), ("stderr", 2)):  # as Python opens them when it begins
        stream = None if "closed" in shell else open(descriptor, "w", encoding=encoding, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.exit(main(command))


def last_step(folder: Path) -> int:
    return max(read_step_records(folder), default=0) if (folder / "metrics.jsonl").is_file() else 0


def failed_starts(folder: Path) -> int:
    kinds = [json.loads(line)["kind"] for line in (folder / "attempts.jsonl").read_text().splitlines()]
    return kinds.count("start") - kinds.count("end")


@pytest.fixture(scope="module")
def config(tmp_path_factory, corpus) -> Path:
    root = tmp_path_factory.mktemp("terminals")
    tree = two_phase_config("btlm", corpus, root / "runs", steps=STEPS, checkpoint={"every_steps": 0, "keep_last": 2})
    for phase in tree["schedule"]["phases"]:
        phase["micro_batch_size"] = phase["global_batch_size"]
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return root / "config.yaml"


def stop_and_close(terminal: Terminal, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    terminal.close()
    os.kill(pid, signal.SIGCONT)


def signals_of_a_manager(terminal: Terminal, pid: int) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCONT):
        os.kill(pid, number)


ENDS: dict[str, tuple[str, Callable[[Terminal, int], object]]] = {
    "Ctrl-C, which ends tee too": ("pipe", lambda terminal, pid: (terminal.close_reader(), terminal.type(CTRL_C))),
    "Ctrl-backslash": ("", lambda terminal, pid: terminal.type(CTRL_BACKSLASH)),
    "the window is closed": ("", lambda terminal, pid: terminal.close()),
    "the window of a suspended run is closed": ("", stop_and_close),
    "hangup, output in a pipe": ("pipe", lambda terminal, pid: os.kill(pid, signal.SIGHUP)),
    "systemd: SIGTERM, SIGHUP and SIGCONT": ("pipe", signals_of_a_manager),
    "nobody reads, then SIGTERM": ("blocked pipe", lambda terminal, pid: os.kill(pid, signal.SIGTERM)),
}


CONTINUES: dict[str, tuple[str, dict[str, str], Callable[[Terminal, int], object]]] = {
    "all streams are closed": ("closed", {}, lambda terminal, pid: None),
    "the disk is full": ("full", {}, lambda terminal, pid: None),
    "the reader has exited": ("pipe", {}, lambda terminal, pid: terminal.close_reader()),
    "the reader has stopped": ("blocked pipe", {}, lambda terminal, pid: None),
    "nohup, then the window is closed": ("nohup", {}, lambda terminal, pid: terminal.close()),
    "Ctrl-S, and the window changes its size": (
        "",
        {},
        lambda terminal, pid: (terminal.type(CTRL_S), os.kill(pid, signal.SIGWINCH)),
    ),
    "a dumb terminal without a size": ("", {"TERM": "dumb"}, lambda terminal, pid: None),
    "a terminal that knows ASCII only": ("", {"PYTHONIOENCODING": "ascii"}, lambda terminal, pid: None),
    "in the background": ("&", {}, lambda terminal, pid: None),
}


@pytest.mark.parametrize("loss", ENDS)
def test_a_lost_terminal_saves_the_run(loss, config, tmp_path):
    folder, (shell, lose), terminal = config.parent / "runs" / "saved", ENDS[loss], Terminal(tmp_path)
    if "blocked" in shell:
        terminal.fill_pipe()
    before = last_step(folder)
    process = start(terminal, ["train", str(config), "run.name=saved"], shell, TERM="xterm")
    wait_until(lambda: last_step(folder) > before + 1 or not process.is_alive(), 60)
    assert process.is_alive(), process.exitcode
    lose(terminal, process.pid)
    process.join(60)
    code = wait_for_exit(process)
    terminal.close()
    assert code == REQUEUE_EXIT_CODE
    assert open_checkpoint(folder).step == last_step(folder)
    assert failed_starts(folder) == 0


@pytest.mark.parametrize("loss", CONTINUES)
def test_a_lost_terminal_does_not_end_the_run(loss, config, tmp_path):
    folder, (shell, environment, lose), terminal = (
        config.parent / "runs" / "continued",
        CONTINUES[loss],
        Terminal(tmp_path),
    )
    if "blocked" in shell:
        terminal.fill_pipe()
    before = last_step(folder)
    process = start(
        terminal,
        ["train", str(config), "run.name=continued", f"run.stop_step={before + 8}"],
        shell,
        **{"TERM": "xterm", **environment},
    )
    wait_until(lambda: last_step(folder) > before + 1 or not process.is_alive(), 60)
    if process.is_alive():
        lose(terminal, process.pid)
    process.join(60)
    code = wait_for_exit(process)
    terminal.close()
    assert code == 0
    assert last_step(folder) == before + 8
    assert failed_starts(folder) == 0
