"""The rows that one data-parallel rank reads at each step, from the sources of the config.

The global rows of step n are a pure function of the manifests, the seed, the phases and n, and each rank takes a slice of
them. They therefore do not depend on the number of data-parallel ranks, which must divide them evenly. The loader computes the
positions of the rows, which is cheap, and threads read the rows. Each batch carries the read position that follows it (its
`cursor`), so the prefetch depth does not affect a resume.
"""

import dataclasses
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from tandem.trainer import config
from tandem.trainer.config import UserError
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data import manifest, mixture
from tandem.trainer.data.manifest import DamagedShard
from tandem.trainer.data.rows import Batch, BatchPlan, RowRun, SourceReader, build_batch, unpack_batch
from tandem.trainer.data.shard_cache import ShardCache
from tandem.trainer.data.shuffle import BlockShuffle
from tandem.trainer.data.token_stream import TokenStream
from tandem.trainer.data.tokenizer_file import find_difference, parse_tokenizer
from tandem.trainer.runtime.signals import StopRequested

__all__ = ["Batch", "Loader", "unpack_batch"]


class Loader:
    """Opens and checks every source of `data`.

    Raises: UserError if a corpus is incomplete, was prepared with another tokenizer, or does not fit `vocab_size`; also if the
    schedule reads a source more often than `data.max_epochs` allows and `data.at_end` is `refuse`.
    """

    def __init__(
        self, data: config.DataConfig, schedule: config.ScheduleConfig, *,
        seed: int, vocab_size: int, dp_rank: int, dp_size: int,
    ):  # fmt: skip
        self._data, self._schedule = data, schedule
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self.manifests: dict[str, manifest.CorpusManifest] = {
            source: manifest.load_manifest(folder, data.cache) for source, folder in data.sources.items()
        }
        for source, corpus in self.manifests.items():
            try:
                if data.damaged_shards == "stop":
                    manifest.check_shard_files(data.sources[source], corpus)
            except DamagedShard as error:
                message = f"{error}, or set data.damaged_shards=skip to train without this shard"
                raise DamagedShard(error.file, message) from None
            _check_vocab(source, corpus, vocab_size)
            if data.tokenizer is not None:
                manifest.check_tokenizer(data.tokenizer, corpus, "data.tokenizer", corpus_folder=data.sources[source])
        _check_same_tokenizer(data.sources, self.manifests)
        self.fingerprints: dict[str, str] = {name: corpus.fingerprint for name, corpus in self.manifests.items()}
        """Hash of each source's manifest. A resume requires the same hashes (see `manifest.check_fingerprints`)."""
        _check_distinct_corpora(self.fingerprints)
        first_manifest = next(iter(self.manifests.values()))
        self._eos_id = first_manifest.eos_id
        self.eos_token: str = first_manifest.eos_token
        """The token that ends each document, the same in all sources."""
        self.tokenizer_sha256: str = first_manifest.tokenizer_sha256
        self.shuffle_settings: dict[str, int] = {
            "run.seed": seed,
            "data.shuffle_block_tokens": data.shuffle_block_tokens,
            "data.shuffle_window_tokens": data.shuffle_window_tokens,
        }
        """Together with the corpora, these determine the order of all tokens, so they must not change during a run."""
        self.skipped_shards: dict[str, list[str]] = {}
        """Skipped shard files of each source (see `skip_shard`). After a resume, they must be those of the checkpoint."""
        self._max_tokens_by_source = {
            name: int(epochs * self.manifests[name].train.tokens) for name, epochs in data.max_epochs.items()
        }
        self._train_readers, self._validation_readers, cache = {}, {}, ShardCache(data.cache)
        for source, corpus in self.manifests.items():
            self._train_readers[source] = self._build_reader(source, corpus, corpus.train, seed, cache)
            if corpus.validation.tokens:
                self._validation_readers[source] = self._build_reader(source, corpus, corpus.validation, None, cache)
        self.find_end(0, None)  # raises if the schedule exceeds data.max_epochs

    def batches(self, step: int, cursor: dict[str, int] | None) -> Generator[Batch, None, None]:
        """Return this rank's batches for the global steps from `step` to the end of the data (see `find_end`).

        `cursor` is the cursor of the batch before `step`; None means the one that follows from the schedule (empty at step 0).
        The iterator raises DamagedSourceShard if it reads from a damaged shard.
        """
        start = mixture.cursor_at(self._schedule, step) if cursor is None else dict(cursor)
        plans = self._batch_plans(step, start)
        if self._data.num_workers and self._data.prefetch_steps:
            return self._prefetch_batches(plans)
        return (build_batch(self._train_readers, plan, self._eos_id) for plan in plans)

    def find_end(self, step: int, cursor: dict[str, int] | None) -> tuple[int, str | None]:
        """Return the step at which the data ends, and the source that is exhausted there (None if the schedule ends first).

        A source is exhausted after the number of epochs in `data.max_epochs`. All ranks compute the same result.
        Raises: UserError if a source is exhausted before the schedule ends and `data.at_end` is `refuse`.
        """
        total_steps = Timeline(self._schedule).total_steps
        scheduled_cursor = mixture.cursor_at(self._schedule, step)
        cursor = scheduled_cursor if cursor is None else cursor
        ends = [(total_steps, "")]
        for source, max_tokens in self._max_tokens_by_source.items():
            reader, position = self._train_readers[source], cursor.get(source, 0)
            skipped_tokens = reader.skipped_tokens_before(max_tokens) - reader.skipped_tokens_before(position)
            tokens = max_tokens - position - skipped_tokens + scheduled_cursor.get(source, 0)
            scheduled_tokens = partial(self._scheduled_tokens, source)
            num_feedable_steps = bisect_right(range(step, total_steps + 1), tokens, key=scheduled_tokens)
            ends.append((max(step, step + num_feedable_steps - 1), source))
        last_step, source = min(ends)
        if source and self._data.at_end == "refuse":
            raise UserError(self._max_epochs_message(source, total_steps, cursor.get(source, 0)))
        return last_step, source or None

    def ledger_fields(self) -> dict[str, Any]:
        """Return the arguments of `Ledger.write_start` that determine which tokens come next."""
        return {
            "shuffle_settings": self.shuffle_settings,
            "phases": [dataclasses.asdict(phase) for phase in self._schedule.phases],
            "fingerprints": self.fingerprints, "skipped_shards": self.skipped_shards, "dp_size": self._dp_size,
        }  # fmt: skip

    def skip_shard(self, source: str, file: str) -> None:
        """Stop taking rows from this shard. All further rows of the source come from its other shards.

        Before the call, close all iterators that `batches` and `validation_batches` have returned.
        Raises: UserError if no training shard of the source is left.
        """
        files = self.skipped_shards.setdefault(source, [])
        if file not in files:
            files.append(file)
        for sources in (self._train_readers, self._validation_readers):
            if source in sources:
                sources[source].stream.skip_shard(file)
        if source in self._train_readers and not self._train_readers[source].stream.kept_epoch_tokens:
            raise UserError(
                f"data.sources.{source}: all training shards of {self._data.sources[source]} are damaged (last found: {file}); "
                "restore them"
            )

    def validation_batches(self, phase: config.PhaseConfig, tokens: int) -> Iterator[Batch]:
        """Return this rank's held-out rows in batches of up to `phase.micro_batch_size`. Rank d takes rows d, d + dp_size, ...

        Every call returns the same rows, in which each source has its share of the phase's mixture. The cursor of each batch is
        empty. If shards are skipped, there are only as many rows as the remaining tokens fill, perhaps none.
        Raises: UserError, at the call, if a source has fewer held-out tokens than its share of `tokens`.
        """
        sources, readers = mixture.row_sources(phase, 0, tokens // phase.seq_len), self._validation_readers
        for source, num_rows in Counter(sources).items():
            needed_tokens, reader = num_rows * phase.seq_len, readers.get(source)
            available_tokens = reader.stream.epoch_tokens if reader else 0
            if needed_tokens > available_tokens:
                raise UserError(
                    f"evaluate.tokens: {tokens} needs {needed_tokens} held-out tokens of {self._data.sources[source]}, which "
                    f"has only {available_tokens}; lower evaluate.tokens, or prepare the corpus with a larger --held-out"
                )
        rows, cursor = [], dict.fromkeys(sources, 0)
        num_rows_left = {source: readers[source].stream.kept_epoch_tokens // phase.seq_len for source in cursor}
        for source in sources:
            if num_rows_left[source]:
                num_rows_left[source] -= 1
                rows.append((source, cursor[source]))
                cursor[source] = readers[source].advance(cursor[source], phase.seq_len)
        return self._read_validation_batches(rows[self._dp_rank :: self._dp_size], phase)

    def _build_reader(
        self, source: str, corpus: manifest.CorpusManifest, split: manifest.CorpusSplit, seed: int | None, cache: ShardCache
    ) -> SourceReader:  # fmt: skip
        data = self._data
        order = BlockShuffle(
            split.tokens, shuffle_block_tokens=data.shuffle_block_tokens,
            shuffle_window_tokens=data.shuffle_window_tokens, source=source, seed=seed,
        )  # fmt: skip
        stream = TokenStream(data.sources[source], corpus, split, source=source, seed=seed, cache=cache)
        return SourceReader(stream, order)

    def _read_validation_batches(self, rows: list[tuple[str, int]], phase: config.PhaseConfig) -> Iterator[Batch]:
        for first in range(0, len(rows), phase.micro_batch_size):
            chunk = rows[first : first + phase.micro_batch_size]
            runs = [RowRun(source, position, np.array([row])) for row, (source, position) in enumerate(chunk)]
            plan = BatchPlan(runs, len(chunk), phase.seq_len, {}, None)
            yield build_batch(self._validation_readers, plan, self._eos_id)

    def _batch_plans(self, step: int, cursor: dict[str, int]) -> Iterator[BatchPlan]:
        end = self.find_end(step, cursor)[0]
        for phase_span in Timeline(self._schedule).phase_spans:
            for step_index in range(max(step, phase_span.first_step), min(end, phase_span.end_step)):
                yield (plan := self._plan_batch(phase_span.phase, step_index - phase_span.first_step, cursor))
                cursor = plan.cursor

    def _plan_batch(self, phase: config.PhaseConfig, step: int, cursor: dict[str, int]) -> BatchPlan:
        """Compute the positions of this rank's rows in step `step` of the phase."""
        assert phase.global_batch_size % self._dp_size == 0, "checked by config.check_world_size"
        num_rows, seq_len = phase.global_batch_size // self._dp_size, phase.seq_len
        first_row_index = self._dp_rank * num_rows
        row_runs, next_cursor = [], dict(cursor)
        source_rows = mixture.rows_by_source(phase, step, first_row_index, first_row_index + num_rows)
        for source, num_rows_taken, num_rows_before, row_indices in source_rows:
            reader, position = self._train_readers[source], cursor.get(source, 0)
            if len(row_indices):
                row_runs.append(RowRun(source, reader.advance(position, num_rows_before * seq_len), row_indices))
            next_cursor[source] = reader.advance(position, num_rows_taken * seq_len)
        return BatchPlan(row_runs, num_rows, seq_len, next_cursor, first_row_index)

    def _prefetch_batches(self, plans: Iterator[BatchPlan]) -> Generator[Batch, None, None]:
        """Yield the batches in order. Threads prefetch up to `prefetch_steps` batches until the generator is closed."""
        pool = ThreadPoolExecutor(self._data.num_workers, thread_name_prefix="data")
        pending: deque[Future[Batch]] = deque()
        waits_for_threads = True

        def submit(count: int) -> None:
            for plan in islice(plans, count):
                for run in plan.row_runs:
                    self._train_readers[run.source].prefetch(run.position)
                pending.append(pool.submit(build_batch, self._train_readers, plan, self._eos_id))

        try:
            submit(self._data.prefetch_steps)
            while pending:
                next_batch = pending.popleft().result()
                submit(1)
                yield next_batch
        except StopRequested:
            waits_for_threads = False  # a read from an unreachable server takes minutes
            raise
        finally:
            pool.shutdown(waits_for_threads, cancel_futures=True)

    def _scheduled_tokens(self, source: str, step: int) -> int:
        return mixture.cursor_at(self._schedule, step).get(source, 0)

    def _max_epochs_message(self, source: str, total_steps: int, position: int) -> str:
        """Return the error message for a schedule that reads too much of the source. `position` is the run's read position."""
        max_tokens, reader = self._max_tokens_by_source[source], self._train_readers[source]
        damaged_tokens = reader.skipped_tokens_before(max_tokens) - reader.skipped_tokens_before(position)
        damage = f", of which {damaged_tokens} unread tokens are in damaged shards" if damaged_tokens else ""
        return (
            f"data.max_epochs.{source}: the schedule reads {self._scheduled_tokens(source, total_steps)} tokens, but "
            f"{self._data.max_epochs[source]:g} epochs of the {self.manifests[source].train.tokens} tokens in "
            f"{self._data.sources[source]} are only {max_tokens}{damage}; raise max_epochs, lower the source's share or the "
            "phases' tokens, or set data.at_end=stop to end the run when the source is used up"
        )


def _check_vocab(source: str, corpus: manifest.CorpusManifest, vocab_size: int) -> None:
    key_path = f"data.sources.{source}"
    if corpus.vocab > vocab_size:
        raise UserError(
            f"model.vocab_size: {vocab_size} is too small for the tokenizer of {key_path}; "
            f"use at least {corpus.vocab}, its number of ids"
        )
    if not corpus.train.tokens:
        raise UserError(f"{key_path}: has no training tokens; prepare it with a smaller --held-out or more text")


def _check_distinct_corpora(fingerprints: dict[str, str]) -> None:
    first: dict[str, str] = {}
    for name, fingerprint in fingerprints.items():
        if (other := first.setdefault(fingerprint, name)) != name:
            raise UserError(
                f"data.sources.{name}: is the same corpus as {other}, so its tokens would count under two names; "
                f"remove {name} and give {other} both shares"
            )


def _check_same_tokenizer(folders: dict[str, str], corpora: dict[str, manifest.CorpusManifest]) -> None:
    first_name, *other_names = corpora
    first = corpora[first_name]
    for name in other_names:
        other = corpora[name]
        is_same, reason = first.tokenizer_sha256 == other.tokenizer_sha256, ""
        with suppress(OSError):  # without the files, their hashes decide
            if not is_same:
                found, expected = (
                    parse_tokenizer(manifest.read_corpus_tokenizer(folders[one], corpora[one]), folders[one])
                    for one in (name, first_name)
                )
                difference = find_difference(found, expected, first.eos_token)
                is_same, reason = difference is None, f" ({manifest.one_line(difference)})" if difference else ""
        if not is_same or first.eos_id != other.eos_id:
            raise UserError(
                f"data.sources.{name}: was prepared with tokenizer {other.tokenizer_sha256[:12]} and EOS {other.eos_token!r}, "
                f"but {first_name} was prepared with tokenizer {first.tokenizer_sha256[:12]} and EOS {first.eos_token!r}"
                f"{reason}; all sources of a run must share one tokenizer; prepare one of the two again"
            )
