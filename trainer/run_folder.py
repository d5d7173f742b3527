"""The run folder: its lock, and the config, machine, versions and command of each start."""

import errno
import fcntl
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from tandem.trainer.config import TrainConfig, UserError, load_saved_config, parse_content
from tandem.trainer.config.addresses import hide_secrets
from tandem.trainer.config.outside import read_file, read_json
from tandem.trainer.disk import TEMPORARY_PATTERN, atomic_write, open_no_follow
from tandem.trainer.runtime.private_folder import lock_holder, sharing_fault, user_name
from tandem.trainer.runtime.processors import usable_processors

log = logging.getLogger(__name__)
CONFIG_FILE, ENVIRONMENT_FILE = "config.yaml", "environment.json"
LOCK_FILE = ".held"
"""File in the run folder that the running process locks."""
LOCK_TIMEOUT_SECONDS = 20.0
UNUSABLE_NAME_ERRNOS = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EPERM,
}  # fmt: skip
"""A folder in place of a file, a file in place of a folder, a loop of links, or no permission."""
REPORTED_PACKAGES = ("deepspeed", "megatron-core", "triton", "omegaconf", "wandb", "transformers", "tokenizers")


@dataclass(frozen=True)
class Environment:
    """environment.json: what explains or reproduces a start. Fields that an older version did not write are absent."""

    time: float | None = None
    command: list[str] = field(default_factory=list)
    python: str | None = None
    platform: str | None = None
    processors: int | None = None
    packages: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    uncommitted: str | None = None
    slurm_job: str | None = None


def create_run_folder(folder: Path) -> None:
    """Create the folder and its parents. Raises: UserError if that fails."""
    check_run_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _folder_error(folder, "cannot be created", error.errno) from None


