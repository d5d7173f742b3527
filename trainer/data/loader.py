"""The rows that one data-parallel rank reads at each step, from the sources of the config.

The global rows of step n are a pure function of the manifests, the seed, the phases and n, and each rank takes a slice of
them. They therefore do not depend on the number of data-parallel ranks, which must divide them evenly. The loader computes the
positions of the rows, which is cheap, and threads read the rows. Each batch carries the read position that follows it (its
`cursor`), so the prefetch depth does not affect a resume.
"""

import dataclasses
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from tandem.trainer import config
from tandem.trainer.config import UserError
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data import corpora, mixture
from tandem.trainer.data.manifest import CorpusManifest, CorpusSplit
from tandem.trainer.data.rows import Batch, BatchPlan, RowRun, SourceReader, build_batch, unpack_batch
from tandem.trainer.data.shard_cache import ShardCache
from tandem.trainer.data.shuffle import BlockShuffle
from tandem.trainer.data.token_stream import TokenStream
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
        self.manifests: dict[str, CorpusManifest] = corpora.load_corpora(data, vocab_size)
        self.fingerprints: dict[str, str] = {name: corpus.fingerprint for name, corpus in self.manifests.items()}
        """Hash of each source's manifest. A resume requires the same hashes (see `manifest.check_fingerprints`)."""
        first_manifest = next(iter(self.manifests.values()))
        self._eos_id = first_manifest.eos_id
        self.eos_token: str = first_manifest.eos_token
        """The token that ends each document, the same in all sources."""
        self.tokenizer_sha256: str = first_manifest.tokenizer_sha256
        self.shuffle_settings: dict[str, int] = corpora.shuffle_settings(data, seed)
        self.skipped_shards: dict[str, list[str]] = {}
        """Skipped shard files of each source (see `skip_shard`). After a resume, they must be those of the checkpoint."""
        self._max_tokens_by_source = corpora.find_max_tokens(data, self.manifests)
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
        damaged_tokens = {}
        if any(self.skipped_shards.values()):
            cursor = mixture.cursor_at(self._schedule, step) if cursor is None else cursor
            for source, max_tokens in self._max_tokens_by_source.items():
                skipped_tokens_before = self._train_readers[source].skipped_tokens_before
                damaged_tokens[source] = skipped_tokens_before(max_tokens) - skipped_tokens_before(
                    cursor.get(source, 0)
                )
        return corpora.find_data_end(self._data, self._schedule, self.manifests, step, cursor, damaged_tokens)

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
        corpora.check_held_out_tokens(self._data, self.manifests, phase, tokens)
        sources, readers = mixture.row_sources(phase, 0, tokens // phase.seq_len), self._validation_readers
        rows, cursor = [], dict.fromkeys(sources, 0)
        num_rows_left = {source: readers[source].stream.kept_epoch_tokens // phase.seq_len for source in cursor}
        for source in sources:
            if num_rows_left[source]:
                num_rows_left[source] -= 1
                rows.append((source, cursor[source]))
                cursor[source] = readers[source].advance(cursor[source], phase.seq_len)
        return self._read_validation_batches(rows[self._dp_rank :: self._dp_size], phase)

    def _build_reader(
        self, source: str, corpus: CorpusManifest, split: CorpusSplit, seed: int | None, cache: ShardCache
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
