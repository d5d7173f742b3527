"""`tandem verify`: a prepared corpus read again, byte by byte, against its manifest.

Every claim of the manifest that a reader relies on is checked from the bytes: hashes, sizes, where each sample lies in its
tar according to the tar itself, tokens within the vocabulary, documents counted by their EOS, how often each token occurs.
Each shard is read once. What is wrong with a shard does not keep the others from being read, so one run finds all of it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from xxhash import xxh3_128_hexdigest

from tandem.data_prep import executor, output_folder, provenance
from tandem.data_prep.executor import Advance
from tandem.data_prep.vocabulary import Vocabulary
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest, remote_files
from tandem.trainer.data.manifest import Manifest, Shard, Split
from tandem.trainer.metrics import progress

COUNT_TOKENS = 1 << 18
"""Ids counted at a time: numpy widens them to 64 bits for it."""
SMALL_BYTES = 1 << 26
"""A corpus up to this size is read sooner than processes start."""
ENTROPY_DECIMALS = 6
"""Of the entropy in the manifest."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tandem verify`."""
    add = parser.add_argument
    add("corpus", metavar="DIR", help="folder written by tandem prepare, or its address: s3://, gs://, https://")
    cores = len(os.sched_getaffinity(0))
    held = "processes, each holds a shard in memory (default: cores)"
    add("--workers", type=int, default=cores, metavar="N", help=held)


def run(args: argparse.Namespace) -> None:
    """The corpus is what its manifest says.

    Raises: UserError naming every file that is not.
    Note: what else lies at a remote address is not looked for.
    """
    if args.workers < 1:
        raise UserError(f"--workers: {args.workers}; must be positive; change it")
    began = time.monotonic()
    corpus = manifest.load(args.corpus)
    _check_manifest(args.corpus, corpus)
    _check_tokenizer(args.corpus, corpus)
    _check_inputs(args.corpus, corpus)
    entropy_nats = _entropy_nats(_occurrences(args.corpus, corpus, args.workers))
    if abs(entropy_nats - corpus.unigram_entropy_nats) > 2 * 10**-ENTROPY_DECIMALS:
        raise UserError(
            f"{remote_files.below(args.corpus, manifest.FILE)}: unigram_entropy_nats {corpus.unigram_entropy_nats}; "
            f"the training tokens have {entropy_nats:.{ENTROPY_DECIMALS}f}; prepare the corpus again"
        )
    if not remote_files.is_remote(args.corpus):
        _check_no_stranger(Path(args.corpus), corpus)
    shards, seconds = _shards(corpus), time.monotonic() - began
    read_bytes = sum(shard.bytes for shard in shards)
    print(
        f"{args.corpus}: {corpus.counts['tokens']:,} tokens in {len(shards):,} shards are what the manifest says; "
        f"{read_bytes / 1e6:,.1f} MB in {seconds:.1f} s, {read_bytes / 1e6 / seconds:,.1f} MB/s"
    )


def _shards(corpus: Manifest) -> list[Shard]:
    return [*corpus.train.shards, *corpus.validation.shards]


def _check_manifest(address: str, corpus: Manifest) -> None:
    path = remote_files.below(address, manifest.FILE)
    if remote_files.content(path) != manifest.dump(corpus).encode():
        raise UserError(f"{path}: is not written as it was; it was changed or damaged; prepare the corpus again")
    splits = (corpus.train, corpus.validation)
    for counted in ("tokens", "documents"):
        totals = {counted: sum(getattr(split, counted) for split in splits)}
        for name, split in zip(("train", "validation"), splits, strict=True):
            _check_sum(path, f"{counted} of {name}", getattr(split, counted), _sum(split, counted))
        _check_sum(path, f"counts.{counted}", corpus.counts.get(counted), totals[counted])
        if corpus.groups:
            of_groups = sum(group[counted] for group in corpus.groups.values())
            _check_sum(path, f"{counted} of all groups", of_groups, totals[counted])


def _sum(split: Split, counted: str) -> int:
    return sum(getattr(shard, counted) for shard in split.shards)


def _check_sum(path: str, what: str, said: int | None, found: int) -> None:
    if said != found:
        raise UserError(f"{path}: {what}: {said}; the shards add up to {found}; prepare the corpus again")


def _check_tokenizer(address: str, corpus: Manifest) -> None:
    path = remote_files.below(address, manifest.TOKENIZER_FILE)
    content = _read(path, partial(remote_files.content, path))
    _check_hash(path, content, corpus.tokenizer_sha256)
    vocabulary = Vocabulary(content.decode(), corpus.eos_token, path)
    found = (vocabulary.eos_id, vocabulary.size, manifest.dtype_of(vocabulary.size))
    if found != (corpus.eos_id, corpus.vocab, corpus.dtype):
        raise UserError(f"{path}: EOS id, vocab and type are {found}; {manifest.FILE} says otherwise; prepare again")


def _check_inputs(address: str, corpus: Manifest) -> None:
    path = remote_files.below(address, output_folder.INPUTS)
    for name, found in provenance.identity(provenance.load(path)).items():
        if corpus.settings.get(name) != found:
            raise UserError(
                f"{path}: {name} {found}; {manifest.FILE} says {corpus.settings.get(name)}; restore it or prepare again"
            )


