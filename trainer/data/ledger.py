"""What a run was fed, on record: one line for each start and each step in `ledger.jsonl`, written by rank 0.

    start  where a process took the run up, or went back to a checkpoint, and everything that fixes which tokens come next
    skip   from this step on a damaged shard is left out
    step   how far each source was read, and two sums of hashes of what was really read (`data.digests`)
    bad    the update of the step before it was left out, and what became of the run

The one idea: the file only grows, and is never ahead of what it tells nor behind a committed checkpoint. A checkpoint knows
how many lines there were when it was made, and a start from it says so: the lines between the two are of steps that the run
took back, which stay as evidence of what was made and thrown away. Copies of the corpora's manifests lie beside it, so that
`tandem audit` needs nothing else. A run reads one thing back, `read_rollbacks`: which rows it passed over when it went back
to a checkpoint, so that a process killed after that passes over them too. Nothing here imports torch.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from tandem.trainer import journal
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.digests import StepDigests
from tandem.trainer.data.manifest import CorpusManifest
from tandem.trainer.disk import atomic_write, sync_folder

LEDGER_FILE = "ledger.jsonl"
MANIFESTS_FOLDER = "manifests"

BadStepAction = Literal["skip", "rollback", "stop"]
"""What becomes of a run at a bad step, whose update is left out: it goes on, goes back to its last checkpoint, or ends."""


class RollbackHistory(NamedTuple):
    """What the ledger tells of the times that a run went back to one checkpoint."""

    num_rollbacks: int
    cursor: dict[str, int] | None
    """From where the last of them went on reading; None where there is none."""
    skipped_shards: dict[str, list[str]]
    """The shards that it left out."""


class Ledger:
    """Appends to the ledger in a run folder; a line that a kill tore is cut away first, for a checkpoint counts lines."""

    def __init__(self, folder: Path) -> None:
        path = folder / LEDGER_FILE
        self._file = journal.open_journal(path, cut=True)
        self._num_lines = _count_lines(path)
        sync_folder(folder)
        self._cursor: dict[str, int] = {}

    def write_start(
        self,
        step: int,
        cursor: Mapping[str, int],
        *,
        shuffle_settings: Mapping[str, int],
        phases: Sequence[Mapping[str, Any]],
        fingerprints: Mapping[str, str],
        skipped_shards: Mapping[str, Sequence[str]],
        dp_size: int,
        num_ledger_lines: int = 0,
        skipped_ranges: Mapping[str, tuple[int, int]] = {},
        is_rollback: bool = False,
    ) -> None:
        """The run goes on after `step` finished steps, from a checkpoint made when the ledger had `num_ledger_lines` lines; 0:
        from none.

        `shuffle_settings` are seed and block sizes under their names in the config. `skipped_ranges` are the rows that a
        rollback passes over: of each source the cursor in the checkpoint, and in `cursor`, from where the run goes on.
        `is_rollback` says that the process itself goes back, false that it has just begun.
        """
        self._cursor = dict(cursor)
        self._append_record(
            kind="start",
            step=step,
            num_ledger_lines=num_ledger_lines,
            cursor=self._cursor,
            **{name.split(".")[-1]: value for name, value in shuffle_settings.items()},
            phases=phases,
            fingerprints=fingerprints,
            skipped_shards={name: list(files) for name, files in skipped_shards.items()},
            dp_size=dp_size,
            skipped_ranges={name: list(ends) for name, ends in skipped_ranges.items()},
            is_rollback=is_rollback,
            time=time.time(),
        )

    def write_skipped_shard(self, step: int, source: str, shard: str) -> None:
        """The shard is left out from the `step`-th step on."""
        self._append_record(kind="skip", step=step, source=source, shard=shard)

    def write_step(self, step: int, cursor: Mapping[str, int], digests: StepDigests) -> None:
        """The `step`-th step is made, and read its sources up to `cursor`."""
        read_ranges = {name: [self._cursor.get(name, 0), end] for name, end in cursor.items()}
        read_ranges = {name: ends for name, ends in read_ranges.items() if ends[0] != ends[1]}
        self._cursor = dict(cursor)
        self._append_record(
            kind="step",
            step=step,
            read_ranges=read_ranges,
            **{name: f"{sum:016x}" for name, sum in digests._asdict().items()},
        )

    def write_bad_step(self, step: int, loss: float, grad_norm: float, reason: str, action: BadStepAction) -> None:
        """The `step`-th step, which was just written, made no update; `reason` says why in words."""
        # JSON has no NaN and no infinity.
        finite = [value if math.isfinite(value) else None for value in (loss, grad_norm)]
        self._append_record(
            kind="bad", step=step, loss=finite[0], grad_norm=finite[1], reason=reason, action=action,
        )  # fmt: skip

    @property
    def num_lines(self) -> int:
        """In the file by now: what a checkpoint of the last step has to keep."""
        return self._num_lines

    def sync(self) -> None:
        """What was written survives a power cut: to be called, from any thread, before a checkpoint is committed."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _append_record(self, **record: Any) -> None:
        try:
            journal.append_record(self._file, record, compact=True)
        except OSError as error:
            raise UserError(
                f"{self._file.name}: a line cannot be written ({error.strerror}); a run without it cannot be proven; make room "
                "and start again: it goes on from its last checkpoint"
            ) from None
        self._num_lines += 1


def read_rollbacks(folder: Path, step: int, num_ledger_lines: int) -> RollbackHistory:
    """How often the run went back to the checkpoint of `step` made when the ledger had `num_ledger_lines` lines, and from
    where it went on reading the last time. A line that cannot be read counts as none; naming it is the audit's business.
    """
    path, history = folder / LEDGER_FILE, RollbackHistory(0, None, {})
    if not path.exists():
        return history
    with path.open("rb") as file:
        for line in islice(file, num_ledger_lines, None):
            start = journal.parse_record(line) if b'"is_rollback"' in line else {}
            if (start.get("kind"), start.get("is_rollback"), start.get("step"), start.get("num_ledger_lines")) == (
                "start", True, step, num_ledger_lines,
            ):  # fmt: skip
                history = RollbackHistory(history.num_rollbacks + 1, start["cursor"], start["skipped_shards"])
    return history


def copy_manifests(folder: Path, manifests: Mapping[str, CorpusManifest]) -> None:
    """The run folder holds a copy of the manifest of each source."""
    (folder / MANIFESTS_FOLDER).mkdir(exist_ok=True)
    for source, corpus in manifests.items():
        atomic_write(manifest_copy_path(folder, source), manifest.dump_manifest(corpus))
    sync_folder(folder)


def manifest_copy_path(folder: Path, source: str) -> Path:
    """Where the run folder keeps the manifest of a source."""
    return folder / MANIFESTS_FOLDER / f"{quote(source, safe=' ')}.json"


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
