"""The files of a run folder before and after a start."""

import errno
import fcntl
import json
import os
import subprocess

import pytest

from tandem.trainer import journal, run_folder
from tandem.trainer.checkpoint.write import remove_checkpoint
from tandem.trainer.config import UserError
from tandem.trainer.data.ledger import copy_manifests
from tandem.trainer.disk import atomic_write
from tandem.trainer.runtime.private_folder import user_name


def test_what_a_kill_left_half_written_goes_and_nothing_else(tmp_path):
    atomic_write(tmp_path / "report.html", "whole")
    (tmp_path / "manifests").mkdir()
    torn = [tmp_path / "config.yaml.0123abcd.tmp", tmp_path / "manifests" / "a.json.89efffff.tmp"]
    kept = [tmp_path / "notes.tmp", tmp_path / "manifests" / "a.json"]
    for path in (*torn, *kept):
        path.write_text("words")
    run_folder.open_run_folder(tmp_path, "run: {}\n")
    assert not any(path.exists() for path in torn)
    assert [path.read_text() for path in kept] == ["words"] * 2
    assert (tmp_path / "config.yaml").read_text() == "run: {}\n"


def test_without_git_the_commit_is_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TANDEM_COMMIT", "0123abc")
    assert run_folder.describe_environment()["commit"] == "0123abc"


def test_the_commit_is_not_that_of_a_repository_above_the_checkout(tmp_path, monkeypatch):
    """Another user may have put it there, with a command that git runs."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    checkout = tmp_path / "site-packages" / "tandem"
    checkout.mkdir(parents=True)
    assert run_folder._git_output(checkout, "status", "--porcelain") is None
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o755)
    subprocess.run(["git", "-C", str(checkout), "config", "core.fsmonitor", str(hook)], check=True)
    assert run_folder._git_output(checkout, "status", "--porcelain") == ""
    assert not (tmp_path / "ran").exists()


def test_links_and_pipes_in_a_run_folder_are_not_written_to(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    folder.mkdir()
    for plant in (os.symlink, os.link, lambda _, path: os.mkfifo(path)):
        plant(victim, folder / ".held")
        with pytest.raises(UserError, match=rf"{folder}/.held of .* cannot be opened"), run_folder.run_lock(folder):
            pass
        (folder / ".held").unlink()
    (folder / "ledger.jsonl").symlink_to(victim)
    os.mkfifo(folder / "metrics.jsonl")
    for name in ("ledger.jsonl", "metrics.jsonl"):
        with pytest.raises(UserError, match=rf"{folder}/{name} is a link or a pipe; remove it"):
            journal.open_journal(folder / name, cut=True)
    assert victim.read_text() == "mine"


def test_a_run_folder_that_other_users_can_change_is_reported(tmp_path, caplog):
    run_folder.open_run_folder(tmp_path, "run: {}\n")
    assert not caplog.records
    tmp_path.chmod(0o777)
    run_folder.open_run_folder(tmp_path, "run: {}\n")
    assert f"{tmp_path} is writable by all users, who can change its files" in caplog.text
    if os.geteuid() == 0:
        tmp_path.chmod(0o755)
        os.chown(tmp_path, 65534, 65534)
        run_folder.open_run_folder(tmp_path, "run: {}\n")
        assert f"{tmp_path} belongs to {user_name(65534)}, who" in caplog.text


def test_a_linked_checkpoint_folder_keeps_its_files(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "COMMITTED").write_text("")
    (tmp_path / "step-00000001").symlink_to(tmp_path / "other")
    remove_checkpoint(tmp_path / "step-00000001")
    assert [path.name for path in tmp_path.rglob("*")] == ["other", "COMMITTED"]


def test_only_users_who_can_write_in_a_run_folder_can_lock_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT_SECONDS", -1.0)
    for mode, lock_mode in ((0o755, 0o600), (0o775, 0o660)):
        tmp_path.chmod(mode)
        with run_folder.run_lock(tmp_path):
            assert (tmp_path / ".held").stat().st_mode & 0o777 == lock_mode
    with (tmp_path / ".held").open("r") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        me = f"process {os.getpid()} of {user_name(os.geteuid())}"
        with pytest.raises(UserError, match=rf"^{tmp_path}: {me}.* is training in it"), run_folder.run_lock(tmp_path):
            pass


def test_a_kept_config_has_no_secret_and_replaces_no_other(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_bytes(b"a: https://me:pass-31word@host/x?sig=sig-77end # \xff\n")
    (tmp_path / "config.before-2.yaml").write_text("older")
    run_folder.open_run_folder(tmp_path, "run: {}\n")
    assert (tmp_path / "config.before-2.yaml").read_text() == "older"
    kept = (tmp_path / "config.before-3.yaml").read_bytes()
    assert kept == b"a: https://HIDDEN@host/x?sig=HIDDEN # \xff\n"
    config.write_text("a: https://me:pass-31word@host/x\n")
    run_folder.open_run_folder(tmp_path, "a: https://HIDDEN@host/x\n")  # the same config, written by an older version
    assert not (tmp_path / "config.before-4.yaml").exists()
    assert not [path for path in tmp_path.iterdir() if b"pass-31word" in path.read_bytes()]


def test_a_config_that_is_no_file_is_moved_away(tmp_path):
    (tmp_path / "config.yaml").mkdir()
    run_folder.open_run_folder(tmp_path, "run: {}\n")
    assert (tmp_path / "config.before-1.yaml").is_dir()
    (tmp_path / "config.yaml").unlink()
    os.mkfifo(tmp_path / "config.yaml")
    run_folder.open_run_folder(tmp_path, "run: {}\n")
    assert (tmp_path / "config.before-2.yaml").is_fifo()
    assert (tmp_path / "config.yaml").read_text() == "run: {}\n"


def test_what_is_in_the_place_of_a_file_or_folder_is_named_in_one_line(tmp_path):
    (tmp_path / "environment.json").mkdir()
    (tmp_path / "manifests").write_text("")
    message = "cannot be used by a run .*; move it away, or correct its permissions"
    with pytest.raises(UserError, match=rf"^{tmp_path}/environment.json: {message}"), run_folder.named_errors():
        run_folder.open_run_folder(tmp_path, "run: {}\n")
    with pytest.raises(UserError, match=rf"^{tmp_path}/manifests: {message}"), run_folder.named_errors():
        copy_manifests(tmp_path, {})
    with pytest.raises(OSError, match="No space"), run_folder.named_errors():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")


def test_the_environment_that_a_start_writes_is_read_back(tmp_path):
    assert run_folder.read_environment(tmp_path) is None
    run_folder.open_run_folder(tmp_path, "run: {}\n")
    written = json.loads((tmp_path / "environment.json").read_text())
    assert vars(run_folder.read_environment(tmp_path)) == written
