"""What a run was fed, on record: one line for each start and each step in `ledger.jsonl`, written by rank 0.

    start  where a process took the run up, or went back to a checkpoint, and everything that fixes which tokens come next
    skip   from this step on a damaged shard is left out
    step   how far each source was read, and two sums of hashes of what was really read (`tandem.trainer.data`, Evidence)
    bad    the update of the step before it was left out, and what became of the run

The one idea: the file only grows, and is never ahead of what it tells nor behind a committed checkpoint. A checkpoint knows
how many lines there were when it was made, and a start from it says so: the lines between the two are of steps that the run
took back, which stay as evidence of what was made and thrown away. Copies of the corpora's manifests lie beside it, so that
`tandem audit` needs nothing else. A run reads one thing back, `rollbacks`: which rows it passed over when it went back to a
checkpoint, so that a process killed after that passes over them too. Nothing here imports torch.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import quote

from tandem.trainer import journal
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.manifest import Manifest
from tandem.trainer.disk import sync_folder, write_whole

if TYPE_CHECKING:
    from tandem.trainer.data.rows import Evidence

FILE = "ledger.jsonl"
MANIFESTS = "manifests"
HALF_BITS = 32

Decision = Literal["skip", "rollback", "stop"]
"""What becomes of a run at a bad step, whose update is left out: it goes on, goes back to its last checkpoint, or ends."""


class Digests(NamedTuple):
    """Evidence of one step, summed over all its rows, modulo 2^64."""

    ranges: int
    tokens: int


class Rollbacks(NamedTuple):
    """What the ledger tells of the times that a run went back to one checkpoint."""

    num: int
    cursor: dict[str, int] | None
    """From where the last of them went on reading; None where there is none."""
    skipped: dict[str, list[str]]
    """The shards that it left out."""


class Ledger:
    """Appends to the ledger in a run folder; a line that a kill tore is cut away first, for a checkpoint counts lines."""

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        self._file = journal.opened(path, cut=True)
        self._lines = _num_lines(path)
        sync_folder(folder)
        self._cursor: dict[str, int] = {}

    def start(
        self,
        step: int,
        cursor: Mapping[str, int],
        *,
        order: Mapping[str, int],
        phases: Sequence[Mapping[str, Any]],
        fingerprints: Mapping[str, str],
        skipped: Mapping[str, Sequence[str]],
        dp_size: int,
        after: int = 0,
        passed: Mapping[str, tuple[int, int]] = {},
        rollback: bool = False,
    ) -> None:
        """The run goes on after `step` finished steps, from a checkpoint made when the ledger had `after` lines; 0: from none.

        `order` are seed and block sizes under their names in the config. `passed` are the rows that a rollback passes over: of
        each source the cursor in the checkpoint, and in `cursor`, from where the run goes on. `rollback` says that the process
        itself goes back, false that it has just begun.
        """
        self._cursor = dict(cursor)
        self._write(
            kind="start", step=step, after=after, cursor=self._cursor,
            **{name.split(".")[-1]: value for name, value in order.items()}, phases=phases,
            fingerprints=fingerprints, skipped={name: list(files) for name, files in skipped.items()},
            dp_size=dp_size, passed={name: list(ends) for name, ends in passed.items()}, rollback=rollback,
            time=time.time(),
        )  # fmt: skip

    def skip(self, step: int, source: str, shard: str) -> None:
        """The shard is left out from the `step`-th step on."""
        self._write(kind="skip", step=step, source=source, shard=shard)

    def step(self, step: int, cursor: Mapping[str, int], digests: Digests) -> None:
        """The `step`-th step is made, and read its sources up to `cursor`."""
        taken = {name: [self._cursor.get(name, 0), end] for name, end in cursor.items()}
        taken = {name: ends for name, ends in taken.items() if ends[0] != ends[1]}
        self._cursor = dict(cursor)
        self._write(
            kind="step", step=step, taken=taken, **{name: f"{sum:016x}" for name, sum in digests._asdict().items()}
        )

    def bad(self, step: int, loss: float, gradient_norm: float, reason: str, decision: Decision) -> None:
        """The `step`-th step, which was just written, made no update; `reason` says why in words."""
        # JSON has no NaN and no infinity.
        finite = [value if math.isfinite(value) else None for value in (loss, gradient_norm)]
        self._write(
            kind="bad", step=step, loss=finite[0], gradient_norm=finite[1], reason=reason, decision=decision,
        )  # fmt: skip

    @property
    def num_lines(self) -> int:
        """In the file by now: what a checkpoint of the last step has to keep."""
        return self._lines

    def sync(self) -> None:
        """What was written survives a power cut: to be called, from any thread, before a checkpoint is committed."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, **record: Any) -> None:
        try:
            journal.append(self._file, record, compact=True)
        except OSError as error:
            raise UserError(
                f"{self._file.name}: a line cannot be written ({error.strerror}); a run without it cannot be proven; make room "
                "and start again: it goes on from its last checkpoint"
            ) from None
        self._lines += 1


def rollbacks(folder: Path, step: int, after: int) -> Rollbacks:
    """How often the run went back to the checkpoint of `step` made when the ledger had `after` lines, and from where it went on
    reading the last time. A line that cannot be read counts as none; naming it is the audit's business.
    """
    path, found = folder / FILE, Rollbacks(0, None, {})
    if not path.exists():
        return found
    with path.open("rb") as file:
        for line in islice(file, after, None):
            start = journal.parsed(line) if b'"rollback"' in line else {}
            if (start.get("kind"), start.get("rollback"), start.get("step"), start.get("after")) == (
                "start", True, step, after,
            ):  # fmt: skip
                found = Rollbacks(found.num + 1, start["cursor"], start["skipped"])
    return found


def copy_manifests(folder: Path, manifests: Mapping[str, Manifest]) -> None:
    """The run folder holds a copy of the manifest of each source."""
    (folder / MANIFESTS).mkdir(exist_ok=True)
    for source, corpus in manifests.items():
        write_whole(manifest_copy(folder, source), manifest.dump(corpus))
    sync_folder(folder)


def manifest_copy(folder: Path, source: str) -> Path:
    """Where the run folder keeps the manifest of a source."""
    return folder / MANIFESTS / f"{quote(source, safe=' ')}.json"


def halves(evidence: Evidence | None) -> list[float]:
    """The evidence of one rank's rows in numbers that fp64 adds up over ranks without rounding; none for none."""
    sums = (evidence.ranges, evidence.tokens) if evidence else ()
    return [float(half) for value in sums for half in divmod(value, 1 << HALF_BITS)]


def joined(summed: Sequence[float], tp_size: int) -> Digests | None:
    """The evidence of the step from `halves` summed over all ranks.

    Raises: RuntimeError where the tensor-parallel ranks of one replica cannot have read the same rows.
    """
    if not summed:
        return None
    shares, rests = zip(*(divmod(int(half), tp_size) for half in summed), strict=True)
    if any(rests):
        raise RuntimeError(
            f"evidence {list(summed)} does not divide by tp_size {tp_size}: the ranks of a replica have not read the same rows"
        )
    sums = [(high << HALF_BITS) + low for high, low in zip(shares[::2], shares[1::2], strict=True)]
    return Digests(*(value % (1 << 64) for value in sums))


def _num_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