def _check_no_stranger(path: Path, corpus: Manifest) -> None:
    for found in sorted(path.iterdir()):
        if found.name not in output_folder.manifest_files(corpus):
            raise UserError(f"{found}: is not in {manifest.FILE}; remove it")


def _occurrences(address: str, corpus: Manifest, workers: int) -> np.ndarray:
    """How often each id occurs in the training tokens.  Raises: UserError naming every shard that is not right."""
    shards, training = _shards(corpus), {shard.file for shard in corpus.train.shards}
    occurrences = np.zeros(corpus.vocab, np.int64)
    wrong: dict[str, str] = {}

    def take(result: tuple[str, np.ndarray | str]) -> None:
        file, found = result
        if isinstance(found, str):
            wrong[file] = found
        elif file in training:
            np.add(occurrences, found, out=occurrences)

    total_bytes = sum(shard.bytes for shard in shards)
    workers = workers if total_bytes > SMALL_BYTES else 1
    with progress.shown("verifying", total_bytes, "bytes") as advance:
        executor.run(partial(_checking, address, corpus), shards, workers, advance, take)
    if wrong:
        first = min(wrong)
        others = f" (and {len(wrong) - 1} more: {', '.join(sorted(wrong)[1:])})" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[first]}{others}")
    return occurrences


def _checking(address: str, corpus: Manifest) -> executor.Do:
    def check(shard: Shard, advance: Advance) -> tuple[str, np.ndarray | str]:
        try:
            return shard.file, _check_shard(remote_files.below(address, shard.file), corpus, shard)
        except UserError as error:
            return shard.file, str(error)
        finally:
            advance(shard.bytes)

    return check


def _check_shard(path: str, corpus: Manifest, shard: Shard) -> np.ndarray:
    """How often each id occurs in the shard, which is what the manifest says.  Raises: UserError where it is not."""
    content = _content(path, shard)
    tokens = np.concatenate([*_samples(path, content, corpus, shard), np.empty(0, corpus.dtype)])
    if len(tokens) and tokens.max() >= corpus.vocab:
        raise UserError(f"{path}: holds id {tokens.max()}; vocab is {corpus.vocab}; prepare the corpus again")
    occurrences = np.zeros(corpus.vocab, np.int64)
    for first in range(0, len(tokens), COUNT_TOKENS):
        occurrences += np.bincount(tokens[first : first + COUNT_TOKENS], minlength=corpus.vocab)
    found = (len(tokens), int(occurrences[corpus.eos_id]))
    if found != (shard.tokens, shard.documents):
        raise UserError(
            f"{path}: holds {found} tokens and documents; {manifest.FILE} says "
            f"{(shard.tokens, shard.documents)}; prepare the corpus again"
        )
    if len(tokens) and tokens[-1] != corpus.eos_id:
        raise UserError(f"{path}: ends inside a document; a shard holds whole ones; prepare the corpus again")
    return occurrences


def _content(path: str, shard: Shard) -> bytes:
    """The bytes of the shard, which have its hash."""

    def read() -> bytes:
        with remote_files.opened(path) as file:
            return file.read(shard.bytes + 1)

    content = _read(path, read)
    if len(content) != shard.bytes:
        size = f"has {len(content)} bytes" if len(content) < shard.bytes else f"has more than {shard.bytes} bytes"
        raise UserError(f"{path}: {size}; {manifest.FILE} says {shard.bytes}; restore it or prepare the corpus again")
    _check_hash(path, content, shard.sha256)
    if xxh3_128_hexdigest(content) != shard.xxh3_128:
        raise UserError(f"{path}: xxh3_128 is not what {manifest.FILE} says; sha256 is; prepare the corpus again")
    return content


def _read(path: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}); restore it or prepare the corpus again") from None


def _check_hash(path: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UserError(f"{path}: sha256 {found[:12]}; {manifest.FILE} says {expected[:12]}; it is damaged; restore it")


def _samples(path: str, content: bytes, corpus: Manifest, shard: Shard) -> Iterator[np.ndarray]:
    """The tokens of each sample, as the tar has them."""
    stem, extension = shard.file.removesuffix(".tar"), f"u{8 * corpus.token_bytes}"
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for number, member in enumerate(tar):
                first = number * corpus.sample_tokens
                expected = (
                    f"{stem}-{number:06d}.{extension}", tarfile.REGTYPE, corpus.sample_offset(number),
                    min(corpus.sample_tokens, shard.tokens - first) * corpus.token_bytes,
                )  # fmt: skip
                found = (member.name, member.type, member.offset_data, member.size)
                if found != expected:
                    raise UserError(f"{path}: sample {number} is {found}; must be {expected}; prepare the corpus again")
                count = member.size // corpus.token_bytes
                yield np.frombuffer(content, np.dtype(corpus.dtype).newbyteorder("<"), count, member.offset_data)
    except tarfile.TarError as error:
        raise UserError(f"{path}: is not a tar ({_reason(error)}); prepare the corpus again") from None


def _entropy_nats(occurrences: np.ndarray) -> float:
    shares = occurrences[occurrences > 0] / occurrences.sum()
    return float(-(shares * np.log(shares)).sum())


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
