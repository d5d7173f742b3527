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
from tandem.trainer.data.manifest import DamagedShard
from tandem.trainer.data.rows import Batch, Cut, Evidence, Source, Span, batch, unpacked
from tandem.trainer.data.shard_cache import Cache
from tandem.trainer.data.shuffle import Order
from tandem.trainer.data.token_stream import Stream
from tandem.trainer.runtime import Stopped

__all__ = ["Batch", "Evidence", "Loader", "unpacked"]


class Loader:
    """Opens every source of `data`.

    Raises: UserError for a corpus that is incomplete, was prepared with another tokenizer, does not fit
    `vocab`, or, unless `data` says otherwise, may not be read as often as the schedule asks.
    """

    def __init__(
        self,
        data: config.Data,
        schedule: config.Schedule,
        *,
        seed: int,
        vocab: int,
        dp_rank: int,
        dp_size: int,
    ):
        self._data, self._schedule = data, schedule
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self.manifests: dict[str, manifest.Manifest] = {
            source: manifest.load(folder, data.cache) for source, folder in data.sources.items()
        }
        """Of every source of `data`."""
        for source, corpus in self.manifests.items():
            if data.damaged_shards == "stop":
                _check_files(data.sources[source], corpus)
            _check_vocab(source, corpus, vocab)
            if data.tokenizer is not None:
                manifest.check_tokenizer(data.tokenizer, corpus, "data.tokenizer")
        _check_one_tokenizer(self.manifests)
        self.fingerprints: dict[str, str] = {name: corpus.fingerprint for name, corpus in self.manifests.items()}
        """Hash of each source's manifest: what a resume must match, see `manifest.check_resume`."""
        _check_no_alias(self.fingerprints)
        one = next(iter(self.manifests.values()))
        self._eos_id = one.eos_id
        self.eos_token: str = one.eos_token
        """What ends a document, in every source."""
        self.order: dict[str, int] = {
            "run.seed": seed, "data.block_tokens": data.block_tokens, "data.window_tokens": data.window_tokens,
        }  # fmt: skip
        """What besides the corpora fixes which token comes when: for the life of a run."""
        self.skipped: dict[str, list[str]] = {}
        """Files of the shards of each source that are left out: what a resume must take up, see `skip`."""
        self._limits = {
            name: int(epochs * self.manifests[name].train.tokens) for name, epochs in data.max_epochs.items()
        }
        self._train, self._held_out, cache = {}, {}, Cache(data.cache)
        for source, corpus in self.manifests.items():
            self._train[source] = self._source(source, corpus, corpus.train, seed, cache)
            if corpus.validation.tokens:
                self._held_out[source] = self._source(source, corpus, corpus.validation, None, cache)
        self.end(0, None)  # refuses what the schedule asks too much of

    def batches(self, step: int, cursor: dict[str, int] | None) -> Generator[Batch, None, None]:
        """This rank's batches of global steps `step`, `step` + 1, ... to the last that can be fed, see `end`.

        `cursor` is that of the batch before `step`; None takes the one the schedule implies (nothing read at
        step 0).
        Raises: UserError, when a batch is asked for, naming a shard that is damaged.
        """
        start = mixture.cursor_at(self._schedule, step) if cursor is None else dict(cursor)
        cuts = self._cuts(step, start)
        if self._data.workers and self._data.prefetch_steps:
            return self._ahead(cuts)
        return (batch(self._train, cut, self._eos_id) for cut in cuts)

    def end(self, step: int, cursor: dict[str, int] | None) -> tuple[int, str | None]:
        """How many steps the run can make, given where it is, and the source that ends it before the schedule does, if any.

        A source is at its end where `data.max_epochs` says; a pure function, the same on every rank.
        Raises: UserError for such a source where `data.at_end` is refuse.
        """
        total = Timeline(self._schedule).total_steps
        before = mixture.cursor_at(self._schedule, step)
        ends = [(total, "")]
        for source, limit in self._limits.items():
            reader, position = self._train[source], (before if cursor is None else cursor).get(source, 0)
            tokens = limit - reader.left_out(limit) - (position - reader.left_out(position))
            tokens += before.get(source, 0)
            steps = range(step, total + 1)
            short = bisect_left(
                steps,
                True,
                key=lambda now, source=source, tokens=tokens: self._taken(now, source) > tokens,  # type: ignore[misc]
            )
            ends.append((max(step, step + short - 1), source))
        last, source = min(ends)
        if source and self._data.at_end == "refuse":
            position = (before if cursor is None else cursor).get(source, 0)
            raise UserError(self._too_much(source, total, position))
        return last, source or None

    def skip(self, source: str, file: str) -> None:
        """From now on the shard is left out: rows are cut from what remains of its source behind the cursor.

        Iterators made before must be closed. Raises: UserError where nothing remains.
        """
        files = self.skipped.setdefault(source, [])
        if file not in files:
            files.append(file)
        for sources in (self._train, self._held_out):
            if source in sources:
                sources[source].stream.leave_out(file)
        if source in self._train and not self._train[source].stream.kept_tokens:
            raise UserError(
                f"data.sources.{source}: every training shard is damaged, {file} is the last; nothing is left to read; "
                f"restore {self._data.sources[source]}"
            )

    def validation(self, phase: config.Phase, tokens: int) -> Iterator[Batch]:
        """This rank's held-out rows in chunks of at most phase.micro_rows: row r of all goes to rank r %
        dp_size.

        The rows are the same at every call; their sources follow the phase's mixture. A batch's cursor is
        empty. Where shards are left out they are the whole rows that remain, which may be none.
        Raises: UserError, at the call, where a source holds fewer held-out tokens than its share of `tokens`.
        """
        sources = mixture.row_sources(phase, 0, tokens // phase.seq_len)
        for source, num_rows in Counter(sources).items():
            needed, there = num_rows * phase.seq_len, 0
            if source in self._held_out:
                there = self._held_out[source].stream.tokens
            if needed > there:
                raise UserError(
                    f"evaluate.tokens: {tokens} takes {needed} held-out tokens of "
                    f"{self._data.sources[source]}, which has "
                    f"{there}; lower it, or prepare the corpus with a larger --held-out"
                )
        rows, cursor = [], dict.fromkeys(sources, 0)
        room = {source: self._held_out[source].stream.kept_tokens // phase.seq_len for source in cursor}
        for source in sources:
            if not room[source]:
                continue
            room[source] -= 1
            rows.append((source, cursor[source]))
            cursor[source] = self._held_out[source].after(cursor[source], phase.seq_len)
        return self._validation(rows[self._dp_rank :: self._dp_size], phase)

    def _source(
        self, name: str, corpus: manifest.Manifest, split: manifest.Split, seed: int | None, cache: Cache
    ) -> Source:
        order = Order(
            split.tokens,
            block_tokens=self._data.block_tokens,
            window_tokens=self._data.window_tokens,
            name=name,
            seed=seed,
        )
        return Source(Stream(self._data.sources[name], corpus, split, name=name, seed=seed, cache=cache), order)

    def _validation(self, rows: list[tuple[str, int]], phase: config.Phase) -> Iterator[Batch]:
        for first in range(0, len(rows), phase.micro_rows):
            chunk = rows[first : first + phase.micro_rows]
            spans = [Span(source, position, np.array([row])) for row, (source, position) in enumerate(chunk)]
            yield batch(self._held_out, Cut(spans, len(chunk), phase.seq_len, {}, None), self._eos_id)

    def _cuts(self, step: int, cursor: dict[str, int]) -> Iterator[Cut]:
        end = self.end(step, cursor)[0]
        for within in Timeline(self._schedule).spans:
            for now in range(max(step, within.first_step), min(end, within.end_step)):
                yield (cut := self._cut(within.phase, now - within.first_step, cursor))
                cursor = cut.cursor

    def _cut(self, phase: config.Phase, step: int, cursor: dict[str, int]) -> Cut:
        """Where this rank's rows of the phase's step number `step` lie."""
        assert phase.rows % self._dp_size == 0, "checked by config.check_world"
        rows, seq_len = phase.rows // self._dp_size, phase.seq_len
        first_row = self._dp_rank * rows
        spans, after = [], dict(cursor)
        for name, taken, before, mine in mixture.portions(phase, step, first_row, first_row + rows):
            source, position = self._train[name], cursor.get(name, 0)
            if len(mine):
                spans.append(Span(name, source.after(position, before * seq_len), mine))
            after[name] = source.after(position, taken * seq_len)
        return Cut(spans, rows, seq_len, after, first_row)

    def _ahead(self, cuts: Iterator[Cut]) -> Generator[Batch, None, None]:
        """The batches in their order, at most `prefetch_steps` of them read ahead, by threads that end with this."""
        pool = ThreadPoolExecutor(self._data.workers, thread_name_prefix="data")
        waiting: deque[Future[Batch]] = deque()
        wait = True

        def read(count: int) -> None:
            for cut in islice(cuts, count):
                for span in cut.spans:
                    self._train[span.source].soon(span.position)
                waiting.append(pool.submit(batch, self._train, cut, self._eos_id))

        try:
            read(self._data.prefetch_steps)
            while waiting:
                found = waiting.popleft().result()
                read(1)
                yield found
        except Stopped:
            wait = False  # a fetch from a store that does not answer takes minutes
            raise
        finally:
            pool.shutdown(wait, cancel_futures=True)

    def _taken(self, step: int, source: str) -> int:
        return mixture.cursor_at(self._schedule, step).get(source, 0)

    def _too_much(self, source: str, total: int, position: int) -> str:
        """Says that `total` steps take more of the source than the run, which stands at `position`, may read."""
        epochs, limit, reader = self._data.max_epochs[source], self._limits[source], self._train[source]
        lost = reader.left_out(limit) - reader.left_out(position)
        return (
            f"data.max_epochs.{source}: the schedule takes {self._taken(total, source)} tokens; {epochs:g} times the "
            f"{self.manifests[source].train.tokens} of {self._data.sources[source]} are {limit}"
            f"{f', {lost} of those ahead in damaged shards' if lost else ''}; raise it, lower the source's share or the "
            "phases' tokens, or set data.at_end to stop"
        )


def _check_files(folder: str, corpus: manifest.Manifest) -> None:
    try:
        manifest.check_files(folder, corpus)
    except DamagedShard as error:
        raise DamagedShard(error.file, f"{error}; or go on without it: data.damaged_shards skip") from None


def _check_vocab(source: str, corpus: manifest.Manifest, vocab: int) -> None:
    folder_field = f"data.sources.{source}"
    if corpus.vocab > vocab:
        raise UserError(
            f"model.vocab: {vocab}; the tokenizer of {folder_field} has {corpus.vocab} ids; set it to at least that"
        )
    if not 0 <= corpus.eos_id < corpus.vocab:
        raise UserError(
            f"{folder_field}: EOS {corpus.eos_token!r} has id {corpus.eos_id}, "
            f"outside the tokenizer's {corpus.vocab} ids; "
            "prepare the corpus with an --eos the tokenizer has"
        )
    if not corpus.train.tokens:
        raise UserError(f"{folder_field}: has no training tokens; prepare it with a smaller --held-out or more text")


def _check_no_alias(fingerprints: dict[str, str]) -> None:
    first: dict[str, str] = {}
    for name, fingerprint in fingerprints.items():
        if (other := first.setdefault(fingerprint, name)) != name:
            raise UserError(
                f"data.sources.{name}: is the same corpus as {other}; its tokens would be read and counted under two names; "
                f"leave {name} out and give {other} both shares"
            )


def _check_one_tokenizer(corpora: dict[str, manifest.Manifest]) -> None:
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
