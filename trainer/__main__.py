"""The verbs of the `tandem` command. Each imports only its own module. A user error prints one line and exits with code 2."""

from tandem.trainer.runtime.search_path import leave_out_working_folder

leave_out_working_folder(run_by_name=__name__ == "__main__")  # before any other import

import argparse
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from tandem.trainer.config import TrainConfig, UserError, check_world_size, load_config
from tandem.trainer.config.addresses import hide_secrets
from tandem.trainer.config.outside import escape_control_characters
from tandem.trainer.runtime import launch, process, signals, streams
from tandem.trainer.runtime.launcher import RENDEZVOUS_NAME, launcher_command
from tandem.trainer.runtime.private_folder import set_private_folders

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT
"""The exit code that a shell reports after Ctrl-C."""
CLOSED_PIPE_EXIT_CODE = 128 + signal.SIGPIPE

VERBS = {
    "prepare": ("tandem.data_prep.prepare", "tokenize text into shards with a manifest"),
    "verify": ("tandem.data_prep.verify", "check a prepared corpus against its manifest"),
    "inspect": ("tandem.data_prep.inspect", "describe a prepared corpus, or print the text of its rows and documents"),
    "train": ("tandem.trainer.__main__", "train on this machine, or as one rank of torchrun, deepspeed or srun"),
    "evaluate": ("tandem.trainer.tools.evaluate", "measure the loss on held-out rows, by position"),
    "generate": ("tandem.trainer.tools.generate", "continue prompts with the weights of a model"),
    "import-hf": ("tandem.trainer.tools.convert_hf", "import a Hugging Face folder, so that a run can start from its weights"),
    "export-hf": ("tandem.trainer.tools.convert_hf", "export a checkpoint of a run to a Hugging Face folder"),
    "audit": ("tandem.trainer.tools.audit", "prove from a run's ledger that no token was lost or repeated"),
    "checkpoint": ("tandem.trainer.tools.checkpoints", "list and verify the checkpoints of a run, or compare two"),
    "report": ("tandem.trainer.tools.report", "write an HTML page with the plots of a run"),
    "bench": ("tandem.trainer.tools.bench", "measure a config's training speed, memory use and time per part of a step"),
    "mup-check": ("tandem.trainer.tools.mup", "check a config's muP: coordinates, learning-rate transfer, weight decay"),
}  # fmt: skip

VERBS_THAT_WRITE_FILES = {"prepare", "train", "import-hf", "export-hf", "report"}
"""A lost standard output does not end these verbs, because their result is in files."""

