"""`tandem verify`: read a prepared corpus again and check every byte against its manifest.

It checks everything that a reader relies on: hashes, sizes, the position of each sample in its tar, that every token is in
the vocabulary, the number of documents, and the frequencies of tokens. Each shard is read once. The check continues after a
bad shard, so one run finds all bad shards.
"""

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

from tandem.data_prep import executor, output_folder, provenance, shuffle
from tandem.data_prep.executor import ProgressCallback
from tandem.data_prep.vocabulary import Vocabulary
from tandem.trainer.config import UserError
from tandem.trainer.config.numbers import format_bytes
from tandem.trainer.config.outside import safe_print
from tandem.trainer.data import manifest, remote_files
from tandem.trainer.data.manifest import CorpusManifest, Shard
from tandem.trainer.metrics import progress
from tandem.trainer.runtime.processors import usable_processors

SINGLE_PROCESS_BYTES = 1 << 26
"""Up to this size, reading a corpus takes less time than starting processes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `tandem verify`."""
    add = parser.add_argument
    add(
        "corpus",
        type=os.path.expanduser,
        metavar="DIR",
        help="folder written by tandem prepare, or its address: s3://, gs://, https://",
    )
    cores = usable_processors()
    add("--workers", type=int, default=cores, metavar="N",
        help="number of processes, each with one shard in memory (default: one per core)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Check that the corpus matches its manifest.

    Raises: UserError that names every shard that does not match.
    Note: extra files are not searched for at a remote address.
    """
    if args.workers < 1:
        raise UserError(f"--workers: {args.workers} is too small; use 1 or more")
    start_time = time.monotonic()
    corpus_manifest = manifest.load_manifest(args.corpus)
    _check_manifest(args.corpus, corpus_manifest)
    _check_tokenizer(args.corpus, corpus_manifest)
    _check_inputs(args.corpus, corpus_manifest)
    stated, decimals = corpus_manifest.unigram_entropy_nats, shuffle.ENTROPY_DECIMALS
    found = shuffle.entropy_nats(_count_training_tokens(args.corpus, corpus_manifest, args.workers))
    if abs(found - stated) > 2 * 10**-decimals:
        raise UserError(
            f"{remote_files.join_address(args.corpus, manifest.MANIFEST_FILE)}: unigram_entropy_nats is {stated}, "
            f"but the training tokens have {found:.{decimals}f}; prepare the corpus again"
        )
    if not remote_files.is_remote(args.corpus):
        _check_no_extra_files(Path(args.corpus), corpus_manifest)
    shards, seconds = corpus_manifest.shards, time.monotonic() - start_time
    read_bytes = sum(shard.bytes for shard in shards)
    safe_print(
        f"{args.corpus}: {corpus_manifest.counts['tokens']:,} tokens in {len(shards):,} shards match the manifest; "
        f"{format_bytes(read_bytes)} in {seconds:.1f} s, {format_bytes(read_bytes / seconds)}/s"
    )


def _check_manifest(address: str, corpus_manifest: CorpusManifest) -> None:
    path = remote_files.join_address(address, manifest.MANIFEST_FILE)
    if remote_files.read_bytes(path) != manifest.dump_manifest(corpus_manifest).encode():
        raise UserError(f"{path}: was changed or damaged after it was written; prepare the corpus again")
    splits = (corpus_manifest.train, corpus_manifest.validation)
    for count_name in ("tokens", "documents"):
        total = sum(getattr(split, count_name) for split in splits)
        for name, split in zip(("train", "validation"), splits, strict=True):
            found = sum(getattr(shard, count_name) for shard in split.shards)
            _check_sum(path, f"{name}.{count_name}", getattr(split, count_name), found)
        _check_sum(path, f"counts.{count_name}", corpus_manifest.counts.get(count_name), total)
        if corpus_manifest.groups:
            of_groups = sum(group[count_name] for group in corpus_manifest.groups.values())
            _check_sum(path, f"the sum of {count_name} in groups", of_groups, total)


def _check_sum(path: str, label: str, stated: int | None, expected: int) -> None:
    if stated != expected:
        raise UserError(f"{path}: {label} is {stated}, but the shards add up to {expected}; prepare the corpus again")


def _check_tokenizer(address: str, corpus_manifest: CorpusManifest) -> None:
    path = remote_files.join_address(address, manifest.TOKENIZER_FILE)
    content = _read_or_raise(path, partial(remote_files.read_bytes, path))
    _check_hash(path, content, corpus_manifest.tokenizer_sha256)
    vocabulary = Vocabulary(content.decode(), corpus_manifest.eos_token, path)
    found = (vocabulary.eos_id, vocabulary.vocab_size, manifest.token_dtype(vocabulary.vocab_size))
    stated = (corpus_manifest.eos_id, corpus_manifest.vocab, corpus_manifest.dtype)
    if found != stated:
        raise UserError(
            f"{path}: EOS id, vocab and dtype are {found}, but {manifest.MANIFEST_FILE} states {stated}; "
            "prepare the corpus again"
        )


def _check_inputs(address: str, corpus_manifest: CorpusManifest) -> None:
    path = remote_files.join_address(address, output_folder.INPUTS_FILE)
    for name, found in provenance.summarize(provenance.load(path)).items():
        if corpus_manifest.settings.get(name) != found:
            raise UserError(
                f"{path}: {name} is {found}, but {manifest.MANIFEST_FILE} states {corpus_manifest.settings.get(name)}; "
                "restore the file or prepare the corpus again"
            )


def _check_no_extra_files(path: Path, corpus_manifest: CorpusManifest) -> None:
    for found in sorted(path.iterdir()):
        if found.name not in output_folder.corpus_file_names(corpus_manifest):
            raise UserError(f"{found}: is not in {manifest.MANIFEST_FILE}; remove it")


def _count_training_tokens(address: str, corpus_manifest: CorpusManifest, workers: int) -> np.ndarray:
    """Check every shard and count each id in the training tokens.  Raises: UserError that names every bad shard."""
    shards, training = corpus_manifest.shards, {shard.file for shard in corpus_manifest.train.shards}
    token_counts = np.zeros(corpus_manifest.vocab, np.int64)
    errors: dict[str, str] = {}

    def collect_result(result: tuple[str, np.ndarray | UserError]) -> None:
        file, found = result
        if isinstance(found, UserError):
            errors[file] = str(found)
        elif file in training:
            np.add(token_counts, found, out=token_counts)

    total_bytes = sum(shard.bytes for shard in shards)
    workers = workers if total_bytes > SINGLE_PROCESS_BYTES else 1
    with progress.progress_bar("verifying", total_bytes, "bytes") as advance:
        make_check_shard = partial(partial, _try_check_shard, address, corpus_manifest)
        executor.run(make_check_shard, shards, workers, advance, collect_result)
    if errors:
        first = min(errors)
        others = f" (and {len(errors) - 1} more: {', '.join(sorted(errors)[1:])})" if len(errors) > 1 else ""
        raise UserError(f"{errors[first]}{others}")
    return token_counts


def _try_check_shard(
    address: str, corpus_manifest: CorpusManifest, shard: Shard, advance: ProgressCallback
) -> tuple[str, np.ndarray | UserError]:
    try:
        return shard.file, _check_shard(remote_files.join_address(address, shard.file), corpus_manifest, shard)
    except UserError as error:
        return shard.file, error
    finally:
        advance(shard.bytes)


def _check_shard(path: str, corpus_manifest: CorpusManifest, shard: Shard) -> np.ndarray:
    """Count each id in the shard.  Raises: UserError if the shard does not match the manifest."""
    content = _read_shard(path, shard)
    tokens = np.concatenate([*_tar_samples(path, content, corpus_manifest, shard), np.empty(0, corpus_manifest.dtype)])
    if len(tokens) and tokens.max() >= corpus_manifest.vocab:
        raise UserError(
            f"{path}: contains id {tokens.max()}, but vocab is {corpus_manifest.vocab}; prepare the corpus again"
        )
    token_counts = shuffle.count_tokens(tokens, corpus_manifest.vocab)
    found = (len(tokens), int(token_counts[corpus_manifest.eos_id]))
    if found != (shard.tokens, shard.documents):
        raise UserError(
            f"{path}: contains {found[0]} tokens in {found[1]} documents, but {manifest.MANIFEST_FILE} states {shard.tokens} "
            f"tokens in {shard.documents} documents; prepare the corpus again"
        )
    if len(tokens) and tokens[-1] != corpus_manifest.eos_id:
        raise UserError(
            f"{path}: ends inside a document; a shard must contain whole documents; prepare the corpus again"
        )
    return token_counts


def _read_shard(path: str, shard: Shard) -> bytes:
    """Read the shard and check its size and hashes."""

    def read() -> bytes:
        with remote_files.open_file(path) as file:
            return file.read(shard.bytes + 1)

    content = _read_or_raise(path, read)
    if len(content) != shard.bytes:
        size = f"has {len(content)} bytes" if len(content) < shard.bytes else f"has {len(content)} bytes or more"
        raise UserError(
            f"{path}: {size}, but {manifest.MANIFEST_FILE} states {shard.bytes}; "
            "restore the file or prepare the corpus again"
        )
    _check_hash(path, content, shard.sha256)
    if xxh3_128_hexdigest(content) != shard.xxh3_128:
        raise UserError(
            f"{path}: sha256 matches {manifest.MANIFEST_FILE}, but xxh3_128 does not; prepare the corpus again"
        )
    return content


def _read_or_raise(path: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({manifest.one_line(error)}); restore the file or prepare the corpus again"
        ) from None


def _check_hash(path: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UserError(
            f"{path}: sha256 is {found[:12]}, but {manifest.MANIFEST_FILE} states {expected[:12]}; the file is damaged; "
            "restore it"
        )


def _tar_samples(path: str, content: bytes, corpus_manifest: CorpusManifest, shard: Shard) -> Iterator[np.ndarray]:
    """Yield the tokens of each sample in the tar."""
    stem, extension = shard.file.removesuffix(".tar"), f"u{8 * corpus_manifest.token_bytes}"
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for sample_index, member in enumerate(tar):
                first = sample_index * corpus_manifest.sample_tokens
                expected = (
                    f"{stem}-{sample_index:06d}.{extension}", tarfile.REGTYPE, corpus_manifest.sample_offset(sample_index),
                    min(corpus_manifest.sample_tokens, shard.tokens - first) * corpus_manifest.token_bytes,
                )  # fmt: skip
                found = (member.name, member.type, member.offset_data, member.size)
                if found != expected:
                    raise UserError(
                        f"{path}: sample {sample_index} has name, type, offset and size {found}, but must have {expected}; "
                        "prepare the corpus again"
                    )
                count = member.size // corpus_manifest.token_bytes
                yield np.frombuffer(
                    content, np.dtype(corpus_manifest.dtype).newbyteorder("<"), count, member.offset_data
                )
    except tarfile.TarError as error:
        raise UserError(f"{path}: is not a tar ({manifest.one_line(error)}); prepare the corpus again") from None
