"""The end of a terminal, of a pipe or of a launcher is not the end of a run: the run saves and exits with 85, or it continues.

One run meets one loss after the other. Each start is a fork with its own session and terminal, or with pipes. With two
ranks, the fork becomes their launcher, which takes seconds, so most losses of two run only on request (`launch/test.sh chaos`).
"""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import yaml

from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.read import open_checkpoint
from tandem.trainer.metrics.records import Sinks
from tandem.trainer.runtime import signals
from tandem.trainer.runtime.signals import REQUEUE_EXIT_CODE
from tests.promises.conftest import clean_environment, fork_tandem, read_step_records, two_phase_config, wait_for_exit
from tests.ranks import FORKSERVER
from tests.timeouts import TEST_TIMEOUT_SECONDS, wait_until

pytestmark = [pytest.mark.dist, pytest.mark.slow]
STEPS = 200
"""Of each phase: more than all starts make."""
CTRL_C, CTRL_BACKSLASH, CTRL_S = b"\x03", b"\x1c", b"\x13"


class Terminal:
    """A terminal whose screen nobody reads, and a pipe for `2>&1 | tee log`. Either can be lost."""

    def __init__(self, folder: Path) -> None:
        self.master, self.slave = pty.openpty()
        self.name = os.ttyname(self.slave)
        self.pipe = str(folder / "pipe")
        os.mkfifo(self.pipe)
        self.reader = os.open(self.pipe, os.O_RDONLY | os.O_NONBLOCK)

    def fill_pipe(self) -> None:
        """As a reader does that has stopped, such as a pager."""
        writer = os.open(self.pipe, os.O_WRONLY | os.O_NONBLOCK)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        os.close(writer)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def close_reader(self) -> None:
        os.close(self.reader)
        self.reader = -1

    def close(self) -> None:
        """Close the window, and the reader of the pipe."""
        for descriptor in (self.master, self.slave, self.reader):
            if descriptor >= 0:
                os.close(descriptor)
        self.master = self.slave = self.reader = -1


@pytest.fixture
def terminal(tmp_path) -> Iterator[Terminal]:
    found = Terminal(tmp_path)
    yield found
    found.close()


def start(terminal: Terminal, command: list[str], shell: str, **environment: str) -> BaseProcess:
    """Begin a command as the foreground job of the terminal; `shell` has the words that the shell's line adds."""
    if "blocked" in shell:
        terminal.fill_pipe()
    place = (terminal.name, terminal.pipe)
    process = FORKSERVER.Process(target=run_in_terminal, args=(*place, command, shell.split(), environment))
    process.start()
    return process


def run_in_terminal(tty: str, pipe: str, command: list[str], shell: list[str], environment: dict[str, str]) -> None:
    from jaxtyping import config

    os.setsid()
    screen = output = os.open(tty, os.O_RDWR)  # the first terminal that a session opens becomes its own
    if "pipe" in shell:
        output = os.open(pipe, os.O_WRONLY)
    elif "full" in shell:
        output = os.open("/dev/full", os.O_WRONLY)
    elif "broken" in shell:
        reader, output = os.pipe()
        os.close(reader)
    for descriptor in (0, 1, 2):
        os.dup2(screen if descriptor == 0 or ("errors" in shell and descriptor == 2) else output, descriptor)
    if "closed" in shell:
        os.closerange(0, 3)
    if "&" in shell:  # the shell waits, and a background job must not print
        modes = termios.tcgetattr(screen)
        modes[3] |= termios.TOSTOP
        termios.tcsetattr(screen, termios.TCSANOW, modes)
        if job := os.fork():
            os._exit(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]))
        os.setpgid(0, 0)
    if "masked" in shell:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP_SIGNALS)
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


def is_saved(folder: Path) -> bool:
    """Whether the newest checkpoint is of the last step, and no start counts as a failure."""
    return open_checkpoint(folder).step == last_step(folder) and failed_starts(folder) == 0


@pytest.fixture(scope="module")
def config(tmp_path_factory, corpus) -> Path:
    root = tmp_path_factory.mktemp("terminals")
    tree = two_phase_config("btlm", corpus, root / "runs", steps=STEPS, checkpoint={"every_steps": 0, "keep_last": 2})
    for phase in tree["schedule"]["phases"]:
        phase["micro_batch_size"] = phase["global_batch_size"]
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return root / "config.yaml"


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.chaos)], ids=["one rank", "two ranks"])
def lost_run(config, request) -> Iterator[tuple[Path, list[str]]]:
    """The folder and the command of the run that meets every loss. In the end it has lost no token."""
    name = f"ranks-{request.param}"
    options = [] if request.param == 1 else ["--ranks", "2", "parallel.tp_size=2"]
    folder = config.parent / "runs" / name
    yield folder, ["train", str(config), f"run.name={name}", *options]
    assert main(["audit", str(folder)]) == 0


