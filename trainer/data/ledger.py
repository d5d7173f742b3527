"""The ledger: rank 0 records in `ledger.jsonl` which data the run has read.

    start  the step and cursor of a start or rollback, and everything that determines which tokens come next
    skip   a damaged shard is skipped from this step on
    step   how far each source has been read, and two digests of the rows that were read (`data.digests`)
    bad    the last recorded step made no update; the reason, and what the run did next

The file only grows. A line is written after the event, and a checkpoint is committed after the lines of its steps are on disk.
A checkpoint stores the number of lines at its step, and a start from it repeats that number. The lines from there to the start
belong to steps that the run discarded, and remain as evidence of them. Copies of the corpora's manifests are kept next to the
file, so `tandem audit` needs nothing else. The run reads back only its rollbacks (`read_rollbacks`), so that a process that was
killed after a rollback skips the same rows again. Nothing here imports torch.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import quote

from tandem.trainer import journal
from tandem.trainer.config import UserError, parse_content
from tandem.trainer.config.constraints import COUNT
from tandem.trainer.config.outside import open_regular_file, read_lines
from tandem.trainer.data import manifest
from tandem.trainer.data.digests import Digests
from tandem.trainer.data.manifest import CorpusManifest
from tandem.trainer.disk import atomic_write, sync_folder

LEDGER_FILE = "ledger.jsonl"
MANIFESTS_FOLDER = "manifests"

REMEDY = "restore the file, or start a run with another run.name"

BadStepAction = Literal["skip", "rollback", "stop"]
"""What a run does after a bad step, which makes no update: continue, roll back to the last checkpoint, or end."""


class RollbackHistory(NamedTuple):
    """The rollbacks of a run to one checkpoint."""

    num_rollbacks: int
    cursor: dict[str, int] | None
    """Where reading continued after the last rollback; None without a rollback."""
    skipped_shards: dict[str, list[str]]
    """The shards that the run skipped after the last rollback."""


@dataclass(frozen=True)
class Rollback:
    """What a run reads back from the line of a rollback."""

    cursor: dict[str, Annotated[int, COUNT]]
    skipped_shards: dict[str, list[str]]
    skipped_ranges: dict[str, list[Annotated[int, COUNT]]]
    """Source -> cursor in the checkpoint and cursor from which the run continued."""


class Ledger:
    """Appends to the ledger of a run folder, after removing a torn last line, because checkpoints count lines."""

    def __init__(self, folder: Path) -> None:
        path = folder / LEDGER_FILE
        self._file = journal.open_journal(path, cut=True)
        with open_regular_file(path) as file:
            self.num_lines = sum(1 for _ in read_lines(file))
        """Number of lines so far, which a checkpoint of the last step must store."""
        sync_folder(folder)
        self._cursor: dict[str, int] = {}

    def write_start(
        self, step: int, cursor: Mapping[str, int], *, shuffle_settings: Mapping[str, int],
        phases: Sequence[Mapping[str, Any]], fingerprints: Mapping[str, str],
        skipped_shards: Mapping[str, Sequence[str]], dp_size: int, num_ledger_lines: int = 0,
        skipped_ranges: Mapping[str, tuple[int, int]] = {}, is_rollback: bool = False,
    ) -> None:  # fmt: skip
        """Record that the run continues after `step` finished steps, at `cursor`.

        `num_ledger_lines` is the number stored in the checkpoint of `step`, or 0 without a checkpoint. `shuffle_settings` are
        the seed and block sizes under their names in the config. `skipped_ranges` holds the range of each source that a
        rollback skips, from the checkpoint's cursor to `cursor`. `is_rollback` is true for a rollback and false for a new
        process.
        """
        self._cursor = dict(cursor)
        self._append_record(
            kind="start", step=step, num_ledger_lines=num_ledger_lines, cursor=self._cursor,
            **{name.split(".")[-1]: value for name, value in shuffle_settings.items()}, phases=phases,
            fingerprints=fingerprints, skipped_shards={name: list(files) for name, files in skipped_shards.items()},
            dp_size=dp_size, skipped_ranges={name: list(ends) for name, ends in skipped_ranges.items()},
            is_rollback=is_rollback, time=time.time(),
        )  # fmt: skip

    def write_skipped_shard(self, step: int, source: str, shard: str) -> None:
        """Record that the shard is skipped from step number `step` (counted from 1) on."""
        self._append_record(kind="skip", step=step, source=source, shard=shard)

    def write_step(self, step: int, cursor: Mapping[str, int], digests: Digests) -> None:
        """Record step number `step` (counted from 1), which read its sources up to `cursor`."""
        read_ranges = {name: [self._cursor.get(name, 0), end] for name, end in cursor.items()}
        read_ranges = {name: ends for name, ends in read_ranges.items() if ends[0] != ends[1]}
        self._cursor = dict(cursor)
        digests_hex = {name: f"{digest:016x}" for name, digest in digests._asdict().items()}
        self._append_record(kind="step", step=step, read_ranges=read_ranges, **digests_hex)

    def write_bad_step(self, step: int, loss: float, grad_norm: float, reason: str, action: BadStepAction) -> None:
        """Record that the last recorded step made no update, and why."""
        values = {"loss": loss, "grad_norm": grad_norm}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        self._append_record(kind="bad", step=step, **finite, reason=reason, action=action)

    def sync(self) -> None:
        """Sync the file to disk. Call this before a checkpoint is committed, from any thread."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _append_record(self, **record: Any) -> None:
        try:
            journal.append_record(self._file, record, compact=True)
        except OSError as error:
            raise UserError(
                f"{self._file.name}: a line cannot be written ({error.strerror}), and the audit needs every line; "
                "free disk space and start again: the run continues from its last checkpoint"
            ) from None
        self.num_lines += 1


