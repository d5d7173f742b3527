"""Folders and files whose names other users of the machine can guess, and that these users must not plant, replace or lock.

Libraries run the compiled code that they find in such folders. If another user creates the folder first, that user's code runs
in this process. So `set_private_folders` runs at the start of every command, before any library is imported.
"""

import errno
import fcntl
import functools
import grp
import os
import pwd
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from tandem.trainer.config import UserError
from tandem.trainer.config.outside import escape_control_characters

CODE_FOLDERS = {
    "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TORCH_EXTENSIONS_DIR": "extensions",
    "HF_MODULES_CACHE": "transformers",
}  # fmt: skip
"""Variable of a library that stores and loads code -> subfolder, on the node's own disk: hundreds of ranks that lock one shared
home folder stall at the start."""
OTHER_FOLDERS = {
    "MPLCONFIGDIR": "matplotlib", "CUDA_CACHE_PATH": "cuda", "XDG_CACHE_HOME": "cache",
    "XDG_CONFIG_HOME": "config", "RAY_TMPDIR": "",
}  # fmt: skip
"""Variables that are only checked if they are set, because the libraries then use the home or the temporary folder."""


def set_private_folders() -> None:
    """Make libraries use folders that only this user can change. Ranks and workers inherit the variables.

    A variable keeps its value if its folder is safe. Otherwise one line reports the fault and the folder that is used instead.
    torch and Ray also use names in TMPDIR that can be guessed and have no variable, so TMPDIR becomes a private folder, too.
    Raises: UserError if there is no safe place for temporary files.
    """
    temporary = _private_temporary_folder()
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    _keep_folder(temporary)
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)  # expanduser then finds the home in the list of users
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute():
        home = private_folder(temporary / "home")
    elif fault := _home_fault(home):
        _warn(f"HOME: {fault}", temporary / "home")
        home = private_folder(temporary / "home")
    os.environ["HOME"] = str(home)
    # Libraries fail or log errors if they cannot create ~/.cache.
    lacks_cache = not os.access(home, os.W_OK) and not os.path.exists(home / ".cache")
    for name, subfolder in (CODE_FOLDERS | OTHER_FOLDERS).items():
        default = temporary / "tandem-cache" / subfolder if name in CODE_FOLDERS else temporary / subfolder
        if value := os.environ.get(name):
            try:
                private_folder(Path(value))
                continue
            except (UserError, OSError) as error:
                _warn(f"{name}: {error}", default)
        if value or name in CODE_FOLDERS or (lacks_cache and name == "XDG_CACHE_HOME"):
            os.environ[name] = str(private_folder(default))


def private_folder(path: Path) -> Path:
    """Create the folder and its missing parents for this user only, or check that no other user can change it.

    Raises: UserError if another user can change or replace it, or if it is a link. OSError if it cannot be created.
    """
    path = path.absolute()
    if not path.parent.exists():
        private_folder(path.parent)
    parent = path.parent.resolve()
    for folder in (parent, *parent.parents):
        _check_parent(folder, stat.S_IWOTH)
    with suppress(FileExistsError):
        path.mkdir(0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path} is {'a link' if path.is_symlink() else 'not a folder'}; name a folder")
    if status.st_uid != os.geteuid():
        raise UserError(f"{path} belongs to {user_name(status.st_uid)}; name a folder of your own")
    if _others_can_write(status):
        raise UserError(f"{path} is writable by other users; check its files and run chmod go-w on it")
    return path


