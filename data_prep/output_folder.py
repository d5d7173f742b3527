"""Decide whether an output folder is a finished corpus, an unfinished one, empty, or contains other files.

During a preparation the folder contains a claim, which is a file with the settings, and a folder of unfinished work. The
claim marks the folder as an unfinished corpus. It is removed after the manifest is written.
"""

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.data_prep import provenance, work_files, work_units
from tandem.data_prep.input_files import InputFile, content_hash
from tandem.data_prep.settings import LATER_SETTINGS
from tandem.data_prep.work_files import DamagedWork
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import escape_control_characters
from tandem.trainer.data import manifest
from tandem.trainer.data.manifest import CorpusManifest
from tandem.trainer.disk import TEMPORARY_PATTERN, TEMPORARY_SUFFIX, atomic_write
from tandem.trainer.runtime.private_folder import lock_holder, sharing_fault

CLAIM_FILE = "preparing.json"
WORK_FOLDER = "work"
INPUTS_FILE = "inputs.json"
"""Lists every input file; see `provenance`."""
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a file system that accepts no more data. Such an error does not name a file."""


@dataclass(frozen=True)
class Claim:
    """The record that a folder is an unfinished corpus."""

    settings: dict[str, Any]


class UnusableSettings(UserError):
    """A mistake in the settings that is found only after work was done with them. The work is useless."""


def is_finished(output: Path, settings_dict: Mapping[str, Any], inputs: list[InputFile]) -> bool:
    """Return whether the folder is the complete corpus of these settings and inputs.

    Raises: UserError if it is a corpus of other settings or inputs, or a damaged one.
    """
    if not (output / manifest.MANIFEST_FILE).exists():
        return False
    try:
        corpus_manifest = manifest.load_manifest(output)
        manifest.check_shard_files(output, corpus_manifest)
        recorded_inputs = provenance.load(output / INPUTS_FILE)
    except UserError as error:
        raise UserError(f"{error}; remove {output} before a new preparation") from None
    _check_same_settings(output, corpus_manifest.settings, settings_dict)
    _check_same_inputs(output, recorded_inputs, inputs)
    _clear(output, keep=corpus_file_names(corpus_manifest))
    return True


def clear_if_finished(output: Path) -> bool:
    """Return whether the folder contains a manifest. If it does, remove unfinished work."""
    if not (output / manifest.MANIFEST_FILE).exists():
        return False
    _clear(output, keep=corpus_file_names(manifest.load_manifest(output)))
    return True


def corpus_file_names(corpus_manifest: CorpusManifest) -> set[str]:
    """Return the names of the files of a finished corpus."""
    return {shard.file for shard in corpus_manifest.shards} | {
        manifest.MANIFEST_FILE,
        manifest.TOKENIZER_FILE,
        INPUTS_FILE,
    }


@contextmanager
def claim_output(
    output: Path, settings_dict: Mapping[str, Any], check_free: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Create the folder, lock it and write our claim for the duration of the block.

    `check_free` is called with the lock held, so that no other process on this machine can start. If the block raises
    UserError or OSError, everything except finished units of work is removed.

    Raises: UserError if the folder cannot be written or contains other files, and the errors of `check_free`.
    """
    _check_claimable(output, settings_dict)
    missing_folders = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable_error(output, error) from None
    if (output / WORK_FOLDER).is_symlink():
        raise UserError(f"--output: {output / WORK_FOLDER} is a link, which another user may have made; remove it")
    if fault := sharing_fault(output):
        line = escape_control_characters(f"tandem: warning: --output: {output} {fault}", one_line=True)
        print(line, file=sys.stderr, flush=True)
    with _lock_folder(output):
        check_free()
        yield from _hold_claim(output, settings_dict, missing_folders)


def _hold_claim(output: Path, settings_dict: Mapping[str, Any], missing_folders: list[Path]) -> Iterator[None]:
    try:
        if (output / manifest.MANIFEST_FILE).exists():  # another process finished it after our check
            yield
            return
        for path in [*output.glob(TEMPORARY_PATTERN), *(output / WORK_FOLDER).rglob(TEMPORARY_PATTERN)]:
            path.unlink(missing_ok=True)  # left by killed workers
        work_files.write_record(output / CLAIM_FILE, Claim(dict(settings_dict)))
        yield
    except DamagedWork:
        raise  # nothing is removed, because the message names what to remove
    except (UserError, OSError) as error:
        user_error = error if isinstance(error, UserError) else _to_user_error(output, error)
        if (output / manifest.MANIFEST_FILE).exists():
            raise user_error from None
        if not isinstance(error, UnusableSettings) and any((output / WORK_FOLDER).glob("[0-9a-f]*.json")):
            raise UserError(
                f"{user_error}; finished work is kept in {output}; run the same command again to continue"
            ) from None
        if output.is_dir():
            _clear(output, keep=set())
        # Remove the folders made for this corpus, unless they contain something else by now.
        with suppress(OSError):
            for folder in missing_folders:
                folder.rmdir()
        raise user_error from None


