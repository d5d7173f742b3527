"""Whose the output folder is: a finished corpus, one being prepared, nobody's, or the user's to leave alone.

While a preparation works, the folder holds a note of its settings and a folder of unfinished work. The note says that
the folder is ours to fill; it goes when the manifest is there.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from tandem.data_prep import provenance, work_units
from tandem.data_prep.input_files import InputFile, content_hash
from tandem.data_prep.work_units import WorkUnit
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.manifest import CorpusManifest
from tandem.trainer.disk import TEMPORARY_PATTERN, TEMPORARY_SUFFIX, atomic_write

CLAIM_FILE = "preparing.json"
WORK_FOLDER = "work"
INPUTS_FILE = "inputs.json"
"""What `provenance` says of every file that was read."""
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What a file system that takes nothing more says, which names no file."""


class UnusableSettings(UserError):
    """A mistake in the settings that shows late: what was done with them helps nobody."""


def is_finished(output: Path, settings_dict: Mapping[str, Any], inputs: list[InputFile]) -> bool:
    """Whether the folder already is the corpus of these settings and inputs, complete.

    Raises: UserError where it is one of others, or a damaged one.
    """
    if not (output / manifest.MANIFEST_FILE).exists():
        return False
    try:
        corpus_manifest = manifest.load_manifest(output)
        manifest.check_shard_files(output, corpus_manifest)
        recorded_inputs = provenance.load(output / INPUTS_FILE)
    except UserError as error:
        raise UserError(f"{error}; for that, remove {output} first") from None
    _check_same_settings(output, corpus_manifest.settings, settings_dict)
    _check_same_inputs(output, recorded_inputs, inputs)
    _clear(output, keep=corpus_file_names(corpus_manifest))
    return True


def clear_if_finished(output: Path) -> bool:
    """Whether the folder has its manifest; if so what was unfinished is gone after the call."""
    if not (output / manifest.MANIFEST_FILE).exists():
        return False
    _clear(output, keep=corpus_file_names(manifest.load_manifest(output)))
    return True


def corpus_file_names(corpus_manifest: CorpusManifest) -> set[str]:
    """Names of the files a finished corpus has."""
    shards = {shard.file for split in (corpus_manifest.train, corpus_manifest.validation) for shard in split.shards}
    return shards | {manifest.MANIFEST_FILE, manifest.TOKENIZER_FILE, INPUTS_FILE}


