"""Whose the output folder is: a finished corpus, one being prepared, nobody's, or the user's to leave alone.

While a preparation works, the folder holds a note of its settings. It says that the folder is ours to fill
and, after a kill, to clear; it goes when the manifest is there.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_prep.write import TEMPORARY, whole_file
from trainer.config import UserError
from trainer.data import manifest

NOTE = "preparing.json"


def is_finished(output: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder already is the corpus of these settings, complete.

    Raises: UserError where it is one of other settings, or a damaged one.
    """
    if not (output / manifest.FILE).exists():
        return False
    corpus = manifest.load(output)
    _refuse_other(output, corpus.settings, settings)
    manifest.check_files(output, corpus)
    (output / NOTE).unlink(missing_ok=True)
    return True


@contextmanager
def claimed(output: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block the folder exists and holds our note alone; the note goes at its end.

    Raises: UserError where the folder cannot be written or is not ours. If the block raises UserError or
    OSError, everything is as it was before.
    """
    _check_ours(output, settings)
    absent = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(output, error) from None
    with _locked(output):
        yield from _filled(output, settings, absent)


def _filled(output: Path, settings: Mapping[str, Any], absent: list[Path]) -> Iterator[None]:
    try:
        if (output / manifest.FILE).exists():  # finished by another process since we looked
            yield
            return
        _clear(output)
        with whole_file(output / NOTE) as file:
            file.write(json.dumps(settings, indent=1).encode())
        yield
        (output / NOTE).unlink(missing_ok=True)
    except (UserError, OSError) as error:
        if output.is_dir() and not (output / manifest.FILE).exists():
            _clear(output)
        # Folders made for this corpus go too, unless another has moved in meanwhile.
        with suppress(OSError):
            for folder in absent:
                folder.rmdir()
        if isinstance(error, UserError):
            raise
        raise _unwritable(output, error) from None


def _unwritable(output: Path, error: OSError) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"--output: {output} cannot be written ({reason}); name another folder")


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """No other preparation works in the folder meanwhile. The folder itself is locked: a file would be left behind."""
    handle = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output: {output} is being prepared by another process; a folder has one at a time; wait for it"
            ) from None
        yield
    finally:
        os.close(handle)


def _check_ours(output: Path, settings: Mapping[str, Any]) -> None:
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if NOTE in names:
        _refuse_other(output, json.loads((output / NOTE).read_text()), settings)
    elif names - {NOTE + TEMPORARY}:
        raise UserError(f"--output: {output} holds files but no corpus; name a new or an empty folder")


def _refuse_other(output: Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if before.get(name) != value:
            raise UserError(
                f"--output: {output} was prepared with {name} {before.get(name)}, not {value}; "
                "name another folder, or remove this one first"
            )


def _clear(output: Path) -> None:
    """Removes what an unfinished preparation leaves, nothing else; the note last, for a kill here."""
    patterns = ("train-*.tar", "validation-*.tar", manifest.TOKENIZER_FILE, f"*{TEMPORARY}", NOTE)
    for path in [path for pattern in patterns for path in output.glob(pattern)]:
        path.unlink()