def finish_corpus(
    output: Path, input_entries: list[provenance.InputEntry], tokenizer_json: str, corpus_manifest: CorpusManifest
) -> None:
    """Complete the corpus: write the manifest as the last file, and remove everything that is not part of the corpus."""
    text, path = manifest.dump_manifest(corpus_manifest), output / manifest.MANIFEST_FILE
    # A manifest that no reader accepts must not replace the unfinished work.
    manifest.parse_manifest(text.encode(), path)
    atomic_write(output / manifest.TOKENIZER_FILE, tokenizer_json)
    atomic_write(output / INPUTS_FILE, provenance.dump(input_entries))
    for shard_path in [*output.glob("train-*.tar"), *output.glob("validation-*.tar")]:
        if shard_path.name not in corpus_file_names(corpus_manifest):
            shard_path.unlink()  # left from an earlier state of the inputs
    atomic_write(path, text)
    _clear(output, keep=corpus_file_names(corpus_manifest))


def _check_same_inputs(output: Path, entries: list[provenance.InputEntry], inputs: list[InputFile]) -> None:
    """Compare the inputs with the recorded ones. Read a file again only if its time or tag has changed.

    Raises: UserError if an input differs.
    """
    recorded = {name: (size, version, hashes) for name, size, version, hashes in entries}
    sizes = {file.name: file.size_bytes for file in inputs}
    changed = [name for name in recorded.keys() | sizes.keys() if recorded.get(name, (None,))[0] != sizes.get(name)]
    if not changed:  # otherwise the files may be cut into different parts now
        for part in (part for unit in work_units.plan_units(inputs, {}) for part in unit.parts):
            _, version, hashes = recorded[part.file.name]
            if version != part.file.version and hashes[part.index] != content_hash(part):
                changed.append(part.file.name)
    if changed:
        raise UserError(
            f"--output: {output} was prepared from other inputs: {min(changed)} has changed "
            f"(changed files: {len(set(changed))}); name another folder, or remove this one first"
        )


def _to_user_error(output: Path, error: OSError) -> UserError:
    """Convert an error to one line, which names --output only if the error concerns the output folder."""
    named = error.filename if isinstance(error.filename, str) else None
    if error.errno in DISK_FULL_ERRNOS or (named and output.absolute() in Path(named).absolute().parents):
        return _unwritable_error(output, error)
    return UserError(
        f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; correct the cause and run the same command again"
    )


def _unwritable_error(output: Path, error: OSError) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"--output: {output} cannot be written ({reason}); name another folder")


@contextmanager
def _lock_folder(output: Path) -> Iterator[None]:
    """Lock the folder against other preparations. The folder itself is locked, because a lock file would be left behind."""
    handle = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = f" ({found})" if (found := lock_holder(handle)) else ""
            raise UserError(
                f"--output: {output} is being prepared by another process{holder}; wait until that process has finished"
            ) from None
        yield
    finally:
        os.close(handle)


def _check_claimable(output: Path, settings_dict: Mapping[str, Any]) -> None:
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if CLAIM_FILE in names:
        claim = work_files.read_record(
            output / CLAIM_FILE, Claim, remedy="name another folder, or remove this one first"
        )
        _check_same_settings(output, claim.settings, settings_dict)
    elif any(not (name.startswith(CLAIM_FILE) and name.endswith(TEMPORARY_SUFFIX)) for name in names):
        raise UserError(f"--output: {output} contains files but no corpus; name a new or an empty folder")


def _check_same_settings(output: Path, recorded: Mapping[str, Any], settings_dict: Mapping[str, Any]) -> None:
    settings_dict, recorded = {**LATER_SETTINGS, **settings_dict}, {**LATER_SETTINGS, **recorded}
    given = _flatten(settings_dict)
    if unknown := _flatten({name: recorded[name] for name in settings_dict if name in recorded}).keys() - given.keys():
        raise UserError(
            f"--output: {output} was prepared by another version, which has other settings ({', '.join(sorted(unknown))}); "
            "name another folder, or remove this one first"
        )
    for name, old in _flatten({name: recorded.get(name) for name in settings_dict}).items():
        if old != (value := given.get(name)):
            remedy = "name another folder, or remove this one first"
            raise UserError(f"--output: {output} was prepared with {name} {old}, not {value}; {remedy}")


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings by their own names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flatten(value) if isinstance(value, dict) else {name: value}
    return flat


def _clear(output: Path, keep: set[str]) -> None:
    """Remove the files of a preparation except these. Remove the claim last, so that a kill here is harmless."""
    shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)
    patterns = ("train-*.tar", "validation-*.tar", manifest.TOKENIZER_FILE, INPUTS_FILE, TEMPORARY_PATTERN, CLAIM_FILE)
    for path in [path for pattern in patterns for path in output.glob(pattern)]:
        if path.name not in keep:
            path.unlink()