def open_private_file(path: str | Path, flags: int) -> int:
    """Open a regular file that only this user can change. With O_CREAT, create it for this user only.

    Raises: PermissionError for a link, for a file with several names, and for a file that other users own or can write.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise PermissionError(errno.EPERM, "is a link or a socket", str(path)) from None
    status = os.fstat(descriptor)
    # An open file has no name if another process has just removed it.
    is_private = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink <= 1
    if not is_private or _others_can_write(status):
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "is not a file of this user only", str(path))
    return descriptor


def sharing_fault(folder: Path) -> str | None:
    """Return which other users can change a folder that may be shared on purpose, or None."""
    status = folder.stat()
    if status.st_uid not in _trusted_users():
        return f"belongs to {user_name(status.st_uid)}, who can change its files"
    return "is writable by all users, who can change its files" if status.st_mode & stat.S_IWOTH else None


def lock_holder(descriptor: int) -> str | None:
    """Return the process and the user that hold the `flock` of an open file, or None if this machine does not list them."""
    status = os.fstat(descriptor)
    file_id = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, process_id, locked_file, *_ = line.split()
            if (kind, locked_file) == ("FLOCK", file_id):
                return f"process {process_id} of {user_name(Path(f'/proc/{process_id}').stat().st_uid)}"
    return None


def user_name(user_id: int) -> str:
    with suppress(KeyError):
        return f"user {pwd.getpwuid(user_id).pw_name}"
    return f"user {user_id}"


def _home_fault(home: Path) -> str | None:
    """Return why other users could change the files in the home folder, or None.

    A home in a folder of all users may be planted, so it must be private. Elsewhere, it may belong to another user, as it often
    does for root in a container.
    """
    try:
        if any(parent.stat().st_mode & stat.S_IWOTH for parent in home.resolve().parents if parent.exists()):
            private_folder(home)
        elif home.exists() and home.stat().st_mode & stat.S_IWOTH:
            return f"{home} is writable by all users"
    except (UserError, OSError) as error:
        return str(error)
    return None


def _private_temporary_folder() -> Path:
    """Return the temporary folder if only this user can change it, or a private folder in it."""
    try:
        # Pods often have a read-only system, and a /tmp without a sticky bit. /dev/shm is memory, so it is the last choice.
        candidates = [tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]
    except FileNotFoundError:
        raise UserError(
            "TMPDIR: no folder for temporary files can be written; set TMPDIR to a folder of your own"
        ) from None
    faults = []
    for base in dict.fromkeys(Path(candidate).resolve() for candidate in candidates):
        with suppress(UserError, OSError):
            return private_folder(base)
        folder = base / f"tandem-{os.geteuid()}"
        try:
            _check_parent(base, stat.S_IWGRP | stat.S_IWOTH)
            try:
                folder = private_folder(folder)
            except (UserError, OSError) as error:
                faults.append(str(error))
                folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=base))
        except (UserError, OSError) as error:
            faults.append(str(error))
            continue
        if faults:
            _warn(f"TMPDIR: {faults[0]}", folder)
        return folder
    raise UserError(f"TMPDIR: {faults[0]}; set TMPDIR to a folder of your own")


@functools.cache
def _keep_folder(folder: Path) -> None:
    """Lock the folder until this process ends: systemd-tmpfiles then does not remove it during a long run."""
    with suppress(OSError):  # no locks on this file system
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)


def _check_parent(folder: Path, write_bits: int) -> None:
    """Check that users with these write permissions cannot rename another user's folder in `folder`.  Raises: UserError."""
    status = folder.stat()
    is_writable = _others_can_write(status) and status.st_mode & write_bits
    if is_writable and not status.st_mode & stat.S_ISVTX:
        raise UserError(
            f"{folder} is writable by other users and has no sticky bit, so they can replace your files in it; "
            "name a folder elsewhere, or run chmod +t on it"
        )
    if is_writable and status.st_uid not in _trusted_users():
        owner = user_name(status.st_uid)
        raise UserError(f"{folder} belongs to {owner}, who can replace your files in it; name a folder elsewhere")


def _others_can_write(status: os.stat_result) -> bool:
    """Whether other users may write. The user's own group, which may write with the common umask 002, has no other users."""
    if not status.st_mode & stat.S_IWOTH and status.st_mode & stat.S_IWGRP:
        with suppress(KeyError):
            group, user = grp.getgrgid(status.st_gid), pwd.getpwuid(os.geteuid())
            is_own = (group.gr_name, group.gr_gid) == (user.pw_name, user.pw_gid)
            return not is_own or bool(set(group.gr_mem) - {user.pw_name})
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _trusted_users() -> set[int]:
    """Return this user, root, and the number that stands for root in a container that does not map root."""
    users = {0, os.geteuid()}
    with suppress(OSError):
        if Path("/proc/self/uid_map").read_text().split()[-1] != str(2**32 - 1):
            users.add(int(Path("/proc/sys/fs/overflowuid").read_text()))
    return users


def _warn(fault: str, replacement: Path) -> None:
    line = escape_control_characters(f"tandem: {fault}; using {replacement} instead", one_line=True)
    print(line, file=sys.stderr, flush=True)
