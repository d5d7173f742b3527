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
from tandem.data_prep.input_files import Input, content_hash
from tandem.data_prep.work_units import Unit
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.manifest import Manifest
from tandem.trainer.disk import TEMPORARY, TORN, write_whole

NOTE = "preparing.json"
WORK = "work"
INPUTS = "inputs.json"
"""What `origin` says of every file that was read."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What a file system that takes nothing more says, which names no file."""


class Useless(UserError):
    """A mistake in the settings that shows late: what was done with them helps nobody."""


def is_finished(output: Path, identity: Mapping[str, Any], inputs: list[Input]) -> bool:
    """Whether the folder already is the corpus of these settings and inputs, complete.

    Raises: UserError where it is one of others, or a damaged one.
    """
    if not (output / manifest.FILE).exists():
        return False
    try:
        corpus = manifest.load(output)
        manifest.check_files(output, corpus)
        before = provenance.load(output / INPUTS)
    except UserError as error:
        raise UserError(f"{error}; for that, remove {output} first") from None
    _refuse_other(output, corpus.settings, identity)
    _refuse_other_inputs(output, before, inputs)
    _clear(output, keep=manifest_files(corpus))
    return True


def is_closed(output: Path) -> bool:
    """Whether the folder has its manifest; if so what was unfinished is gone after the call."""
    if not (output / manifest.FILE).exists():
        return False
    _clear(output, keep=manifest_files(manifest.load(output)))
    return True


def manifest_files(corpus: Manifest) -> set[str]:
    """Names of the files a finished corpus has."""
    shards = {shard.file for split in (corpus.train, corpus.validation) for shard in split.shards}
    return shards | {manifest.FILE, manifest.TOKENIZER_FILE, INPUTS}


@contextmanager
def claimed(output: Path, identity: Mapping[str, Any], refuse: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside the block the folder exists and is ours alone: it holds our note, and what of the work is finished.

    Raises: UserError where the folder cannot be written or is not ours, and what `refuse` raises, which is asked when no
    other process of this machine can begin any more. If the block raises UserError or OSError, everything is as it
    was before, but finished units of work.
    """
    _check_ours(output, identity)
    absent = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(output, error) from None
    with _locked(output):
        refuse()
        yield from _filled(output, identity, absent)


def _filled(output: Path, identity: Mapping[str, Any], absent: list[Path]) -> Iterator[None]:
    try:
        if (output / manifest.FILE).exists():  # finished by another process since we looked
            yield
            return
        for path in [*output.glob(TORN), *(output / WORK).rglob(TORN)]:
            path.unlink(missing_ok=True)  # of killed workers
        write_whole(output / NOTE, json.dumps(identity, indent=1))
        yield
    except (UserError, OSError) as error:
        refusal = error if isinstance(error, UserError) else _refusal(output, error)
        if (output / manifest.FILE).exists():
            raise refusal from None
        if not isinstance(error, Useless) and any((output / WORK).glob("[0-9a-f]*.json")):
            raise UserError(f"{refusal}; finished work is kept in {output}, the same command goes on") from None
        if output.is_dir():
            _clear(output, keep=set())
        # Folders made for this corpus go too, unless another has moved in meanwhile.
        with suppress(OSError):
            for folder in absent:
                folder.rmdir()
        raise refusal from None


def of_inputs(units: list[Unit], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the manifest says of the inputs."""
    return provenance.identity(_contents(units, records))


def finish(
    output: Path, units: list[Unit], records: Sequence[Mapping[str, Any]], tokenizer_json: str, corpus: Manifest
) -> None:
    """The corpus is complete: its manifest is there, the last of its files, and nothing that is not of it."""
    write_whole(output / manifest.TOKENIZER_FILE, tokenizer_json)
    write_whole(output / INPUTS, provenance.dump(_contents(units, records)))
    for path in [*output.glob("train-*.tar"), *output.glob("validation-*.tar")]:
        if path.name not in manifest_files(corpus):
            path.unlink()  # of an earlier state of the inputs
    write_whole(output / manifest.FILE, manifest.dump(corpus))
    _clear(output, keep=manifest_files(corpus))


def _contents(units: list[Unit], records: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Name, bytes, version and hashes of the parts of each file, in order."""
    read_parts = [part for unit in units for part in unit.parts]
    hashes = [content for record in records for content in record["parts"]]
    found = []
    for file, parts in groupby(zip(read_parts, hashes, strict=True), key=lambda pair: pair[0].input):
        found.append([file.name, file.bytes, file.version, [content for _, (_, content) in parts]])
    return found


def _refuse_other_inputs(output: Path, entries: list[provenance.Entry], inputs: list[Input]) -> None:
    """A file whose time or tag has changed is read again, to see whether its content has."""
    before = {name: (size, version, hashes) for name, size, version, hashes in entries}
    sizes = {file.name: file.bytes for file in inputs}
    changed = [name for name in before.keys() | sizes.keys() if before.get(name, (None,))[0] != sizes.get(name)]
    if not changed:  # else files may have been cut into other parts than they are now
        for part in (part for unit in work_units.units(inputs, {}) for part in unit.parts):
            _, version, hashes = before[part.input.name]
            if version != part.input.version and hashes[part.number] != content_hash(part):
                changed.append(part.input.name)
    if changed:
        raise UserError(
            f"--output: {output} was prepared from other inputs: {min(changed)} is not what it was "
            f"({len(set(changed))} such); name another folder, or remove this one first"
        )


def _refusal(output: Path, error: OSError) -> UserError:
    """In one line, whose fault it is: not every file that a preparation uses is of its output."""
    named = error.filename if isinstance(error.filename, str) else None
    if error.errno in FULL or (named and output.absolute() in Path(named).absolute().parents):
        return _unwritable(output, error)
    return UserError(
        f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; correct it and run the same command again"
    )


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


def _check_ours(output: Path, identity: Mapping[str, Any]) -> None:
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if NOTE in names:
        _refuse_other(output, json.loads((output / NOTE).read_text()), identity)
    elif any(not (name.startswith(NOTE) and name.endswith(TEMPORARY)) for name in names):
        raise UserError(f"--output: {output} holds files but no corpus; name a new or an empty folder")


def _refuse_other(output: Path, before: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    given = _flat(identity)
    for name, old in _flat({name: before.get(name) for name in identity}).items():
        if old != (value := given.get(name)):
            raise UserError(
                f"--output: {output} was prepared with {name} {old}, not {value}; "
                "name another folder, or remove this one first"
            )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of settings by their own names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _clear(output: Path, keep: set[str]) -> None:
    """Removes what a preparation leaves besides these, nothing else; the note last, for a kill here."""
    shutil.rmtree(output / WORK, ignore_errors=True)
    patterns = ("train-*.tar", "validation-*.tar", manifest.TOKENIZER_FILE, INPUTS, TORN, NOTE)
    for path in [path for pattern in patterns for path in output.glob(pattern)]:
        if path.name not in keep:
            path.unlink()
