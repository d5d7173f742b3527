"""The verbs of `tandem`. Each imports what it runs and nothing else; mistakes of the user end in one line and exit code 2."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from tandem.trainer.config import UserError, check_world_size, load_config
from tandem.trainer.runtime import (
    REQUEUE_EXIT_CODE,
    StopSignal,
    force_exit,
    is_launched,
    launch_rank,
    num_gpus,
    set_parent_death_signal,
    silence_library_warnings,
)

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT
"""What a shell reports of a command that Ctrl-C has ended."""
CLOSED_PIPE_EXIT_CODE = 128 + signal.SIGPIPE

VERBS = {
    "prepare": ("tandem.data_prep.prepare", "text to tokenized shards and a manifest"),
    "verify": ("tandem.data_prep.verify", "read a prepared corpus again and compare it with its manifest"),
    "inspect": ("tandem.data_prep.inspect", "what a prepared corpus is, and the text of its rows and documents"),
    "train": ("tandem.trainer.__main__", "train: on this machine, or as one rank of torchrun, deepspeed or srun"),
    "evaluate": ("tandem.trainer.tools.evaluate", "loss on held-out rows, by position"),
    "generate": ("tandem.trainer.tools.generate", "continue a prompt"),
    "import-hf": ("tandem.trainer.tools.convert_hf", "a Hugging Face folder to weights a run can start from"),
    "export-hf": ("tandem.trainer.tools.convert_hf", "a run's newest checkpoint to a Hugging Face folder"),
    "audit": (
        "tandem.trainer.tools.audit",
        "prove from a run's ledger that no token was lost or repeated, or list what was",
    ),
    "checkpoint": (
        "tandem.trainer.tools.checkpoints",
        "what a run has saved: list it, verify it, compare two checkpoints",
    ),
    "report": ("tandem.trainer.tools.report", "one HTML page with the plots of a run"),
    "bench": (
        "tandem.trainer.tools.bench",
        "speed, memory and time by part of the run's own training steps, on synthetic rows",
    ),
    "mup-check": (
        "tandem.trainer.tools.mup",
        "whether a config's muP holds: coordinates, learning-rate transfer, weight decay",
    ),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command in one line, where argparse would print the usage first."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("tandem").strip() or "command"
        raise UserError(f"{command}: {message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0 done, 2 the user's mistake, 85 saved on a signal, 130 interrupted,
    141 nobody reads the output any longer.
    """
    argv = sys.argv[1:] if argv is None else argv
    # The deepspeed launcher adds its own flag in front of or behind ours; the rank comes from the environment.
    argv = [argument for argument in argv if not argument.startswith("--local_rank")]
    silence_library_warnings()
    try:
        return run_verb(argv)
    except UserError as error:
        if launch_rank():
            # Rank 0 says the same, and the launcher then ends us; unless only this rank met it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(8)
        print(f"tandem: {error}", file=sys.stderr, flush=True)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun would start all ranks again, to the same end
        return USER_ERROR_EXIT_CODE
    except KeyboardInterrupt as interrupt:
        print(f"tandem: interrupted{f'; {interrupt}' if str(interrupt) else ''}", file=sys.stderr, flush=True)
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        # Whoever read our output, `head` say, has enough; what Python still holds back must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE_EXIT_CODE


def run_verb(argv: list[str]) -> int:
    """The verb's module gives its arguments and runs them."""
    top = Parser(prog="tandem", description="Distributed pretraining of BTLM and Stable LM 2.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    chosen_verb = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, (module, description) in VERBS.items():
        parser = verbs.add_parser(name, help=description, description=description)
        if name == chosen_verb:
            add, run = load_verb(name, module)
            add(parser)
            parser.set_defaults(run=run)
    arguments = top.parse_args(argv)
    return arguments.run(arguments) or 0


def load_verb(name: str, module: str) -> tuple[Callable[..., None], Callable[..., int | None]]:
    """`add_arguments` and `run` of the verb; where one module serves several verbs they carry the verb's name."""
    if name == "train":
        return add_train_arguments, run_train
    verb_module, suffix = import_module(module), name.replace("-", "_")
    if hasattr(verb_module, f"run_{suffix}"):
        return getattr(verb_module, f"add_{suffix}_arguments"), getattr(verb_module, f"run_{suffix}")
    return verb_module.add_arguments, verb_module.run


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument(
        "--ranks",
        type=int,
        help="ranks that torchrun starts on this machine; default: its GPUs, or tp_size without one",
    )


def run_train(arguments: argparse.Namespace) -> int:
    """One rank of a launch; or the launcher of one local node, where it is more than a rank or --ranks asks for a launcher."""
    set_parent_death_signal()  # first: the imports take seconds
    config = load_config(arguments.config, arguments.overrides)
    num_ranks = arguments.ranks or num_gpus() or config.parallel.tp_size
    if not arguments.ranks and (is_launched() or num_ranks == 1):
        stop_signal = StopSignal()  # before the imports, which take seconds
        from tandem.trainer.train import run

        code = run(config, stop_signal)
        return force_exit(code) if code == REQUEUE_EXIT_CODE else code
    check_world_size(config, num_ranks)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    # Replaces this process, so that signals reach torchrun, which passes them on to the ranks.
    sys.stdout.flush()
    os.execv(sys.executable, [*launcher, "-m", "tandem.trainer", "train", str(arguments.config), *arguments.overrides])


if __name__ == "__main__":
    sys.exit(main())