@contextmanager
def claim_output(
    output: Path, settings_dict: Mapping[str, Any], check_free: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Inside the block the folder exists and is ours alone: it holds our note, and what of the work is finished.

    Raises: UserError where the folder cannot be written or is not ours, and what `check_free` raises, which is asked when no
    other process of this machine can begin any more. If the block raises UserError or OSError, everything is as it
    was before, but finished units of work.
    """
    _check_claimable(output, settings_dict)
    missing_folders = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable_error(output, error) from None
    with _lock_folder(output):
        check_free()
        yield from _hold_claim(output, settings_dict, missing_folders)


def _hold_claim(output: Path, settings_dict: Mapping[str, Any], missing_folders: list[Path]) -> Iterator[None]:
    try:
        if (output / manifest.MANIFEST_FILE).exists():  # finished by another process since we looked
            yield
            return
        for path in [*output.glob(TEMPORARY_PATTERN), *(output / WORK_FOLDER).rglob(TEMPORARY_PATTERN)]:
            path.unlink(missing_ok=True)  # of killed workers
        atomic_write(output / CLAIM_FILE, json.dumps(settings_dict, indent=1))
        yield
    except (UserError, OSError) as error:
        user_error = error if isinstance(error, UserError) else _to_user_error(output, error)
        if (output / manifest.MANIFEST_FILE).exists():
            raise user_error from None
        if not isinstance(error, UnusableSettings) and any((output / WORK_FOLDER).glob("[0-9a-f]*.json")):
            raise UserError(f"{user_error}; finished work is kept in {output}, the same command goes on") from None
        if output.is_dir():
            _clear(output, keep=set())
        # Folders made for this corpus go too, unless another has moved in meanwhile.
        with suppress(OSError):
            for folder in missing_folders:
                folder.rmdir()
        raise user_error from None


def summarize_inputs(units: list[WorkUnit], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the manifest says of the inputs."""
    return provenance.summarize(_input_entries(units, records))


def finish_corpus(
    output: Path,
    units: list[WorkUnit],
    records: Sequence[Mapping[str, Any]],
    tokenizer_json: str,
    corpus_manifest: CorpusManifest,
) -> None:
    """The corpus is complete: its manifest is there, the last of its files, and nothing that is not of it."""
    atomic_write(output / manifest.TOKENIZER_FILE, tokenizer_json)
    atomic_write(output / INPUTS_FILE, provenance.dump(_input_entries(units, records)))
    for path in [*output.glob("train-*.tar"), *output.glob("validation-*.tar")]:
        if path.name not in corpus_file_names(corpus_manifest):
            path.unlink()  # of an earlier state of the inputs
    atomic_write(output / manifest.MANIFEST_FILE, manifest.dump_manifest(corpus_manifest))
    _clear(output, keep=corpus_file_names(corpus_manifest))


def _input_entries(units: list[WorkUnit], records: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Name, bytes, version and hashes of the parts of each file, in order."""
    read_parts = [part for unit in units for part in unit.parts]
    hashes = [content for record in records for content in record["parts"]]
    found = []
    for file, parts in groupby(zip(read_parts, hashes, strict=True), key=lambda pair: pair[0].file):
        found.append([file.name, file.size_bytes, file.version, [content for _, (_, content) in parts]])
    return found


def _check_same_inputs(output: Path, entries: list[provenance.InputEntry], inputs: list[InputFile]) -> None:
    """A file whose time or tag has changed is read again, to see whether its content has."""
    recorded = {name: (size, version, hashes) for name, size, version, hashes in entries}
    sizes = {file.name: file.size_bytes for file in inputs}
    changed = [name for name in recorded.keys() | sizes.keys() if recorded.get(name, (None,))[0] != sizes.get(name)]
    if not changed:  # else files may have been cut into other parts than they are now
        for part in (part for unit in work_units.plan_units(inputs, {}) for part in unit.parts):
            _, version, hashes = recorded[part.file.name]
            if version != part.file.version and hashes[part.index] != content_hash(part):
                changed.append(part.file.name)
    if changed:
        raise UserError(
            f"--output: {output} was prepared from other inputs: {min(changed)} is not what it was "
            f"({len(set(changed))} such); name another folder, or remove this one first"
        )


def _to_user_error(output: Path, error: OSError) -> UserError:
    """In one line, whose fault it is: not every file that a preparation uses is of its output."""
    named = error.filename if isinstance(error.filename, str) else None
    if error.errno in DISK_FULL_ERRNOS or (named and output.absolute() in Path(named).absolute().parents):
        return _unwritable_error(output, error)
    return UserError(
        f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; correct it and run the same command again"
    )


def _unwritable_error(output: Path, error: OSError) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"--output: {output} cannot be written ({reason}); name another folder")


@contextmanager
def _lock_folder(output: Path) -> Iterator[None]:
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


def _check_claimable(output: Path, settings_dict: Mapping[str, Any]) -> None:
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if CLAIM_FILE in names:
        _check_same_settings(output, json.loads((output / CLAIM_FILE).read_text()), settings_dict)
    elif any(not (name.startswith(CLAIM_FILE) and name.endswith(TEMPORARY_SUFFIX)) for name in names):
        raise UserError(f"--output: {output} holds files but no corpus; name a new or an empty folder")


def _check_same_settings(output: Path, recorded: Mapping[str, Any], settings_dict: Mapping[str, Any]) -> None:
    given = _flatten(settings_dict)
    if unknown := _flatten({name: recorded[name] for name in settings_dict if name in recorded}).keys() - given.keys():
        raise UserError(
            f"--output: {output} was prepared by a version with other settings ({', '.join(sorted(unknown))}); "
            "name another folder, or remove this one first"
        )
    for name, old in _flatten({name: recorded.get(name) for name in settings_dict}).items():
        if old != (value := given.get(name)):
            raise UserError(
                f"--output: {output} was prepared with {name} {old}, not {value}; "
                "name another folder, or remove this one first"
            )


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of settings by their own names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flatten(value) if isinstance(value, dict) else {name: value}
    return flat


def _clear(output: Path, keep: set[str]) -> None:
    """Removes what a preparation leaves besides these, nothing else; the note last, for a kill here."""
    shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)
    patterns = ("train-*.tar", "validation-*.tar", manifest.TOKENIZER_FILE, INPUTS_FILE, TEMPORARY_PATTERN, CLAIM_FILE)
    for path in [path for pattern in patterns for path in output.glob(pattern)]:
        if path.name not in keep:
            path.unlink()