UNUSABLE_PATH_ERRNOS = {errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP}
"""What every use of a path that a user has named can raise."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong command in one line, without the usage that argparse prints first."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("tandem").strip() or "command"
        raise UserError(f"{command}: {message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Return 0 if it succeeds, 1 if a check fails, 2 for a user error, 85 if a signal stopped a run, 130 after
    Ctrl-C, and 141 if the reader of the output closed the pipe.
    """
    if argv is None:
        argv = sys.argv[1:]
        sys.argv[1:] = map(hide_secrets, argv)  # wandb and environment.json record it
    os.environ["PYTHONSAFEPATH"] = "1"  # ranks and workers leave out the working folder too
    # deepspeed and torch.distributed.launch add a flag of their own; the rank comes from the environment.
    argv = [argument for argument in argv if not argument.startswith(("--local_rank", "--local-rank"))]
    signals.reset_inherited_signals()
    process.silence_library_warnings()
    process.escape_messages()
    verb = next((argument for argument in argv if not argument.startswith("-")), None)
    streams.protect_streams(stdout_is_view=verb in VERBS_THAT_WRITE_FILES)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        # A closed terminal is handled like Ctrl-C, so that temporary files are removed.
        signal.signal(signal.SIGHUP, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        try:
            process.check_working_folder()
            set_private_folders()
            return run_verb(verb, argv)
        finally:
            sys.stdout.flush()
    except UserError as error:
        has_own_agent = os.environ.get("TORCHELASTIC_RUN_ID") == RENDEZVOUS_NAME  # it reads the exit code of this rank
        if launch.is_later_rank() and not (has_own_agent and os.environ.get("LOCAL_RANK") == "0"):
            # Usually rank 0 prints the same error, and the launcher then terminates this rank. If not, print it after a delay.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(8)
        print(f"tandem: {escape_control_characters(str(error), one_line=True)}", file=sys.stderr, flush=True)
        if {"TORCHELASTIC_RUN_ID", "RANK"} <= os.environ.keys() and not has_own_agent:
            os.kill(os.getppid(), signal.SIGTERM)  # otherwise torchrun would restart all ranks in vain
        return USER_ERROR_EXIT_CODE
    except KeyboardInterrupt as interrupt:
        kept = escape_control_characters(f"; {interrupt}" if str(interrupt) else "")
        print(f"tandem: interrupted{kept}", file=sys.stderr, flush=True)
        return INTERRUPTED_EXIT_CODE
    except streams.OutputClosed:  # the reader, for example `head`, has exited
        return CLOSED_PIPE_EXIT_CODE


def run_verb(chosen_verb: str | None, argv: list[str]) -> int:
    """Parse the arguments of one verb and run it."""
    top = Parser(prog="tandem", description="Distributed pretraining of BTLM and Stable LM 2.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (module, description) in VERBS.items():
        parser = verbs.add_parser(name, help=description, description=description)
        if name == chosen_verb:
            add, run = load_verb(name, module)
            add(parser)
            parser.set_defaults(run=run)
    arguments, rest = top.parse_known_args(argv)
    for name, value in vars(arguments).items():
        if isinstance(value, Path):  # a shell leaves the ~ in --tokenizer=~/x
            setattr(arguments, name, Path(os.path.expanduser(value)))
    if rest and hasattr(arguments, "overrides") and not any(each.startswith("-") for each in rest):
        arguments.overrides.extend(rest)  # argparse takes no more overrides after an option
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return arguments.run(arguments) or 0
    except OSError as error:
        # A run checks its paths itself: later, such an error needs its traceback.
        if isinstance(error, UserError) or chosen_verb == "train" or error.errno not in UNUSABLE_PATH_ERRNOS:
            raise
        raise UserError(f"{error.filename}: {error.strerror}; correct the path or its permissions") from None


def load_verb(name: str, module: str) -> tuple[Callable[..., None], Callable[..., int | None]]:
    """Return `add_arguments` and `run` of a verb. In a module with several verbs, their names contain the verb."""
    if name == "train":  # importing this module by its name would execute it again
        return add_train_arguments, run_train
    verb_module, suffix = import_module(module), name.replace("-", "_")
    if hasattr(verb_module, f"run_{suffix}"):
        return getattr(verb_module, f"add_{suffix}_arguments"), getattr(verb_module, f"run_{suffix}")
    return verb_module.add_arguments, verb_module.run


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file of the run, or a shipped config, for example demo-btlm")
    parser.add_argument("overrides", nargs="*", help="section.field=value replaces this field of the file")
    ranks_help = "ranks that torchrun starts on this machine (default: the number of GPUs, or tp_size without a GPU)"
    parser.add_argument("--ranks", type=int, help=ranks_help)
    parser.add_argument("--check-only", action="store_true", help=argparse.SUPPRESS)  # set by launch/deepspeed.sh


def run_train(arguments: argparse.Namespace) -> int:
    """Train as one rank, or replace this process with torchrun if the run needs several ranks or --ranks is given."""
    process.set_parent_death_signal()  # before the imports, which take seconds
    config = load_config(arguments.config, arguments.overrides)
    found = launch.current_launch()
    num_ranks = launch.ranks_to_start(found, arguments.ranks, config.parallel.tp_size)
    launch.set_num_threads(os.environ, found, num_ranks)
    check_world_size(config, num_ranks or found.world_size)
    if not num_ranks:
        stop_signal = signals.StopSignal()  # before the imports, which take seconds
        try:
            check_start(config, starts_rank_0=found.rank == 0)
        except UserError:
            stop_signal.close()
            raise
        from tandem.trainer.train import run

        code = run(config, stop_signal)
        return process.force_exit(code) if code == signals.REQUEUE_EXIT_CODE else code
    check_start(config)
    if arguments.check_only:
        return 0
    sys.stdout.flush()
    # Replace this process, so that signals reach the launcher, which forwards them to the ranks. Block them until it is ready.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.heeded_signals())
    os.execv(sys.executable, launcher_command(num_ranks, ["train", str(arguments.config), *arguments.overrides]))


def check_start(config: TrainConfig, *, starts_rank_0: bool = True) -> None:
    """Check what files of this machine show without torch, so that a mistake ends no rank late. The run checks it again.

    Corpora at remote addresses are left out, because a server can take minutes. Checkpoints are not hashed.
    Raises: UserError
    """
    from tandem.trainer.checkpoint import compatibility, layout
    from tandem.trainer.crash_loop import check_repeat_failures
    from tandem.trainer.data import corpora
    from tandem.trainer.run_folder import check_run_folder, load_previous_config

    folder, data = Path(config.run.root) / config.run.name, corpora.without_remote_addresses(config.data)
    check_run_folder(folder)
    if starts_rank_0:  # the start that rank 0 records is no failure
        check_repeat_failures(folder, config.run.max_repeat_failures)
    manifests = corpora.load_corpora(data, config.model.vocab_size)
    corpora.check_tokenizer_file(data, manifests)
    corpora.find_data_end(data, config.schedule, manifests)
    for phase in config.schedule.phases if config.evaluate.every_steps else []:
        corpora.check_held_out_tokens(data, manifests, phase, config.evaluate.tokens)
    if newest := layout.find_newest(folder / "checkpoints"):
        fingerprints = {source: corpus.fingerprint for source, corpus in manifests.items()}
        shuffle_settings = corpora.shuffle_settings(data, config.run.seed)
        compatibility.check_resumable(config, layout.SavedCheckpoint(newest), fingerprints, shuffle_settings)
        return
    load_previous_config(folder)
    if config.run.init_from is not None:
        initial = Path(config.run.init_from)
        chosen = layout.choose_checkpoint(initial, layout.find_newest, layout.find_damage_by_size)
        checkpoint = layout.SavedCheckpoint(chosen)
        compatibility.check_initial_model(config, checkpoint)
        if config.run.init_from_tokenizer == "same":
            compatibility.check_initial_tokenizer(checkpoint, data, manifests)


if __name__ == "__main__":
    sys.exit(main())
