"""The corpora of a run, as far as manifests and sizes of files tell: whether they fit the config, and when they are used up.

`tandem train` makes these checks before it imports torch, and the loader makes them again when it opens the corpora. Torch is
not imported here.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from tandem.trainer.config import DataConfig, PhaseConfig, ScheduleConfig, UserError
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data import manifest, mixture, remote_files
from tandem.trainer.data.manifest import CorpusManifest, DamagedShard
from tandem.trainer.data.tokenizer_file import find_difference, parse_tokenizer

Corpora = Mapping[str, CorpusManifest]
"""The manifest of each source. Sources that are missing here are not checked."""


def load_corpora(data: DataConfig, vocab_size: int) -> dict[str, CorpusManifest]:
    """Load the manifest of every source, and check it.

    Raises: UserError if a corpus is incomplete, was prepared with another tokenizer, or does not fit `vocab_size`.
    """
    corpora = {source: manifest.load_manifest(folder, data.cache) for source, folder in data.sources.items()}
    for source, corpus in corpora.items():
        try:
            if data.damaged_shards == "stop":
                manifest.check_shard_files(data.sources[source], corpus)
        except DamagedShard as error:
            message = f"{error}, or set data.damaged_shards=skip to train without this shard"
            raise DamagedShard(error.file, message) from None
        _check_vocab(source, corpus, vocab_size)
        if data.tokenizer is not None:
            manifest.check_tokenizer(data.tokenizer, corpus, "data.tokenizer", corpus_folder=data.sources[source])
    _check_same_tokenizer(data.sources, corpora)
    _check_distinct_corpora({source: corpus.fingerprint for source, corpus in corpora.items()})
    return corpora


def check_tokenizer_file(data: DataConfig, corpora: Corpora) -> None:
    """Raises: UserError if the first source's tokenizer.json, which the run copies, is not the one in its manifest."""
    source, folder = next(iter(data.sources.items()), ("", ""))
    if source in corpora:
        with suppress(OSError):  # the run trains without the file
            manifest.read_corpus_tokenizer(folder, corpora[source], data.cache)


def without_remote_addresses(data: DataConfig) -> DataConfig:
    """Return the part of the section that can be checked without a network."""
    local = {source: folder for source, folder in data.sources.items() if not remote_files.is_remote(folder)}
    has_remote_tokenizer = data.tokenizer is not None and remote_files.is_remote(data.tokenizer)
    return replace(data, sources=local, tokenizer=None if has_remote_tokenizer else data.tokenizer)


def shuffle_settings(data: DataConfig, seed: int) -> dict[str, int]:
    """Return what determines the order of all tokens, together with the corpora. It must not change during a run."""
    return {
        "run.seed": seed,
        "data.shuffle_block_tokens": data.shuffle_block_tokens,
        "data.shuffle_window_tokens": data.shuffle_window_tokens,
    }


def find_max_tokens(data: DataConfig, corpora: Corpora) -> dict[str, int]:
    """Return how many tokens `data.max_epochs` allows of each source that it limits."""
    return {
        source: int(epochs * corpora[source].train.tokens)
        for source, epochs in data.max_epochs.items()
        if source in corpora
    }


def find_data_end(
    data: DataConfig, schedule: ScheduleConfig, corpora: Corpora, step: int = 0, cursor: Mapping[str, int] | None = None,
    damaged_tokens: Mapping[str, int] = {},
) -> tuple[int, str | None]:  # fmt: skip
    """Return the step at which the data ends, and the source that is exhausted there (None if the schedule ends first).

    The run continues at `step` with this cursor; None means the one that follows from the schedule. `damaged_tokens` are those
    of each source that are unread, and will be skipped. A source is exhausted after the number of epochs in `data.max_epochs`.
    Raises: UserError if a source is exhausted before the schedule ends and `data.at_end` is `refuse`.
    """
    total_steps, scheduled_cursor = Timeline(schedule).total_steps, mixture.cursor_at(schedule, step)
    cursor = scheduled_cursor if cursor is None else cursor
    ends, max_tokens = [(total_steps, "")], find_max_tokens(data, corpora)
    for source in max_tokens:
        unread_tokens = max_tokens[source] - cursor.get(source, 0) - damaged_tokens.get(source, 0)

        def scheduled_tokens(at_step: int, source: str = source) -> int:
            return mixture.cursor_at(schedule, at_step).get(source, 0)

        tokens = unread_tokens + scheduled_cursor.get(source, 0)
        num_feedable_steps = bisect_right(range(step, total_steps + 1), tokens, key=scheduled_tokens)
        ends.append((max(step, step + num_feedable_steps - 1), source))
    last_step, source = min(ends)
    if source and data.at_end == "refuse":
        damaged = damaged_tokens.get(source, 0)
        damage = f", of which {damaged} unread tokens are in damaged shards" if damaged else ""
        raise UserError(
            f"data.max_epochs.{source}: the schedule reads {mixture.cursor_at(schedule, total_steps).get(source, 0)} tokens, "
            f"but {data.max_epochs[source]:g} epochs of the {corpora[source].train.tokens} tokens in {data.sources[source]} "
            f"are only {max_tokens[source]}{damage}; raise max_epochs, lower the source's share or the phases' tokens, or set "
            "data.at_end=stop to end the run when the source is used up"
        )
    return last_step, source or None


def check_held_out_tokens(data: DataConfig, corpora: Corpora, phase: PhaseConfig, tokens: int) -> None:
    """Raises: UserError if a source has fewer held-out tokens than its share of `tokens`."""
    for source, num_rows in Counter(mixture.row_sources(phase, 0, tokens // phase.seq_len)).items():
        needed_tokens = num_rows * phase.seq_len
        if source in corpora and needed_tokens > (available_tokens := corpora[source].validation.tokens):
            raise UserError(
                f"evaluate.tokens: {tokens} needs {needed_tokens} held-out tokens of {data.sources[source]}, which has only "
                f"{available_tokens}; lower evaluate.tokens, or prepare the corpus with a larger --held-out"
            )


def _check_vocab(source: str, corpus: CorpusManifest, vocab_size: int) -> None:
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


def _check_same_tokenizer(folders: dict[str, str], corpora: dict[str, CorpusManifest]) -> None:
    first_name = next(iter(corpora), "")
    for name, other in corpora.items():
        first = corpora[first_name]
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
