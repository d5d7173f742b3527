"""Runs of real loaders whose ledgers are audited, and what their rows are to read, said once more."""

import dataclasses
import hashlib
import json
import struct
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from tandem.data_prep.shard_writer import write_split
from tandem.trainer.config import Data, Linear, Phase, Schedule
from tandem.trainer.data import manifest
from tandem.trainer.data.ledger import FILE, Ledger, copy_manifests, halves, joined, manifest_copy
from tandem.trainer.data.loader import Loader
from tandem.trainer.data.manifest import Manifest, Split
from tandem.trainer.data.mixture import row_sources
from tandem.trainer.data.shuffle import Order
from tandem.trainer.disk import write_whole
from tandem.trainer.tools import audit
from tandem.trainer.tools.audit import replay
from tandem.trainer.tools.audit.ledger_history import History
from tandem.trainer.tools.audit.result import Finding, Verdict

SEED, BLOCK, WINDOW = 3, 64, 320
SHORT = Phase("short", 6 * 12 * 32, 32, 12, 1, {"a": 0.7, "b": 0.3})
LONG = Phase("long", 6 * 6 * 128, 128, 6, 1, {"a": 0.4, "b": 0.6})
ADDED = Phase("edited", 4 * 6 * 64, 64, 6, 1, {"a": 0.25, "b": 0.25, "c": 0.5})
EDITED = [SHORT, dataclasses.replace(LONG, tokens=3 * 6 * 128), ADDED]
"""The schedule after a person has cut the second phase short and added a third, with a new source."""
STEPS = 13


