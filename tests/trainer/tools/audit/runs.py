"""Runs of real loaders whose ledgers the tests audit, and a slow second implementation of what their rows have to read."""

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

from tandem.trainer.config import DataConfig, LinearLRConfig, PhaseConfig, ScheduleConfig, ShardCacheConfig
from tandem.trainer.data import manifest
from tandem.trainer.data.digests import pack_u64, unpack_u64
from tandem.trainer.data.ledger import LEDGER_FILE, Ledger, copy_manifests, manifest_copy_path
from tandem.trainer.data.loader import Loader
from tandem.trainer.data.manifest import CorpusManifest, CorpusSplit
from tandem.trainer.data.mixture import row_sources
from tandem.trainer.data.shard_cache import ShardCache
from tandem.trainer.data.shuffle import BlockShuffle
from tandem.trainer.disk import atomic_write
from tandem.trainer.tools import audit
from tandem.trainer.tools.audit import replay
from tandem.trainer.tools.audit.ledger_history import LedgerHistory
from tandem.trainer.tools.audit.result import AuditResult, Finding
from tandem.trainer.tools.audit.webdataset_reader import WebdatasetReader
from tests.data_prep.corpus_writer import write_split

SEED, BLOCK_TOKENS, WINDOW_TOKENS = 3, 64, 320
SHORT_PHASE = PhaseConfig("short", 6 * 12 * 32, 32, 12, 1, {"a": 0.7, "b": 0.3})
LONG_PHASE = PhaseConfig("long", 6 * 6 * 128, 128, 6, 1, {"a": 0.4, "b": 0.6})
ADDED_PHASE = PhaseConfig("edited", 4 * 6 * 64, 64, 6, 1, {"a": 0.25, "b": 0.25, "c": 0.5})
EDITED_PHASES = [SHORT_PHASE, dataclasses.replace(LONG_PHASE, tokens=3 * 6 * 128), ADDED_PHASE]
"""The schedule after a user shortened the second phase and added a third one with a new source."""
NUM_STEPS = 13


