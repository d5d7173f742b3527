"""torchrun's agent, which starts the ranks of one machine, with the signals and the exit codes of a run on one rank.

torchrun itself exits with 1 and a traceback after a signal, a user error or a crash. A second signal ends it before its ranks.
"""

import logging
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

# torch fails to import if LOGLEVEL is no name of a level in capitals. Many programs write `info`.
if (level := os.environ.pop("LOGLEVEL", "").upper()) in logging.getLevelNamesMapping():
    os.environ["LOGLEVEL"] = level

import torch.distributed.launcher.api as launcher_api
from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from tandem.trainer.config import UserError
from tandem.trainer.config.outside import escape_control_characters
from tandem.trainer.runtime import signals, streams
from tandem.trainer.runtime.agent_rendezvous import use_rendezvous
from tandem.trainer.runtime.launcher import RENDEZVOUS_NAME

USER_ERROR_EXIT_CODE = 2
ENVIRONMENT = {
    # A step, a save in progress and the final save take tens of seconds, and torchrun's own limit is 30. It waits as long for a
    # frozen rank.
    "PET_SHUTDOWN_TIMEOUT": "180",
}
"""Defaults of torchrun's environment variables. A variable that is already set keeps its value."""


class Agent(LocalElasticAgent):
    """Restarts failed ranks, but not after a user error."""

    launcher: "Launcher"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.launcher.agent = self

    def exit_codes(self) -> dict[int, int | None]:
        """Return the exit codes of this machine's ranks by local rank, negative for a signal, and None for running ranks."""
        if not isinstance(self._pcontext, SubprocessContext):  # before the first start
            return {}
        return {rank: handler.proc.poll() for rank, handler in self._pcontext.subprocess_handlers.items()}

    def send_signal(self, number: int) -> None:
        for pid in self._pcontext.pids().values() if self._pcontext else ():
            os.kill(pid, number)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self.launcher.raise_signal()  # again, if a library caught the exception
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            codes = self.exit_codes()
            if USER_ERROR_EXIT_CODE in codes.values():
                self._remaining_restarts = 0
            elif self._remaining_restarts:
                print(f"tandem: {describe(codes)}; starting all ranks again", file=sys.stderr, flush=True)
        return result


class Launcher:
    """Handles the signals of the process that starts the ranks.

    The first one is passed on to the ranks, which save. A later one, if it insists, ends the ranks.
    """

    def __init__(self) -> None:
        self.agent: Agent | None = None
        self.signal_number: signal.Signals | None = None
        self.is_forced = False
        self._signal_time = 0.0
        for number in signals.heeded_signals():
            signal.signal(number, self._on_signal)
        signals.reset_inherited_signals()  # `run_train` blocked them before the imports

    def raise_signal(self) -> None:
        if self.signal_number:
            raise SignalException(self.signal_number.name, self.signal_number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.signal_number:
            self.signal_number, self._signal_time = signal.Signals(number), time.monotonic()
            if not self.agent:  # there is nothing to save yet
                os._exit(signals.REQUEUE_EXIT_CODE)
            self.raise_signal()
        elif self.agent and signals.is_insisting(number, self._signal_time):
            self.is_forced = True
            self.agent.send_signal(number)

    def exit_code(self) -> int:
        """Return the exit code of the run on this machine, after all its ranks have ended."""
        codes = set((self.agent.exit_codes() if self.agent else {}).values())
        if USER_ERROR_EXIT_CODE in codes:
            return USER_ERROR_EXIT_CODE
        if self.signal_number and not self.is_forced:
            codes.discard(-self.signal_number)  # a rank that was only beginning
            codes = codes or {signals.REQUEUE_EXIT_CODE}
        if codes <= {0, signals.REQUEUE_EXIT_CODE}:
            return max(code or 0 for code in codes)
        return 1


def launch(arguments: list[str]) -> int:
    """Start ranks with torchrun's command line. Return the exit code of the run.

    It is 0 if the run is finished, 85 if it saved after a signal, 2 after a user error, and otherwise 1.
    """
    streams.protect_streams(stdout_is_view=True)
    launcher = Agent.launcher = Launcher()
    launcher_api.LocalElasticAgent = Agent  # type: ignore[misc]
    if "LOGLEVEL" not in os.environ:  # torchrun's variable for its own messages, which we replace
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        set_defaults()
        # torchrun must not replace the handlers of `launcher`. It wants at least one signal, and nobody sends this one.
        options = run.parse_args(["--signals-to-handle=SIGURG", *use_rendezvous(), *arguments])
        # Not torchrun's rendezvous, which others can reach, even if --standalone, --rdzv-backend or PET_STANDALONE ask for it.
        options.standalone, options.rdzv_backend, options.rdzv_id = False, RENDEZVOUS_NAME, RENDEZVOUS_NAME
        run.run(options)
    except UserError as error:
        print(f"tandem: {escape_control_characters(str(error), one_line=True)}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT_CODE
    except RendezvousError as error:
        reason = f"{error} ({error.__cause__})" if error.__cause__ else str(error) or type(error).__name__
        print(f"tandem: the machines no longer find one another: {reason}".splitlines()[0], file=sys.stderr, flush=True)
        return 1
    except (ChildFailedError, SignalException):
        exit_code = launcher.exit_code()
        if exit_code == 1 and launcher.agent:
            print(f"tandem: {describe(launcher.agent.exit_codes())}", file=sys.stderr, flush=True)
        return exit_code
    return 0


def set_defaults() -> None:
    """Set torchrun's environment variables that the user has not set.  Raises: UserError if MAX_RESTARTS is not a number."""
    restarts = os.environ.get("MAX_RESTARTS", "100")
    if not restarts.isdecimal():
        raise UserError(f"MAX_RESTARTS={restarts} is not valid; use a whole number of at least 0")
    for name, value in {"PET_MAX_RESTARTS": restarts, **ENVIRONMENT}.items():
        os.environ.setdefault(name, value)


def describe(codes: dict[int, int | None]) -> str:
    """Name the ranks of this machine that failed, and how."""
    words = []
    for rank, code in codes.items():
        if code:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            words.append(f"local rank {rank} {how}")
    return ", ".join(words) or "the ranks could not be started"


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
