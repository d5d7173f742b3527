"""`tandem verify`: a prepared corpus read again, byte by byte, against its manifest.

Every claim of the manifest that a reader relies on is checked from the bytes: hashes, sizes, where each
sample lies in its tar according to the tar itself, tokens within the vocabulary, documents counted by their
EOS.
"""

from __future__ import annotations

import argparse
import tarfile
from pathlib import Path

import numpy as np

from data_prep.tokenizer import encoder
from trainer.config import UserError
from trainer.data import manifest
from trainer.data.manifest import Manifest, Shard, Split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tandem verify`."""
    parser.add_argument("folder", metavar="DIR", help="folder written by tandem prepare")


def run(args: argparse.Namespace) -> None:
    """The corpus is what its manifest says.  Raises: UserError naming the first file that is not."""
    folder = Path(args.folder)
    corpus = manifest.load(folder)
    manifest.check_files(folder, corpus)
    manifest.check_tokenizer(folder / manifest.TOKENIZER_FILE, corpus, str(folder))
    _check_tokenizer_ids(folder, corpus)
    _check_no_stranger(folder, corpus)
    for split in (corpus.train, corpus.validation):
        _check_split(folder, corpus, split)
    shards = len(corpus.train.shards) + len(corpus.validation.shards)
    print(f"{folder}: {corpus.counts['tokens']:,} tokens in {shards:,} shards are what the manifest says")


def _check_split(folder: Path, corpus: Manifest, split: Split) -> None:
    for shard in split.shards:
        manifest.check_hash(folder, shard)
        _check_shard(folder / shard.file, corpus, shard)
    total = (sum(shard.tokens for shard in split.shards), sum(shard.documents for shard in split.shards))
    if total != (split.tokens, split.documents):
        raise UserError(
            f"{folder}: shards hold {total} tokens and documents; {manifest.FILE} says otherwise; prepare again"
        )


def _check_shard(path: Path, corpus: Manifest, shard: Shard) -> None:
    dtype = np.dtype(corpus.dtype).newbyteorder("<")
    samples = []
    with tarfile.open(path) as tar:
        for number, member in enumerate(tar):
            if member.offset_data != corpus.sample_offset(number):
                raise UserError(f"{path}: sample {number} lies at byte {member.offset_data}; prepare the corpus again")
            data = tar.extractfile(member)
            assert data is not None, "a sample is a regular file"
            samples.append(np.frombuffer(data.read(), dtype))
    tokens = np.concatenate(samples)
    found = (len(tokens), int((tokens == corpus.eos_id).sum()))
    if found != (shard.tokens, shard.documents):
        raise UserError(
            f"{path}: holds {found} tokens and documents; {manifest.FILE} says otherwise; prepare the corpus again"
        )
    if tokens[-1] != corpus.eos_id or tokens.max() >= corpus.vocab:
        raise UserError(
            f"{path}: ends inside a document or holds an id beyond {corpus.vocab - 1}; prepare the corpus again"
        )


def _check_tokenizer_ids(folder: Path, corpus: Manifest) -> None:
    path = folder / manifest.TOKENIZER_FILE
    made = encoder(path.read_text(encoding="utf-8"), corpus.eos_token, 0, str(path))
    if (made.eos_id, made.vocab) != (corpus.eos_id, corpus.vocab):
        raise UserError(f"{path}: EOS id and vocab are {made.eos_id}, {made.vocab}; {manifest.FILE} says otherwise")


def _check_no_stranger(folder: Path, corpus: Manifest) -> None:
    listed = {shard.file for shard in (*corpus.train.shards, *corpus.validation.shards)}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed:
            raise UserError(f"{path}: is not in {manifest.FILE}; remove it")
