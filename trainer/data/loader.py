"""What a run reads: the sources of the config opened and checked, their rows of every global step for one
data-parallel rank.

The one idea: the rows of step n are a pure function of manifests, seed, phases and n, and a rank takes its
slice of them, so any data-parallel size that divides the rows sees the same rows. Where rows lie is computed
here, which costs nothing; reading them is left to any number of threads. The cursor travels in the batch it
belongs to: how far has been read ahead is nobody's business, and a resume at the cursor of the last finished
step is exact.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np

from tandem.trainer import config
from tandem.trainer.config import UserError
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data import manifest, mixture
from tandem.trainer.data.digests import BatchDigests
from tandem.trainer.data.manifest import DamagedShard
from tandem.trainer.data.rows import Batch, BatchPlan, RowRun, SourceReader, build_batch, unpack_batch
from tandem.trainer.data.shard_cache import ShardCache
from tandem.trainer.data.shuffle import BlockShuffle
from tandem.trainer.data.token_stream import TokenStream
from tandem.trainer.runtime import StopRequested

__all__ = ["Batch", "BatchDigests", "Loader", "unpack_batch"]


class Loader:
    """Opens every source of `data`.

    Raises: UserError for a corpus that is incomplete, was prepared with another tokenizer, does not fit
    `vocab_size`, or, unless `data` says otherwise, may not be read as often as the schedule asks.
    """

    def __init__(
        self,
        data: config.DataConfig,
        schedule: config.ScheduleConfig,
        *,
        seed: int,
        vocab_size: int,
        dp_rank: int,
        dp_size: int,
    ):
        self._data, self._schedule = data, schedule
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self.manifests: dict[str, manifest.CorpusManifest] = {
            source: manifest.load_manifest(folder, data.cache) for source, folder in data.sources.items()
        }
        """Of every source of `data`."""
        for source, corpus in self.manifests.items():
            if data.damaged_shards == "stop":
                _check_shard_files(data.sources[source], corpus)
            _check_vocab(source, corpus, vocab_size)
            if data.tokenizer is not None:
                manifest.check_tokenizer(data.tokenizer, corpus, "data.tokenizer")
        _check_same_tokenizer(self.manifests)
        self.fingerprints: dict[str, str] = {name: corpus.fingerprint for name, corpus in self.manifests.items()}
        """Hash of each source's manifest: what a resume must match, see `manifest.check_fingerprints`."""
        _check_distinct_corpora(self.fingerprints)
        first_manifest = next(iter(self.manifests.values()))
        self._eos_id = first_manifest.eos_id
        self.eos_token: str = first_manifest.eos_token
        """What ends a document, in every source."""
        self.shuffle_settings: dict[str, int] = {
            "run.seed": seed,
            "data.shuffle_block_tokens": data.shuffle_block_tokens,
            "data.shuffle_window_tokens": data.shuffle_window_tokens,
        }
        """What besides the corpora fixes which token comes when: for the life of a run."""
        self.skipped_shards: dict[str, list[str]] = {}
        """Files of the shards of each source that are left out: what a resume must take up, see `skip_shard`."""
        self._max_tokens_by_source = {
            name: int(epochs * self.manifests[name].train.tokens) for name, epochs in data.max_epochs.items()
        }
        self._train_readers, self._validation_readers, cache = {}, {}, ShardCache(data.cache)
        for source, corpus in self.manifests.items():
            self._train_readers[source] = self._build_reader(source, corpus, corpus.train, seed, cache)
            if corpus.validation.tokens:
                self._validation_readers[source] = self._build_reader(source, corpus, corpus.validation, None, cache)
        self.find_end(0, None)  # refuses what the schedule asks too much of

    def batches(self, step: int, cursor: dict[str, int] | None) -> Generator[Batch, None, None]:
        """This rank's batches of global steps `step`, `step` + 1, ... to the last that can be fed, see `find_end`.

        `cursor` is that of the batch before `step`; None takes the one the schedule implies (nothing read at
        step 0).
        Raises: UserError, when a batch is asked for, naming a shard that is damaged.
        """
        start = mixture.cursor_at(self._schedule, step) if cursor is None else dict(cursor)
        cuts = self._batch_plans(step, start)
        if self._data.num_workers and self._data.prefetch_steps:
            return self._prefetch_batches(cuts)
        return (build_batch(self._train_readers, cut, self._eos_id) for cut in cuts)

    def find_end(self, step: int, cursor: dict[str, int] | None) -> tuple[int, str | None]:
        """How many steps the run can make, given where it is, and the source that ends it before the schedule does, if any.

        A source is at its end where `data.max_epochs` says; a pure function, the same on every rank.
        Raises: UserError for such a source where `data.at_end` is refuse.
        """
        total_steps = Timeline(self._schedule).total_steps
        scheduled_cursor = mixture.cursor_at(self._schedule, step)
        ends = [(total_steps, "")]
        for source, max_tokens in self._max_tokens_by_source.items():
            reader, position = (
                self._train_readers[source],
                (scheduled_cursor if cursor is None else cursor).get(source, 0),
            )
            tokens = (
                max_tokens
                - reader.skipped_tokens_before(max_tokens)
                - (position - reader.skipped_tokens_before(position))
            )
            tokens += scheduled_cursor.get(source, 0)
            steps = range(step, total_steps + 1)
            num_feedable_steps = bisect_left(
                steps,
                True,
                key=lambda now, source=source, tokens=tokens: self._scheduled_tokens(now, source) > tokens,  # type: ignore[misc]
            )
            ends.append((max(step, step + num_feedable_steps - 1), source))
        last_step, source = min(ends)
        if source and self._data.at_end == "refuse":
            position = (scheduled_cursor if cursor is None else cursor).get(source, 0)
            raise UserError(self._max_epochs_message(source, total_steps, position))
        return last_step, source or None

    def skip_shard(self, source: str, file: str) -> None:
        """From now on the shard is left out: rows are cut from what remains of its source behind the cursor.

        Iterators made before must be closed. Raises: UserError where nothing remains.
        """
        files = self.skipped_shards.setdefault(source, [])
        if file not in files:
            files.append(file)
        for sources in (self._train_readers, self._validation_readers):
            if source in sources:
                sources[source].stream.skip_shard(file)
        if source in self._train_readers and not self._train_readers[source].stream.kept_epoch_tokens:
            raise UserError(
                f"data.sources.{source}: every training shard is damaged, {file} is the last; nothing is left to read; "
                f"restore {self._data.sources[source]}"
            )

    def validation_batches(self, phase: config.PhaseConfig, tokens: int) -> Iterator[Batch]:
        """This rank's held-out rows in chunks of at most phase.micro_batch_size: row r of all goes to rank r %
        dp_size.

        The rows are the same at every call; their sources follow the phase's mixture. A batch's cursor is
        empty. Where shards are left out they are the whole rows that remain, which may be none.
        Raises: UserError, at the call, where a source holds fewer held-out tokens than its share of `tokens`.
        """
        sources = mixture.row_sources(phase, 0, tokens // phase.seq_len)
        for source, num_rows in Counter(sources).items():
            needed_tokens, available_tokens = num_rows * phase.seq_len, 0
            if source in self._validation_readers:
                available_tokens = self._validation_readers[source].stream.epoch_tokens
            if needed_tokens > available_tokens:
                raise UserError(
                    f"evaluate.tokens: {tokens} takes {needed_tokens} held-out tokens of "
                    f"{self._data.sources[source]}, which has "
                    f"{available_tokens}; lower it, or prepare the corpus with a larger --held-out"
                )
        rows, cursor = [], dict.fromkeys(sources, 0)
        num_rows_left = {
            source: self._validation_readers[source].stream.kept_epoch_tokens // phase.seq_len for source in cursor
        }
        for source in sources:
            if not num_rows_left[source]:
                continue
            num_rows_left[source] -= 1
            rows.append((source, cursor[source]))
            cursor[source] = self._validation_readers[source].advance(cursor[source], phase.seq_len)
        return self._read_validation_batches(rows[self._dp_rank :: self._dp_size], phase)

    def _build_reader(
        self,
        name: str,
        corpus: manifest.CorpusManifest,
        split: manifest.CorpusSplit,
        seed: int | None,
        cache: ShardCache,
    ) -> SourceReader:
        order = BlockShuffle(
            split.tokens,
            shuffle_block_tokens=self._data.shuffle_block_tokens,
            shuffle_window_tokens=self._data.shuffle_window_tokens,
            source=name,
            seed=seed,
        )
        return SourceReader(
            TokenStream(self._data.sources[name], corpus, split, source=name, seed=seed, cache=cache), order
        )

    def _read_validation_batches(self, rows: list[tuple[str, int]], phase: config.PhaseConfig) -> Iterator[Batch]:
        for first in range(0, len(rows), phase.micro_batch_size):
            chunk = rows[first : first + phase.micro_batch_size]
            spans = [RowRun(source, position, np.array([row])) for row, (source, position) in enumerate(chunk)]
            yield build_batch(
                self._validation_readers, BatchPlan(spans, len(chunk), phase.seq_len, {}, None), self._eos_id
            )

    def _batch_plans(self, step: int, cursor: dict[str, int]) -> Iterator[BatchPlan]:
        end = self.find_end(step, cursor)[0]
        for phase_span in Timeline(self._schedule).phase_spans:
            for step_index in range(max(step, phase_span.first_step), min(end, phase_span.end_step)):
                yield (plan := self._plan_batch(phase_span.phase, step_index - phase_span.first_step, cursor))
                cursor = plan.cursor

    def _plan_batch(self, phase: config.PhaseConfig, step: int, cursor: dict[str, int]) -> BatchPlan:
        """Where this rank's rows of the phase's step number `step` lie."""
        assert phase.global_batch_size % self._dp_size == 0, "checked by config.check_world_size"
        num_rows, seq_len = phase.global_batch_size // self._dp_size, phase.seq_len
        first_row_index = self._dp_rank * num_rows
        row_runs, next_cursor = [], dict(cursor)
        for name, num_rows_taken, num_rows_before, row_indices in mixture.rows_by_source(
            phase, step, first_row_index, first_row_index + num_rows
        ):
            source, position = self._train_readers[name], cursor.get(name, 0)
            if len(row_indices):
                row_runs.append(RowRun(name, source.advance(position, num_rows_before * seq_len), row_indices))
            next_cursor[name] = source.advance(position, num_rows_taken * seq_len)
        return BatchPlan(row_runs, num_rows, seq_len, next_cursor, first_row_index)

    def _prefetch_batches(self, plans: Iterator[BatchPlan]) -> Generator[Batch, None, None]:
        """The batches in their order, at most `prefetch_steps` of them read ahead, by threads that end with this."""
        pool = ThreadPoolExecutor(self._data.num_workers, thread_name_prefix="data")
        pending: deque[Future[Batch]] = deque()
        waits_for_threads = True

        def submit(count: int) -> None:
            for cut in islice(plans, count):
                for span in cut.row_runs:
                    self._train_readers[span.source].prefetch(span.position)
                pending.append(pool.submit(build_batch, self._train_readers, cut, self._eos_id))

        try:
            submit(self._data.prefetch_steps)
            while pending:
                next_batch = pending.popleft().result()
                submit(1)
                yield next_batch
        except StopRequested:
            waits_for_threads = False  # a fetch from a store that does not answer takes minutes
            raise
        finally:
            pool.shutdown(waits_for_threads, cancel_futures=True)

    def _scheduled_tokens(self, step: int, source: str) -> int:
        return mixture.cursor_at(self._schedule, step).get(source, 0)

    def _max_epochs_message(self, source: str, total_steps: int, position: int) -> str:
        """Says that `total_steps` steps take more of the source than the run, which stands at `position`, may read."""
        epochs, max_tokens, reader = (
            self._data.max_epochs[source],
            self._max_tokens_by_source[source],
            self._train_readers[source],
        )
        damaged_tokens = reader.skipped_tokens_before(max_tokens) - reader.skipped_tokens_before(position)
        return (
            f"data.max_epochs.{source}: the schedule takes {self._scheduled_tokens(total_steps, source)} "
            f"tokens; {epochs:g} times the "
            f"{self.manifests[source].train.tokens} of {self._data.sources[source]} are {max_tokens}"
            f"{f', {damaged_tokens} of those ahead in damaged shards' if damaged_tokens else ''}; raise it, "
            f"lower the source's share or the "
            "phases' tokens, or set data.at_end to stop"
        )


def _check_shard_files(folder: str, corpus: manifest.CorpusManifest) -> None:
    try:
        manifest.check_shard_files(folder, corpus)
    except DamagedShard as error:
        raise DamagedShard(error.file, f"{error}; or go on without it: data.damaged_shards skip") from None


def _check_vocab(source: str, corpus: manifest.CorpusManifest, vocab_size: int) -> None:
    key_path = f"data.sources.{source}"
    if corpus.vocab > vocab_size:
        raise UserError(
            f"model.vocab_size: {vocab_size}; the tokenizer of {key_path} has {corpus.vocab} ids; set it to at least that"
        )
    if not 0 <= corpus.eos_id < corpus.vocab:
        raise UserError(
            f"{key_path}: EOS {corpus.eos_token!r} has id {corpus.eos_id}, "
            f"outside the tokenizer's {corpus.vocab} ids; "
            "prepare the corpus with an --eos the tokenizer has"
        )
    if not corpus.train.tokens:
        raise UserError(f"{key_path}: has no training tokens; prepare it with a smaller --held-out or more text")


def _check_distinct_corpora(fingerprints: dict[str, str]) -> None:
    first: dict[str, str] = {}
    for name, fingerprint in fingerprints.items():
        if (other := first.setdefault(fingerprint, name)) != name:
            raise UserError(
                f"data.sources.{name}: is the same corpus as {other}; its tokens would be read and counted under two names; "
                f"leave {name} out and give {other} both shares"
            )


def _check_same_tokenizer(corpora: dict[str, manifest.CorpusManifest]) -> None:
    names = list(corpora)
    for name in names[1:]:
        one, other = corpora[names[0]], corpora[name]
        if (one.tokenizer_sha256, one.eos_id) != (other.tokenizer_sha256, other.eos_id):
            raise UserError(
                f"data.sources.{name}: prepared with tokenizer {other.tokenizer_sha256[:12]}, "
                f"EOS {other.eos_token!r}; "
                f"{names[0]} has {one.tokenizer_sha256[:12]}, {one.eos_token!r}; "
                "sources of a run share one tokenizer; prepare one of them again"
            )
