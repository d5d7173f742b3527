"""What a run was fed, on record: one line for each start and each step in `ledger.jsonl`, written by rank 0.

    start  where a process took the run up, and everything that fixes which tokens come next
    skip   from this step on a damaged shard is left out
    step   how far each source was read, and two sums of hashes of what was really read (`trainer.data`, Evidence)

The one idea: the file only grows, and is never ahead of what it tells nor behind a committed checkpoint. A checkpoint knows
how many lines there were when it was made, and a start from it says so: the lines between the two are of steps that the run
took back, which stay as evidence of what was made and thrown away. Copies of the corpora's manifests lie beside it, so that
`tandem audit` needs nothing else. Nothing here reads the ledger; it never imports torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from trainer.data import manifest
from trainer.data.manifest import Manifest
from trainer.disk import sync_folder, write_whole

if TYPE_CHECKING:
    from trainer.data.rows import Evidence

FILE = "ledger.jsonl"
MANIFESTS = "manifests"
HALF_BITS = 32
TAIL_BYTES = 1 << 16


class Digests(NamedTuple):
    """Evidence of one step, summed over all its rows, modulo 2^64."""

    ranges: int
    tokens: int


class Ledger:
    """Appends to the ledger in a run folder; a line that a kill tore is cut away first."""

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        _cut_torn_line(path)
        self._lines = _num_lines(path)
        self._file = path.open("ab", buffering=0)
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
    ) -> None:
        """The run goes on after `step` finished steps, from a checkpoint made when the ledger had `after` lines; 0: from none.

        `order` are seed and block sizes under their names in the config.
        """
        self._cursor = dict(cursor)
        self._write(
            kind="start", step=step, after=after, cursor=self._cursor,
            **{name.split(".")[-1]: value for name, value in order.items()}, phases=phases,
            fingerprints=fingerprints, skipped={name: list(files) for name, files in skipped.items()},
            dp_size=dp_size, time=time.time(),
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

    def sync(self) -> int:
        """What was written survives a power cut: to be called before a checkpoint of the last step is committed, which has
        to keep the number of lines that this returns.
        """
        os.fsync(self._file.fileno())
        return self._lines

    def close(self) -> None:
        self._file.close()

    def _write(self, **record: Any) -> None:
        # One write to a file opened for appending: a kill leaves the line whole, torn at the end, or not there.
        line = (json.dumps(record, separators=(",", ":")) + "\n").encode()
        if self._file.write(line) != len(line):
            raise OSError(f"{self._file.name}: a line could not be written whole; is the disk full?")
        self._lines += 1


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


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - TAIL_BYTES)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())


def _num_lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)
