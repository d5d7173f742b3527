"""Another user of the machine cannot plant the folders and files whose names are known, or block their use."""

import errno
import fcntl
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.trainer.__main__ import main
from tandem.trainer.config import UserError
from tandem.trainer.runtime import private_folder
from tandem.trainer.runtime.private_folder import CODE_FOLDERS, set_private_folders
from tests.process_state import restore_process_state

OTHER_USER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as a second user")


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A temporary folder of all users, and a process that has not chosen its folders yet."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", None)
    for name in (*CODE_FOLDERS, *private_folder.OTHER_FOLDERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(folder))
    with restore_process_state():
        yield folder


def is_private(path) -> bool:
    status = Path(path).lstat()
    return status.st_mode & 0o170777 == 0o040700 and status.st_uid == os.geteuid()


def plant_link(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path.symlink_to(tmp_path / "elsewhere")


def plant_folder(path: Path, tmp_path: Path) -> None:
    path.mkdir()
    os.chown(path, OTHER_USER, OTHER_USER)


def plant_writable(path: Path, tmp_path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def plant_file(path: Path, tmp_path: Path) -> None:
    path.write_text("")


PLANTS = [plant_link, pytest.param(plant_folder, marks=needs_root), plant_writable, plant_file]


def test_compiled_code_and_temporary_files_are_in_private_folders(shared, capsys):
    set_private_folders()
    root = shared / f"tandem-{os.geteuid()}"
    assert Path(os.environ["TMPDIR"]) == root
    assert is_private(root)
    for name, subfolder in CODE_FOLDERS.items():
        assert Path(os.environ[name]) == root / "tandem-cache" / subfolder
        assert is_private(os.environ[name])
    chosen = dict(os.environ)
    set_private_folders()  # as a rank does
    assert dict(os.environ) == chosen
    assert not capsys.readouterr().err


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_temporary_folder_is_not_used(shared, tmp_path, capsys, plant):
    planted = shared / f"tandem-{os.geteuid()}"
    plant(planted, tmp_path)
    set_private_folders()
    used = Path(os.environ["TMPDIR"])
    assert used.parent == shared
    assert used != planted
    assert is_private(used)
    assert all(Path(os.environ[name]).is_relative_to(used) for name in CODE_FOLDERS)
    assert capsys.readouterr().err.startswith(f"tandem: TMPDIR: {planted} ")
    assert not list((tmp_path / "elsewhere").glob("*"))


@pytest.mark.parametrize("plant", PLANTS)
def test_a_variable_keeps_its_folder_unless_another_user_could_change_it(shared, tmp_path, capsys, monkeypatch, plant):
    mine, planted = tmp_path / "mine", tmp_path / "planted"
    plant(planted, tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(mine / "triton"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(planted))
    monkeypatch.setenv("MPLCONFIGDIR", str(planted))
    set_private_folders()
    assert os.environ["TRITON_CACHE_DIR"] == str(mine / "triton")
    assert is_private(mine)
    assert is_private(mine / "triton")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"):
        assert is_private(os.environ[name])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"]
    assert all(str(planted) in line and "using" in line for line in lines)


def test_a_fault_is_printed_without_control_characters(shared, capsys, monkeypatch):
    planted = shared / "\x1b[2J"
    plant_writable(planted, shared)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(planted))
    set_private_folders()
    assert r"/\x1b[2J is writable by other users" in capsys.readouterr().err


@needs_root
def test_the_own_group_of_the_user_may_write_as_with_umask_002(tmp_path):
    own_group = pwd.getpwuid(os.geteuid()).pw_gid
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.touch()
    for path in (folder, file):
        os.chown(path, -1, own_group)
        path.chmod(0o775)
    assert private_folder.private_folder(folder) == folder
    os.close(private_folder.open_private_file(file, os.O_RDONLY))
    for path in (folder, file):
        os.chown(path, -1, OTHER_USER)
    with pytest.raises(UserError, match="is writable by other users"):
        private_folder.private_folder(folder)
    with pytest.raises(PermissionError):
        private_folder.open_private_file(file, os.O_RDONLY)


def test_a_temporary_folder_that_cannot_be_written_is_not_used(shared, tmp_path, capsys, monkeypatch):
    plant_file(shared / f"tandem-{os.geteuid()}", tmp_path)

    def refuse(prefix, dir):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    set_private_folders()
    assert not Path(os.environ["TMPDIR"]).is_relative_to(shared)
    assert "is not a folder; name a folder; using " in capsys.readouterr().err


def test_a_temporary_folder_without_a_sticky_bit_is_not_used(shared, capsys):
    shared.chmod(0o777)
    set_private_folders()
    assert not Path(os.environ["TMPDIR"]).is_relative_to(shared)
    assert "has no sticky bit" in capsys.readouterr().err


@needs_root
def test_a_temporary_folder_of_another_user_is_not_used(shared, capsys):
    os.chown(shared, OTHER_USER, OTHER_USER)
    set_private_folders()
    assert not Path(os.environ["TMPDIR"]).is_relative_to(shared)
    assert f"TMPDIR: {shared} belongs to user" in capsys.readouterr().err


def test_a_home_that_other_users_can_plant_is_not_used(shared, tmp_path, capsys, monkeypatch):
    (shared / "writable").mkdir()
    (shared / "writable").chmod(0o777)
    (shared / "linked").symlink_to(tmp_path)
    planted = [shared, shared / "writable", shared / "linked"]
    if os.geteuid() == 0:
        planted.append(shared / "foreign")
        planted[-1].mkdir()
        os.chown(planted[-1], OTHER_USER, OTHER_USER)
    used = set()
    for home in planted:
        monkeypatch.setenv("HOME", str(home))
        set_private_folders()
        used.add(os.environ["HOME"])
    assert used == {f"{os.environ['TMPDIR']}/home"}
    assert is_private(used.pop())
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[1:3] for line in lines] == [["HOME:", str(home)] for home in planted]


def test_a_home_of_this_user_is_kept(shared, tmp_path, capsys, monkeypatch):
    (tmp_path / "home").mkdir()
    for home in (tmp_path / "home", shared / "new"):
        monkeypatch.setenv("HOME", str(home))
        set_private_folders()
        assert os.environ["HOME"] == str(home)
    assert is_private(shared / "new")
    monkeypatch.setenv("HOME", "")
    set_private_folders()
    assert Path(os.environ["HOME"]).is_absolute()
    assert not capsys.readouterr().err


def test_a_command_does_not_load_a_planted_library(shared, monkeypatch):
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    from triton.runtime.cache import get_cache_manager

    planted, key = shared / f"tandem-{os.geteuid()}" / "tandem-cache" / "triton", "ab" * 32
    with monkeypatch.context() as context:
        context.setenv("TRITON_CACHE_DIR", str(planted))
        get_cache_manager(key).put(b"attack", "launcher.so")
        assert get_cache_manager(key).get_file("launcher.so")
    planted.parent.parent.chmod(0o777)
    assert main(["report", str(shared / "missing")]) == 2
    assert get_cache_manager(key).get_file("launcher.so") is None
    assert is_private(
        Path(default_cache_dir()).parent
    )  # torch's folder of headers and pickles, which no variable names


def test_a_rank_has_not_imported_a_library_before_it_chooses_its_folders():
    check = "print(tempfile.tempdir, {'torch', 'triton', 'numpy'} & {*sys.modules})"
    code = f"import sys, tempfile, tandem.trainer.__main__; {check}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "None set()\n"


def test_a_parent_that_all_users_can_write_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(UserError, match=rf"{tmp_path} is writable by other users and has no sticky bit"):
        private_folder.private_folder(tmp_path / "below" / "folder")


def test_the_holder_of_a_lock_is_named(tmp_path):
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        expected = f"process {os.getpid()} of {private_folder.user_name(os.geteuid())}"
        assert private_folder.lock_holder(file.fileno()) in (expected, None)  # None: the file system lists no locks