def make_corpus(folder: Path, seed: int, documents: int) -> str:
    """Write random documents in small shards, with the real writer."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    texts = (np.append(draw.integers(1, 500, draw.integers(0, 90)), 0).astype(np.uint16) for _ in range(documents))
    train = write_split(folder, "train", texts, sample_tokens=512, shard_tokens=600)
    written = CorpusManifest(
        "uint16", 512, 500, "<eos>", 0, "1" * 64, 0.0, {}, {}, train=train, validation=CorpusSplit(0, 0, [])
    )
    atomic_write(folder / manifest.MANIFEST_FILE, manifest.dump_manifest(written))
    return str(folder)


def loaders(sources: dict[str, str], phases: list[PhaseConfig], dp_size: int) -> list[Loader]:
    schedule = ScheduleConfig(None, phases, LinearLRConfig("linear", 1.0, 0.0, 1, None))
    data = DataConfig(sources, shuffle_block_tokens=BLOCK_TOKENS, shuffle_window_tokens=WINDOW_TOKENS, num_workers=0)
    return [Loader(data, schedule, seed=SEED, vocab_size=512, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]


class SavedState(NamedTuple):
    """The part of a checkpoint that the next start needs."""

    step: int = 0
    cursor: dict[str, int] = {}  # noqa: RUF012
    num_ledger_lines: int = 0
    skipped: dict[str, list[str]] = {}  # noqa: RUF012


FRESH_STATE = SavedState()


def write_ledger(
    folder: Path,
    sources: dict,
    phases: list[PhaseConfig],
    saved: SavedState,
    end_step: int,
    dp_size: int,
    skip=None,
    bad=None,
    skip_cursor=None,
    rollback=False,
) -> SavedState:
    """Write what a run of these ranks writes from a checkpoint up to step `end_step`. Return the checkpoint of that step.

    `bad` has actions by step. `skip_cursor` is the cursor from which a run that passes over rows continues.
    """
    ranks, cursor = loaders(sources, phases, dp_size), skip_cursor or saved.cursor
    passed = {source: (saved.cursor.get(source, 0), end) for source, end in (skip_cursor or {}).items()}
    for loader in ranks:
        for each in [(source, file) for source, files in saved.skipped.items() for file in files]:
            loader.skip_shard(*each)
    ledger = Ledger(folder)
    fingerprints = ranks[0].fingerprints
    ledger.write_start(
        saved.step,
        cursor,
        shuffle_settings=ranks[0].shuffle_settings,
        phases=[dataclasses.asdict(phase) for phase in phases],
        fingerprints=fingerprints,
        skipped_shards=ranks[0].skipped_shards,
        dp_size=dp_size,
        num_ledger_lines=saved.num_ledger_lines,
        skipped_ranges=passed,
        is_rollback=rollback,
    )
    if skip:
        ledger.write_skipped_shard(saved.step + 1, *skip)
        for loader in ranks:
            loader.skip_shard(*skip)
    readers = [loader.batches(saved.step, cursor or None) for loader in ranks]
    for step in range(saved.step, end_step):
        batches = [next(reader) for reader in readers]
        summed = [sum(parts) for parts in zip(*(pack_u64(batch.digests) for batch in batches), strict=True)]
        cursor = batches[0].cursor
        ledger.write_step(step + 1, cursor, unpack_u64(summed, tp_size=1))
        if bad and step + 1 in bad:
            ledger.write_bad_step(step + 1, float("nan"), 7.5, f"loss of step {step + 1} is not finite", bad[step + 1])
    for reader in readers:
        reader.close()
    after = ledger.num_lines
    ledger.close()
    copy_manifests(folder, ranks[0].manifests)
    return SavedState(end_step, cursor, after, ranks[0].skipped_shards)


def state_at(folder: Path, step: int) -> SavedState:
    """Return the checkpoint that the last process to make this step could save after it."""
    lines, cursor = read_lines(folder), {}
    after = max(n for n, line in enumerate(lines, 1) if line["step"] == step and line["kind"] in ("step", "bad"))
    skipped: dict[str, list[str]] = {}
    for line in lines[:after]:
        if line["kind"] == "start":
            cursor, skipped = (
                dict(line["cursor"]),
                {source: list(files) for source, files in line["skipped_shards"].items()},
            )
        elif line["kind"] == "skip":
            skipped.setdefault(line["source"], []).append(line["shard"])
        elif line["kind"] == "step":
            cursor |= {source: end for source, (_, end) in line["read_ranges"].items()}
    return SavedState(step, cursor, after, skipped)


def write_full_run(folder: Path, sources: dict) -> None:
    """Write a run with dp 1, 2 and 3, discarded steps, phases, an end of an epoch, a mixture edit and a new source."""
    two = {name: sources[name] for name in "ab"}
    folder.mkdir()
    at_3 = write_ledger(folder, two, [SHORT_PHASE, LONG_PHASE], FRESH_STATE, 3, 1)
    write_ledger(folder, two, [SHORT_PHASE, LONG_PHASE], at_3, 5, 1)
    at_7 = write_ledger(folder, two, [SHORT_PHASE, LONG_PHASE], at_3, 7, 2)
    write_ledger(folder, sources, EDITED_PHASES, at_7, NUM_STEPS, 3)


def run_audit(folder: Path, tokens=None) -> AuditResult:
    history = LedgerHistory(folder)
    manifests = audit.load_manifest_copies(folder, history)
    corpora = audit.build_sources(history, manifests)
    fingerprints = {source: corpus.fingerprint for source, corpus in manifests.items()}
    return replay.Replay(history, corpora, fingerprints, tokens and tokens(manifests, history.skipped_shards)).run()


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LEDGER_FILE).read_text().splitlines()]


def write_lines(folder: Path, lines: list[dict]) -> None:
    (folder / LEDGER_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def step_line(lines: list[dict], step: int) -> dict:
    """Return the last line of the step."""
    return next(line for line in reversed(lines) if line["kind"] == "step" and line["step"] == step)


def findings(folder: Path) -> list[Finding]:
    return run_audit(folder).findings


class ExpectedStep:
    """What the rows of a step have to read, computed a second time, token by token."""

    def __init__(self, folder: Path, step: int):
        self.step, self._folder = step, folder
        lines = read_lines(folder)
        self.line = step_line(lines, step)
        start = [line for line in lines if line["kind"] == "start"][-1]
        first = 1
        for phase in (PhaseConfig(**phase) for phase in start["phases"]):
            if step < first + phase.num_steps:
                break
            first += phase.num_steps
        self.phase = phase
        self.sources = row_sources(phase, (step - first) * phase.global_batch_size, phase.global_batch_size)
        self.positions, at = [], {source: before for source, (before, _) in self.line["read_ranges"].items()}
        for source in self.sources:
            self.positions.append(at[source])
            at[source] += phase.seq_len

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        return position_pieces(self._folder, self.sources[row], self.positions[row], self.phase.seq_len)

    def shards(self, row: int) -> list[str]:
        files = [shard.file for shard in train_split(self._folder, self.sources[row]).shards]
        return [f"{files[shard]}:{first}+{tokens}" for shard, first, tokens in self.pieces(row)]

    def hash(self, number: int, row: int) -> int:
        """Hash row `number` as if it had read the tokens of `row`."""
        packed = b"".join(struct.pack("<qqq", *piece) for piece in self.pieces(row))
        return xxhash.xxh3_64(struct.pack("<q", number) + self.sources[row].encode() + b"\0" + packed).intdigest()


def train_split(folder: Path, source: str) -> CorpusSplit:
    path = manifest_copy_path(folder, source)
    return manifest.parse_manifest(path.read_bytes(), path).train


def position_pieces(folder: Path, source: str, position: int, count: int) -> list[tuple[int, int, int]]:
    split = train_split(folder, source)
    order = BlockShuffle(
        split.tokens, shuffle_block_tokens=BLOCK_TOKENS, shuffle_window_tokens=WINDOW_TOKENS, source=source, seed=SEED
    )
    return shard_pieces(
        split,
        source,
        [start + place for start, taken in order.stream_ranges(position, count) for place in range(taken)],
    )


def shard_pieces(split: CorpusSplit, source: str, stream: list[int]) -> list[tuple[int, int, int]]:
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


def rows_of_source(reading: ExpectedStep, source: str) -> list[int]:
    return [row for row, name in enumerate(reading.sources) if name == source]


def webdataset_reader(sources, cache_folder: Path | None = None):
    """What `run_audit` takes to read the shards of these folders or addresses again."""
    cache = ShardCache(ShardCacheConfig(**{"folder": str(cache_folder)} if cache_folder else {}))
    return lambda manifests, skipped_shards: WebdatasetReader(sources, manifests, cache, skipped_shards)


def run_audit_command(folder: Path, *words: str) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    audit.add_arguments(parser)
    return audit.run(parser.parse_args([str(folder), *words]))