def check_run_folder(folder: Path) -> None:
    """Raises: UserError unless the folder, or the nearest of its parents that exists, is a folder that one can write to."""
    existing, code = None, 0
    try:
        existing = next(each for each in (folder, *folder.absolute().parents) if _exists(each))
        code = 0 if existing.is_dir() else errno.ENOTDIR
    except OSError as error:
        code = error.errno or errno.EIO
    if existing and not code and not os.access(existing, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
    if code:
        raise _folder_error(folder, "cannot be written to" if existing == folder else "cannot be created", code)


def _exists(path: Path) -> bool:
    """Whether the path names something, even a link to nothing. Raises: OSError if that cannot be found out."""
    with suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()
        return True
    return False


def _folder_error(folder: Path, problem: str, code: int | None) -> UserError:
    return UserError(f"run.root: {folder} {problem} ({os.strerror(code or 0)}); name a folder you can write to")


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of the run folder during the block, if its file system has locks.

    Waits up to LOCK_TIMEOUT_SECONDS for the lock, because ranks of an earlier start may still be exiting.
    Raises: UserError if another run keeps the lock.
    """
    create_run_folder(folder)
    with _open_lock_file(folder) as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        while not _try_lock(file):
            file.seek(0)
            if time.monotonic() > deadline:
                holder = lock_holder(file.fileno()) or file.read() or "another process"
                raise UserError(
                    f"{folder}: {holder} is training in it; only one run at a time can use a run folder; stop that run or "
                    "change run.name"
                )
            time.sleep(0.5)
        file.truncate(0)
        file.write(f"process {os.getpid()} of {user_name(os.geteuid())} on {platform.node()}")
        file.flush()
        yield


def _open_lock_file(folder: Path) -> TextIO:
    """Open the lock file so that only users who can write in the folder can lock it.

    Raises: UserError if it cannot be opened, or if it is a link or has a second name.
    """
    path = folder / LOCK_FILE
    try:
        file = open(path, "a+", opener=open_no_follow)  # noqa: SIM115
        status = os.fstat(file.fileno())
        if status.st_nlink > 1:
            file.close()
            raise OSError(errno.EMLINK, "it has a second name, whose file would be overwritten")
        if status.st_uid == os.geteuid():
            writers = folder.stat().st_mode & 0o222
            os.fchmod(file.fileno(), writers | writers << 1)
        return file
    except OSError as error:
        owner = user_name(path.lstat().st_uid) if os.path.lexists(path) else "nobody"
        raise UserError(
            f"run.root: {path} of {owner} cannot be opened ({error.strerror}); change run.name or run.root"
        ) from None


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        message = "%s: this file system has no locks (%s), so a second run could use the folder"
        log.warning(message, file.name, error.strerror)
    return True


def load_previous_config(folder: Path) -> TrainConfig | None:
    """Return the config of the last start, or None if there was none.  Raises: UserError if it does not load."""
    config_file = folder / CONFIG_FILE
    if not os.path.lexists(config_file):
        return None
    try:
        return load_saved_config(config_file)
    except UserError as error:
        remedy = "use the version that wrote it, or choose another run.name"
        raise UserError(f"{config_file}: does not load in this version ({error}); {remedy}") from None


def open_run_folder(folder: Path, config_yaml: str) -> None:
    """Write this start's config and environment. Keep the last start's config next to it if they differ."""
    folder.mkdir(parents=True, exist_ok=True)
    if fault := sharing_fault(folder):
        log.warning("run.root: %s %s; the run continues from checkpoints in it", folder, fault)
    for temporary_file in [*folder.glob(TEMPORARY_PATTERN), *folder.glob(f"*/{TEMPORARY_PATTERN}")]:
        temporary_file.unlink(missing_ok=True)
    _keep_config(folder, config_yaml)
    atomic_write(folder / CONFIG_FILE, config_yaml)
    atomic_write(folder / ENVIRONMENT_FILE, json.dumps(describe_environment(), indent=2) + "\n")


@contextmanager
def named_errors() -> Iterator[None]:
    """Raises: UserError in place of an OSError of the block that says that a name in the run folder is not what it must be."""
    try:
        yield
    except OSError as error:
        if isinstance(error, UserError) or error.errno not in UNUSABLE_NAME_ERRNOS or not error.filename:
            raise
        name = error.filename2 or error.filename
        problem = f"cannot be used by a run ({error.strerror})"
        raise UserError(f"{name}: {problem}; move it away, or correct its permissions") from None


def _keep_config(folder: Path, config_yaml: str) -> None:
    """Copy the config of the last start to the next config.before-N.yaml, without secrets, if it differs from `config_yaml`.

    What is not a file that can be read is renamed.
    """
    config_file = folder / CONFIG_FILE
    if not os.path.lexists(config_file):
        return
    names = (re.fullmatch(r"config\.before-(\d+)\.yaml", path.name) for path in folder.iterdir())
    number = max((int(found[1]) for found in names if found), default=0) + 1
    kept = folder / f"config.before-{number}.yaml"
    try:
        # The bytes need not be UTF-8. A config that a user or an older version wrote may contain a password.
        content = hide_secrets(read_file(config_file).decode(errors="surrogateescape"))
    except OSError:
        config_file.rename(kept)
    else:
        if content == config_yaml:
            return
        atomic_write(kept, content.encode(errors="surrogateescape"))
    log.warning("the config differs from the last start's, which is kept as config.before-%d.yaml", number)


def read_environment(folder: Path) -> Environment | None:
    """Return the content of environment.json, or None if there is no such file. Raises: UserError or another OSError."""
    path = folder / ENVIRONMENT_FILE
    if not os.path.lexists(path):
        return None
    return parse_content(Environment, read_json(path), path, "remove it; the next start writes it again")


def describe_environment() -> dict[str, Any]:
    """Return the versions, machine, command and commit of this process, which explain or reproduce a run.

    Without git or a checkout, the commit is the environment variable TANDEM_COMMIT, or None.
    """
    import torch

    versions = {"torch": str(torch.__version__)}  # names the build, for example +cu130, which package metadata may not
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
        "processors": usable_processors(),
        "packages": versions,
        "commit": _git_output(root, "rev-parse", "HEAD") or os.environ.get("TANDEM_COMMIT"),
        "uncommitted": _git_output(root, "status", "--porcelain"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _git_output(root: Path, *arguments: str) -> str | None:
    # Look for a repository only in `root`, not in folders above it, where another user may have put one that runs commands.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(root), *arguments]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=10, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.strip() if completed.returncode == 0 else None