def read_rollbacks(folder: Path, step: int, num_ledger_lines: int) -> RollbackHistory:
    """Return the rollbacks to the checkpoint of `step` that was saved when the ledger had `num_ledger_lines` lines.

    Unreadable lines are ignored here. The audit reports them.
    Raises: UserError if a line of a rollback contradicts itself.
    """
    path, history = folder / LEDGER_FILE, RollbackHistory(0, None, {})
    wanted = {"kind": "start", "is_rollback": True, "step": step, "num_ledger_lines": num_ledger_lines}
    if not path.exists():
        return history
    with open_regular_file(path) as file:
        for number, line in enumerate(islice(read_lines(file), num_ledger_lines, None), num_ledger_lines + 1):
            start = journal.parse_record(line) if b'"is_rollback"' in line else {}
            # Compare the types too: 1 equals True, but the trainer does not write it.
            if all(type(start.get(key)) is type(value) and start[key] == value for key, value in wanted.items()):
                fields = {name: start[name] for name in Rollback.__dataclass_fields__ if name in start}
                place = f"{path}: line {number}"
                rollback = parse_content(Rollback, fields, place, REMEDY)
                ends = {source: ends[1] for source, ends in rollback.skipped_ranges.items() if len(ends) == 2}
                if ends.keys() != rollback.skipped_ranges.keys() or not ends.items() <= rollback.cursor.items():
                    both = f"the cursor {rollback.cursor}, but the skipped ranges {rollback.skipped_ranges}"
                    raise UserError(f"{place}: states {both}; {REMEDY}")
                history = RollbackHistory(history.num_rollbacks + 1, rollback.cursor, rollback.skipped_shards)
    return history


def copy_manifests(folder: Path, manifests: Mapping[str, CorpusManifest]) -> None:
    """Copy the manifest of each source into the run folder."""
    (folder / MANIFESTS_FOLDER).mkdir(exist_ok=True)
    for source, corpus in manifests.items():
        atomic_write(manifest_copy_path(folder, source), manifest.dump_manifest(corpus))
    sync_folder(folder)


def manifest_copy_path(folder: Path, source: str) -> Path:
    """Return the path of the copy of a source's manifest in the run folder."""
    return folder / MANIFESTS_FOLDER / f"{quote(source, safe=' ')}.json"