@pytest.fixture(scope="module")
def ended_run(config) -> Path:
    """The folder of a run of one step."""
    assert wait_for_exit(fork_tandem(["train", config, "run.name=ended", "run.stop_step=1"])) == 0
    return config.parent / "runs" / "ended"


def interrupt_run_and_reader(terminal: Terminal, pid: int) -> None:
    terminal.close_reader()
    terminal.type(CTRL_C)


def suspend_and_close(terminal: Terminal, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    terminal.close()
    os.kill(pid, signal.SIGCONT)


def stop_as_systemd(terminal: Terminal, pid: int) -> None:
    for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGHUP):
        os.kill(pid, number)


ENDS: dict[str, tuple[str, Callable[[Terminal, int], object]]] = {
    "Ctrl-C, which ends tee too": ("pipe", interrupt_run_and_reader),
    "Ctrl-backslash": ("", lambda terminal, pid: terminal.type(CTRL_BACKSLASH)),
    "the window is closed": ("", lambda terminal, pid: terminal.close()),
    "the window of a suspended run is closed": ("", suspend_and_close),
    "a hangup, and output in a pipe": ("pipe", lambda terminal, pid: os.kill(pid, signal.SIGHUP)),
    "SIGTERM and SIGHUP of a service manager": ("pipe", stop_as_systemd),
    "a limit of processor time, and a parent that blocked all signals": (
        "masked",
        lambda terminal, pid: os.kill(pid, signal.SIGXCPU),
    ),
    "SIGTERM, and nobody reads": ("blocked pipe", lambda terminal, pid: os.kill(pid, signal.SIGTERM)),
}


@pytest.mark.parametrize("loss", ENDS)
def test_a_lost_terminal_saves_the_run(loss, lost_run, terminal):
    (folder, command), (shell, lose) = lost_run, ENDS[loss]
    before = last_step(folder)
    process = start(terminal, command, shell, TERM="xterm")
    wait_until(lambda: last_step(folder) > before or not process.is_alive())
    assert process.is_alive(), process.exitcode
    lose(terminal, process.pid)
    assert wait_for_exit(process) == REQUEUE_EXIT_CODE
    assert is_saved(folder)


def do_nothing(terminal: Terminal, pid: int) -> None:
    pass


def stop_output_and_resize(terminal: Terminal, pid: int) -> None:
    terminal.type(CTRL_S)
    os.kill(pid, signal.SIGWINCH)


CONTINUES: dict[str, tuple[str, dict[str, str], Callable[[Terminal, int], object]]] = {
    "all streams are closed": ("closed", {}, do_nothing),
    "the disk is full": ("full", {}, do_nothing),
    "the reader exits": ("pipe", {}, lambda terminal, pid: terminal.close_reader()),
    "the reader has stopped": ("blocked pipe", {}, do_nothing),
    "nohup, and the window is closed": ("nohup", {}, lambda terminal, pid: terminal.close()),
    "Ctrl-S, and the window is resized": ("", {"COLUMNS": "1"}, stop_output_and_resize),
    "a dumb terminal without a size, ASCII only": ("", {"TERM": "dumb", "PYTHONIOENCODING": "ascii"}, do_nothing),
    "in the background": ("&", {}, do_nothing),
}


@pytest.mark.parametrize("loss", CONTINUES)
def test_a_lost_terminal_does_not_end_the_run(loss, lost_run, terminal):
    (folder, command), (shell, environment, lose) = lost_run, CONTINUES[loss]
    before = last_step(folder)
    stop = [f"run.stop_step={before + 8}"]
    process = start(terminal, [*command, *stop], shell, **{"TERM": "xterm", **environment})
    wait_until(lambda: last_step(folder) > before or not process.is_alive())
    lose(terminal, process.pid)
    assert wait_for_exit(process) == 0
    assert last_step(folder) == before + 8
    assert is_saved(folder)


