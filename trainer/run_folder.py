"""The folder of a run: one run at a time trains there, and it holds the config, machine, versions and command of each start."""

import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from tandem.trainer.config import UserError
from tandem.trainer.disk import TEMPORARY_PATTERN, atomic_write

log = logging.getLogger(__name__)
CONFIG_FILE = "config.yaml"
LOCK_FILE = ".held"
"""File in a run folder that the run which trains there has locked."""
LOCK_TIMEOUT_SECONDS = 20.0
REPORTED_PACKAGES = ("deepspeed", "megatron-core", "triton", "omegaconf", "wandb", "transformers", "tokenizers")


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Within the block no other run trains in the folder, as far as its file system can tell.

    Waits some seconds first, for ranks that are still on their way out.
    Raises: UserError when another run keeps the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise UserError(f"run.root: {folder} cannot be made ({reason}); name a folder you can write to") from None
    with open(folder / LOCK_FILE, "a+") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        while not _try_lock(file):
            file.seek(0)
            if time.monotonic() > deadline:
                raise UserError(
                    f"{folder}: {file.read() or 'another process'} is training there; a run folder has one run at a time; "
                    "stop that one or change run.name"
                )
            time.sleep(0.5)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning(
            "%s: this file system has no locks (%s): nothing keeps a second run away", file.name, error.strerror
        )
    return True


def open_run_folder(folder: Path, config_yaml: str) -> None:
    """The folder holds this start's config and environment; those of earlier starts stay beside them when they differ."""
    folder.mkdir(parents=True, exist_ok=True)
    for temporary_file in [*folder.glob(TEMPORARY_PATTERN), *folder.glob(f"*/{TEMPORARY_PATTERN}")]:
        temporary_file.unlink(missing_ok=True)
    config_file = folder / CONFIG_FILE
    if config_file.exists() and config_file.read_text() != config_yaml:
        number = len(list(folder.glob("config.before-*.yaml"))) + 1
        config_file.rename(folder / f"config.before-{number}.yaml")
        log.warning("the config differs from the last start's, which is kept as config.before-%d.yaml", number)
    atomic_write(config_file, config_yaml)
    atomic_write(folder / "environment.json", json.dumps(describe_environment(), indent=2) + "\n")


def describe_environment() -> dict[str, Any]:
    """Versions, machine, command and commit of this process: what someone needs to explain or repeat the run.

    Where git is absent or this is no checkout, the commit is the variable TANDEM_COMMIT, or None.
    """
    import torch

    # With torch's build, +cu130 for example, which the package's version may lack.
    versions = {"torch": str(torch.__version__)}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    root = Path(__file__).resolve().parent.parent
    return {
        "time": time.time(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": versions,
        "commit": _git_output(root, "rev-parse", "HEAD") or os.environ.get("TANDEM_COMMIT"),
        "uncommitted": _git_output(root, "status", "--porcelain"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _git_output(root: Path, *arguments: str) -> str | None:
    try:
        completed = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.strip() if completed.returncode == 0 else None
