"""What a run reads: the sources of the config opened and checked, their rows of every global step for one
data-parallel rank.

The one idea: the rows of step n are a pure function of manifests, seed, phases and n, and a rank takes its
slice of them, so any data-parallel size that divides the rows sees the same rows. The cursor travels in the
batch it belongs to: how far the background thread has read ahead is nobody's business, and a resume at the
cursor of the last finished step is exact.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import Full, Queue

from trainer import config
from trainer.config import UserError
from trainer.data import manifest, mixture
from trainer.data.order import Order
from trainer.data.rows import Batch, Block, Place, Source, batch, cut, places
from trainer.data.stream import Stream
from trainer.timeline import Timeline

__all__ = ["Batch", "Loader"]

Cut = tuple[Block, dict[str, int]]
"""A rank's rows of one step as they come from `rows.cut`, and the cursor after the step."""

POLL_SECONDS = 0.1
"""How soon a thread that waits for room in the queue notices that nobody reads any more."""


class Loader:
    """Opens every source of `data`.

    Raises: UserError for a corpus that is incomplete, was prepared with another tokenizer, or does not fit
    `vocab`.
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
        self._manifests = {source: manifest.load(folder) for source, folder in data.sources.items()}
        for source, corpus in self._manifests.items():
            manifest.check_files(data.sources[source], corpus)
            _check_vocab(source, corpus, vocab)
            if data.tokenizer is not None:
                manifest.check_tokenizer(data.tokenizer, corpus, "data.tokenizer")
        _check_one_tokenizer(self._manifests)
        self.fingerprints: dict[str, str] = {name: corpus.fingerprint for name, corpus in self._manifests.items()}
        """Hash of each source's manifest: what a resume must match, see `manifest.check_resume`."""
        self._eos_id = next(iter(self._manifests.values())).eos_id if self._manifests else -1
        self.order: dict[str, int] = {
            "run.seed": seed, "data.block_tokens": data.block_tokens, "data.window_tokens": data.window_tokens,
        }  # fmt: skip
        """What besides the corpora fixes which token comes when: for the life of a run."""
        self._train, self._held_out = {}, {}
        for source, corpus in self._manifests.items():
            self._train[source] = self._source(source, corpus, corpus.train, seed)
            if corpus.validation.tokens:
                self._held_out[source] = self._source(source, corpus, corpus.validation, None)

    def batches(self, step: int, cursor: dict[str, int] | None) -> Iterator[Batch]:
        """This rank's batches of global steps `step`, `step` + 1, ... to the end of the schedule.

        `cursor` is that of the batch before `step`; None takes the one the schedule implies (nothing read at
        step 0).
        Raises: UserError, when a batch is asked for, naming a shard that is damaged.
        """
        start = mixture.cursor_at(self._schedule, step) if cursor is None else dict(cursor)
        blocks = self._blocks(step, start)
        if self._data.prefetch_steps:
            blocks = _ahead(blocks, self._data.prefetch_steps)
        try:
            for block, after in blocks:
                yield batch(block, self._eos_id, after)
        finally:
            blocks.close()

    def validation(self, phase: config.Phase, tokens: int) -> Iterator[Batch]:
        """This rank's held-out rows in chunks of at most phase.micro_rows: row r of all goes to rank r %
        dp_size.

        The rows are the same at every call; their sources follow the phase's mixture. A batch's cursor is
        empty.
        Raises: UserError, at the call, where a source holds fewer held-out tokens than its share of `tokens`.
        """
        num_rows = tokens // phase.seq_len
        rows, taken = places(mixture.row_sources(phase, 0, num_rows), {}, phase.seq_len)
        for source, needed in taken.items():
            held_out = self._manifests[source].validation.tokens
            if needed > held_out:
                raise UserError(
                    f"evaluate.tokens: {tokens} takes {needed} held-out tokens of "
                    f"{self._data.sources[source]}, which has "
                    f"{held_out}; lower it, or prepare the corpus with a larger --held-out"
                )
        return self._validation(rows[self._dp_rank :: self._dp_size], phase)

    def _source(self, name: str, corpus: manifest.Manifest, split: manifest.Split, seed: int | None) -> Source:
        order = Order(
            split.tokens,
            block_tokens=self._data.block_tokens,
            window_tokens=self._data.window_tokens,
            name=name,
            seed=seed,
        )
        return Source(Stream(self._data.sources[name], corpus, split, name=name, seed=seed), order)

    def _validation(self, rows: list[Place], phase: config.Phase) -> Iterator[Batch]:
        for first in range(0, len(rows), phase.micro_rows):
            block = cut(self._held_out, rows[first : first + phase.micro_rows], phase.seq_len)
            yield batch(block, self._eos_id, {})

    def _blocks(self, step: int, cursor: dict[str, int]) -> Generator[Cut, None, None]:
        timeline = Timeline(self._schedule)
        for now in range(step, timeline.total_steps):
            span = timeline.phase_at(now)
            phase = span.phase
            assert phase.rows % self._dp_size == 0, "checked by config.check_world"
            local = phase.rows // self._dp_size
            rows, cursor = places(
                mixture.row_sources(phase, (now - span.first_step) * phase.rows, phase.rows),
                cursor,
                phase.seq_len,
            )
            mine = rows[self._dp_rank * local : (self._dp_rank + 1) * local]
            yield cut(self._train, mine, phase.seq_len), cursor


def _ahead(items: Generator[Cut, None, None], depth: int) -> Generator[Cut, None, None]:
    """The same items, read up to `depth` ahead in a thread that ends with this; its errors come out here."""
    queue: Queue[Cut | BaseException | None] = Queue(maxsize=depth)
    closed = threading.Event()

    def put(entry: Cut | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                queue.put(entry, timeout=POLL_SECONDS)
                return True
            except Full:
                continue
        return False

    def read() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(None)
        except BaseException as error:  # handed over whole: the reader of the queue raises it
            put(error)

    thread = threading.Thread(target=read, name="data-prefetch", daemon=True)
    thread.start()
    try:
        while (entry := queue.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry
    finally:
        closed.set()
        thread.join()


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