def test_two_ranks_save_if_the_window_is_closed_or_their_launcher_is_killed(config, terminal, corpus):
    """First with a screen that nobody reads, and a suspended launcher; then without any stream."""
    folder = config.parent / "runs" / "two"
    options = ["run.name=two", "parallel.tp_size=2", "--ranks", "2"]
    command = [sys.executable, "-P", "-m", "tandem.trainer", "train", str(config), *options]
    streams = {"stdin": terminal.slave, "stdout": terminal.slave, "stderr": terminal.slave}
    in_terminal = ["setsid", "--ctty", *command]
    with subprocess.Popen(in_terminal, env=clean_environment() | {"TERM": "xterm"}, **streams) as launcher:
        wait_until(lambda: last_step(folder) or launcher.poll() is not None)
        ranks = psutil.Process(launcher.pid).children()
        assert len(ranks) == 2
        terminal.type(CTRL_S)
        for number in (signal.SIGWINCH, signal.SIGSTOP, signal.SIGCONT):
            launcher.send_signal(number)
        step = last_step(folder)
        wait_until(lambda: last_step(folder) > step)
        terminal.close()
        assert launcher.wait(TEST_TIMEOUT_SECONDS) == REQUEUE_EXIT_CODE
    assert is_saved(folder)
    before = last_step(folder)
    without_streams = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    with subprocess.Popen(without_streams, env=clean_environment()) as launcher:
        wait_until(lambda: last_step(folder) > before or launcher.poll() is not None)
        ranks = psutil.Process(launcher.pid).children()
        assert len(ranks) == 2
        launcher.kill()
    wait_until(lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks))
    assert is_saved(folder)
    assert main(["audit", str(folder)]) == 0


RANK = """#!/bin/sh
exec 2> /dev/null
echo $RANK >> {starts}
{action}
while :; do sleep 0.02; done
"""
SAVE = "trap 'exit 85' TERM INT HUP QUIT USR1 USR2 XCPU"


@pytest.fixture
def launch_ranks(tmp_path) -> Callable[..., tuple[int | None, str, int]]:
    """launch_ranks(action of each rank, signals..., **environment): exit code, output and number of starts of two programs that
    the launcher starts as its ranks.
    """

    def run(action: str, *numbers: int, pause: float = 0, **environment: str) -> tuple[int | None, str, int]:
        program, log, starts = (tmp_path / name for name in ("rank", "log", "starts"))
        for file in (log, starts):
            file.unlink(missing_ok=True)
        program.write_text(RANK.format(starts=starts, action=action))
        program.chmod(0o755)
        process = FORKSERVER.Process(
            target=run_launcher, args=(log, {"PYTHON_EXEC": str(program), "MAX_RESTARTS": "2", **environment})
        )
        process.start()
        for number in numbers:
            wait_until(lambda: starts.exists() and len(starts.read_text().split()) == 2)
            time.sleep(pause)
            os.kill(process.pid, number)
        code = wait_for_exit(process)
        return code, log.read_text(), len(starts.read_text().split()) if starts.exists() else 0

    return run


def run_launcher(log: Path, environment: dict[str, str]) -> None:
    from tandem.trainer.runtime import agent

    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    for number in (signal.SIGHUP, signal.SIGCHLD):
        if environment.pop(number.name, None):
            signal.signal(number, signal.SIG_IGN)
    signals.SIGNAL_DEBOUNCE_SECONDS = float(environment.pop("debounce", signals.SIGNAL_DEBOUNCE_SECONDS))
    os.environ.update(environment)
    sys.exit(agent.launch(["--standalone", "--nproc-per-node=2", "-m", "a_rank"]))


@pytest.mark.parametrize("number", signals.STOP_SIGNALS, ids=lambda number: number.name)
def test_the_launcher_returns_85_if_its_ranks_saved_after_a_signal(number, launch_ranks):
    assert launch_ranks(SAVE, number) == (REQUEUE_EXIT_CODE, "", 2)


def test_the_launcher_returns_what_its_ranks_returned(launch_ranks):
    code, log, starts = launch_ranks("exit 0")
    assert (code, log, starts) == (0, "", 2)
    code, log, starts = launch_ranks("[ $RANK = 0 ] && exit 2")
    assert (code, log, starts) == (2, "", 2), "a user error starts no rank again"
    code, log, starts = launch_ranks("[ $RANK = 1 ] && exit 7")
    assert (code, starts) == (1, 6), "two restarts"
    assert log.count("local rank 1 ended with exit code 7") == 3
    assert "Traceback" not in log
    code, log, _ = launch_ranks("exit 0", MAX_RESTARTS="many")
    assert (code, log.count("MAX_RESTARTS=many is not valid")) == (2, 1)


