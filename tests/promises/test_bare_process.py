"""A run in a process that has as little as a container gives it: a user without a name or a home, a long TMPDIR."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tandem.trainer.__main__ import USER_ERROR_EXIT_CODE, main
from tandem.trainer.config import UserError
from tandem.trainer.crash_loop import record_start
from tests.promises.conftest import clean_environment, read_step_records, two_phase_config
from tests.timeouts import TEST_TIMEOUT_SECONDS

NAMELESS_USER = 54321
"""It is in no list of users."""
SOCKET_PATH_BYTES = 108
"""Of the path of a Unix socket. Source: sun_path in unix(7)."""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, which those of pytest are not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv to become another user"
)
def test_a_user_without_a_name_and_a_home_trains_with_a_long_temporary_folder(tmp_path, open_folder, corpus):
    folder = open_folder / "of-this-user"
    temporary = folder / ("x" * SOCKET_PATH_BYTES)
    temporary.mkdir(parents=True)
    for path in (folder, temporary):
        os.chown(path, NAMELESS_USER, NAMELESS_USER)
    config = tmp_path / "config.yaml"
    tree = two_phase_config("stablelm", corpus, folder / "runs", steps=2, log={"wandb": "offline"})
    config.write_text(yaml.safe_dump(tree))
    # Python and the corpus may be in folders that are closed to others. To read them is all that the process keeps of root.
    capability = "+dac_read_search"
    become = ["setpriv", f"--reuid={NAMELESS_USER}", f"--regid={NAMELESS_USER}", "--clear-groups"]
    become += [f"--inh-caps={capability}", f"--ambient-caps={capability}"]
    removed = ("HOME", "USER", "LOGNAME", "WANDB_MODE")
    environment = {name: value for name, value in clean_environment().items() if name not in removed}
    done = subprocess.run(
        [*become, sys.executable, "-m", "tandem.trainer", "train", config], env=environment | {"TMPDIR": str(temporary)},
        cwd=folder, capture_output=True, text=True, timeout=TEST_TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[rank 0] launch: no launcher, 1 rank on this machine, on the CPU, 1 thread\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert "ERROR" not in done.stderr
    assert len(read_step_records(folder / "runs" / "tiny")) == 4


def test_a_deleted_working_folder_is_one_line(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "deleted"
    folder.mkdir()
    here = Path.cwd()
    try:
        os.chdir(folder)
        folder.rmdir()
        assert main(["train", "config.yaml"]) == USER_ERROR_EXIT_CODE
    finally:
        os.chdir(here)
    assert capsys.readouterr().err == "tandem: the working folder has been deleted; change into a folder that exists\n"


@pytest.mark.parametrize("name", ["x" * 300, "loop"])
def test_a_path_that_cannot_be_looked_up_is_one_line(tmp_path, capsys, name):
    (tmp_path / "loop").symlink_to("loop")
    path = tmp_path / name / "folder"
    for command in (["train"], ["report"], ["audit"], ["checkpoint", "verify"]):
        assert main([*command, str(path)]) == USER_ERROR_EXIT_CODE, command
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match=r"run.root: .* cannot be created"), record_start(path, 3):
        pass