def make_corpus(folder: Path, seed: int, documents: int) -> str:
    """Random documents in small shards, by the real writer."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    texts = (np.append(draw.integers(1, 500, draw.integers(0, 90)), 0).astype(np.uint16) for _ in range(documents))
    train = write_split(folder, "train", texts, sample_tokens=512, shard_tokens=600)
    written = Manifest("uint16", 512, 500, "<eos>", 0, "one", 0.0, {}, {}, train=train, validation=Split(0, 0, []))
    write_whole(folder / manifest.FILE, manifest.dump(written))
    return str(folder)


def loaders(sources: dict[str, str], phases: list[Phase], dp_size: int) -> list[Loader]:
    schedule = Schedule(None, phases, Linear("linear", 1.0, 0.0, 1, None))
    data = Data(sources, block_tokens=BLOCK, window_tokens=WINDOW, workers=0)
    return [Loader(data, schedule, seed=SEED, vocab=512, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]


class Saved(NamedTuple):
    """What a checkpoint keeps for the next start."""

    step: int = 0
    cursor: dict[str, int] = {}  # noqa: RUF012
    after: int = 0
    skipped: dict[str, list[str]] = {}  # noqa: RUF012


NOTHING = Saved()


def train(
    folder: Path, sources: dict, phases: list[Phase], saved: Saved, until: int, dp_size: int, skip=None, bad=None, over=None,
    rollback=False,
) -> Saved:  # fmt: skip
    """The ledger has what a run of these ranks writes from a checkpoint up to step `until`; returns the checkpoint there.

    `bad` are decisions by step, `over` is the cursor from which a run goes on that passes over rows.
    """
    ranks, cursor = loaders(sources, phases, dp_size), over or saved.cursor
    passed = {source: (saved.cursor.get(source, 0), end) for source, end in (over or {}).items()}
    for loader in ranks:
        for each in [(source, file) for source, files in saved.skipped.items() for file in files]:
            loader.skip(*each)
    ledger = Ledger(folder)
    fingerprints = ranks[0].fingerprints
    ledger.start(
        saved.step, cursor, order=ranks[0].order, phases=[dataclasses.asdict(phase) for phase in phases],
        fingerprints=fingerprints, skipped=ranks[0].skipped, dp_size=dp_size, after=saved.after, passed=passed,
        rollback=rollback,
    )  # fmt: skip
    if skip:
        ledger.skip(saved.step + 1, *skip)
        for loader in ranks:
            loader.skip(*skip)
    readers = [loader.batches(saved.step, cursor or None) for loader in ranks]
    for step in range(saved.step, until):
        batches = [next(reader) for reader in readers]
        summed = [sum(parts) for parts in zip(*(halves(batch.evidence) for batch in batches), strict=True)]
        cursor = batches[0].cursor
        ledger.step(step + 1, cursor, joined(summed, tp_size=1))
        if bad and step + 1 in bad:
            ledger.bad(step + 1, float("nan"), 7.5, f"loss of step {step + 1} is not finite", bad[step + 1])
    for reader in readers:
        reader.close()
    after = ledger.num_lines
    ledger.close()
    copy_manifests(folder, ranks[0].manifests)
    return Saved(until, cursor, after, ranks[0].skipped)


def saved_at(folder: Path, step: int) -> Saved:
    """The checkpoint that the last process to make this step can have made after it."""
    lines, cursor = lines_of(folder), {}
    after = max(n for n, line in enumerate(lines, 1) if line["step"] == step and line["kind"] in ("step", "bad"))
    skipped: dict[str, list[str]] = {}
    for line in lines[:after]:
        if line["kind"] == "start":
            cursor, skipped = dict(line["cursor"]), {source: list(files) for source, files in line["skipped"].items()}
        elif line["kind"] == "skip":
            skipped.setdefault(line["source"], []).append(line["shard"])
        elif line["kind"] == "step":
            cursor |= {source: end for source, (_, end) in line["taken"].items()}
    return Saved(step, cursor, after, skipped)


def run_all(folder: Path, sources: dict) -> None:
    """A run with everything in it: dp 1, 2 and 3, a rollback, phases, an end of an epoch, a mixture edit, a new source."""
    two = {name: sources[name] for name in "ab"}
    folder.mkdir()
    at_3 = train(folder, two, [SHORT, LONG], NOTHING, 3, 1)
    train(folder, two, [SHORT, LONG], at_3, 5, 1)
    at_7 = train(folder, two, [SHORT, LONG], at_3, 7, 2)
    train(folder, sources, EDITED, at_7, STEPS, 3)


def audited(folder: Path, tokens=None) -> Verdict:
    history = History(folder)
    manifests = audit.copies(folder, history)
    corpora = audit.corpora_of(history, manifests)
    fingerprints = {source: corpus.fingerprint for source, corpus in manifests.items()}
    return replay.Replay(history, corpora, fingerprints, tokens and tokens(manifests, history.left_out)).run()


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def write(folder: Path, lines: list[dict]) -> None:
    (folder / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def line_of(lines: list[dict], step: int) -> dict:
    """The last one of the step."""
    return next(line for line in reversed(lines) if line["kind"] == "step" and line["step"] == step)


def findings(folder: Path) -> list[Finding]:
    return audited(folder).findings


class Reading:
    """What the rows of a step are to read, said once more and slowly: token by token."""

    def __init__(self, folder: Path, step: int):
        self.step, self._folder = step, folder
        lines = lines_of(folder)
        self.line = line_of(lines, step)
        start = [line for line in lines if line["kind"] == "start"][-1]
        first = 1
        for phase in (Phase(**phase) for phase in start["phases"]):
            if step < first + phase.steps:
                break
            first += phase.steps
        self.phase = phase
        self.sources = row_sources(phase, (step - first) * phase.rows, phase.rows)
        self.positions, at = [], {source: before for source, (before, _) in self.line["taken"].items()}
        for source in self.sources:
            self.positions.append(at[source])
            at[source] += phase.seq_len

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        return pieces_of(self._folder, self.sources[row], self.positions[row], self.phase.seq_len)

    def shards(self, row: int) -> list[str]:
        files = [shard.file for shard in split_of(self._folder, self.sources[row]).shards]
        return [f"{files[shard]}:{first}+{tokens}" for shard, first, tokens in self.pieces(row)]

    def hash(self, number: int, row: int) -> int:
        """Of row `number` if it read what `row` is for."""
        packed = b"".join(struct.pack("<qqq", *piece) for piece in self.pieces(row))
        return xxhash.xxh3_64(struct.pack("<q", number) + self.sources[row].encode() + b"\0" + packed).intdigest()


def split_of(folder: Path, source: str) -> Split:
    path = manifest_copy(folder, source)
    return manifest.parsed(path.read_bytes(), path).train


def pieces_of(folder: Path, source: str, position: int, count: int) -> list[tuple[int, int, int]]:
    split = split_of(folder, source)
    order = Order(split.tokens, block_tokens=BLOCK, window_tokens=WINDOW, name=source, seed=SEED)
    return shard_pieces(
        split, source, [start + place for start, taken in order.runs(position, count) for place in range(taken)]
    )


def shard_pieces(split: Split, source: str, stream: list[int]) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    for token in stream:
        epoch, offset = divmod(token, split.tokens)
        order = sorted(
            range(len(split.shards)),
            key=lambda index: hashlib.sha256(f"{SEED}/{source}/{epoch}/{index}".encode()).digest(),
        )
        starts = [0, *accumulate(split.shards[index].tokens for index in order)]
        place = bisect_right(starts, offset) - 1
        shard, first = order[place], offset - starts[place]
        if found and found[-1][0] == shard and sum(found[-1][1:]) == first:
            found[-1] = (shard, found[-1][1], found[-1][2] + 1)
        else:
            found.append((shard, first, 1))
    return found


def rows_of_source(reading: Reading, source: str) -> list[int]:
    return [row for row, name in enumerate(reading.sources) if name == source]


def reader_over(sources):
    from tandem.trainer.config import Cache as Settings
    from tandem.trainer.data.shard_cache import Cache
    from tandem.trainer.tools.audit.tar_reader import TarReader

    return lambda manifests, left_out: TarReader(sources, manifests, Cache(Settings()), left_out)


def command(folder: Path, *words: str) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    audit.add_arguments(parser)
    return audit.run(parser.parse_args([str(folder), *words]))