def test_a_second_signal_to_the_launcher_ends_its_ranks_only_if_it_insists(launch_ranks):
    slow = "trap 'trap - TERM HUP; sleep 1; exit 85' TERM HUP"
    options = {"pause": 0.2, "debounce": "0.1"}
    assert launch_ranks(slow, signal.SIGTERM, signal.SIGHUP, **options)[:2] == (REQUEUE_EXIT_CODE, "")
    code, log, _ = launch_ranks(slow, signal.SIGHUP, signal.SIGTERM, **options)
    assert code == 1
    assert log.count("was killed by SIGTERM") == 2


def test_the_launcher_ignores_a_hangup_under_nohup(launch_ranks):
    only_terminated = "trap 'exit 1' HUP; trap 'exit 85' TERM"
    assert launch_ranks(only_terminated, signal.SIGHUP, signal.SIGTERM, SIGHUP="ignored")[0] == REQUEUE_EXIT_CODE


def test_the_launcher_sees_a_failed_rank_although_its_parent_ignored_children(launch_ranks):
    """Otherwise the system would report that every rank has succeeded."""
    code, log, starts = launch_ranks("[ $RANK = 1 ] && exit 7", MAX_RESTARTS="0", SIGCHLD="ignored")
    assert (code, starts) == (1, 2)
    assert "local rank 1 ended with exit code 7" in log


VERBS: dict[str, tuple[list[str], str, int, str]] = {
    "prepare, closed streams": (["prepare"], "closed", 0, ""),
    "prepare, full disk": (["prepare"], "full", 0, ""),
    "report, no reader": (["report", "RUN"], "broken errors", 0, ""),
    "inspect, no reader": (["inspect", "CORPUS", "--row", "0"], "broken errors", 141, ""),
    "verify, no reader": (["verify", "CORPUS"], "broken errors", 141, ""),
    "audit, full disk": (
        ["audit", "RUN"],
        "full errors",
        2,
        "tandem: standard output: cannot be written (No space left",
    ),
}
"""Verb -> command, streams, exit code, and what standard error has."""


@pytest.mark.parametrize("verb", VERBS)
def test_other_verbs_lose_their_output_quietly(verb, ended_run, corpus, terminal, tmp_path):
    command, shell, code, message = VERBS[verb]
    places = {"RUN": str(ended_run), "CORPUS": str(corpus)}
    words = [places.get(word, word) for word in command]
    if words == ["prepare"]:
        modules = str(corpus.parent / "modules.jsonl")
        words += ["--input", modules, "--output", str(tmp_path / "out"), "--vocab-size", "300", "--workers", "1"]
    assert wait_for_exit(start(terminal, words, shell, TERM="dumb")) == code
    os.set_blocking(terminal.master, False)
    screen = b""
    with suppress(BlockingIOError, OSError):
        while True:
            screen += os.read(terminal.master, 4096)
    assert screen.decode().startswith(message)
    assert screen.count(b"\n") == bool(message)
    assert words[0] != "prepare" or main(["verify", str(tmp_path / "out")]) == 0


def test_a_hangup_leaves_nothing_half_written(config, corpus, terminal, tmp_path):
    """It ends other verbs as Ctrl-C does, which removes their temporary files; prepare continues."""
    output = tmp_path / "out"
    options = ["--input", str(corpus.parent / "modules.jsonl"), "--output", str(output), "--vocab-size", "300"]
    process = start(terminal, ["prepare", *options, "--workers", "1"], "", TERM="xterm")
    wait_until(lambda: output.exists() or not process.is_alive())
    terminal.close()
    assert wait_for_exit(process) == 130
    assert main(["prepare", *options, "--workers", "1"]) == 0
    assert main(["verify", str(output)]) == 0


class FailingView:
    def write(self, record: dict) -> None:
        raise SystemExit(1)  # as rich does if a pipe is closed

    def close(self) -> None:
        raise OSError


class Records:
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def write(self, record: dict) -> None:
        self.kinds.append(record["kind"])

    def close(self) -> None:
        self.kinds.append("closed")


def test_a_view_that_fails_is_left_out_after_one_warning(caplog):
    records, other = Records(), Records()
    sinks = Sinks([records, FailingView(), other], 0)
    for step in (1, 2):
        sinks.write_validation(step, 100, 3.0)
    sinks.close()
    assert records.kinds == other.kinds == ["validation", "validation", "closed"]
    assert [record.getMessage() for record in caplog.records] == [
        "FailingView: failed (SystemExit(1)); training continues without it"
    ]
