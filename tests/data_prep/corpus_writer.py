"""Corpora of known documents, without `tandem prepare`: a small tokenizer, the real writer of shards, a manifest."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tandem.data_prep import provenance
from tandem.data_prep.shard_writer import write_shard
from tandem.trainer.data import manifest
from tandem.trainer.data.manifest import CorpusManifest, CorpusSplit, Shard

EOS = "<|endoftext|>"
SAMPLE_TOKENS = 512


@cache
def small_tokenizer() -> Tokenizer:
    """A byte-level BPE of a few merges."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["the row of a shard and the tokens of the row"] * 9, trainer)
    bpe.encode_special_tokens = True
    return bpe


def encode_document(text: str) -> np.ndarray:
    """The tokens of a document, EOS at its end; the characters of EOS in it are text."""
    return np.array([*small_tokenizer().encode(text).ids, small_tokenizer().token_to_id(EOS)], np.uint16)


def write_split(
    folder: Path, split: str, documents: Iterable[np.ndarray], *, sample_tokens: int, shard_tokens: int
) -> CorpusSplit:
    """Write documents in their order, in shards of at least `shard_tokens` except the last."""
    shards: list[Shard] = []
    pending: list[np.ndarray] = []
    pending_tokens = 0

    def close_shard() -> None:
        stem = f"{split}-{len(shards):06d}"
        shards.append(write_shard(folder, stem, np.concatenate(pending), len(pending), sample_tokens))
        pending.clear()

    for document in documents:
        pending.append(document)
        pending_tokens += len(document)
        if pending_tokens >= shard_tokens:
            close_shard()
            pending_tokens = 0
    if pending:
        close_shard()
    return CorpusSplit(sum(shard.tokens for shard in shards), sum(shard.documents for shard in shards), shards)


def write_corpus(
    folder: Path, train: Sequence[str], validation: Sequence[str] = (), *, shard_tokens: int = 1200, **changes
) -> CorpusManifest:
    """The corpus of these documents, in this order, is in the folder; `changes` are told by its manifest, true or not."""
    folder.mkdir(exist_ok=True)
    sizes = {"sample_tokens": SAMPLE_TOKENS, "shard_tokens": shard_tokens}
    splits = {
        name: write_split(folder, name, (encode_document(text) for text in texts), **sizes)
        for name, texts in (("train", train), ("validation", validation))
    }
    text = small_tokenizer().to_str()
    (folder / manifest.TOKENIZER_FILE).write_text(text, encoding="utf-8")
    files = [["0/a.txt", 12, "1700000000", ["0a"]], ["0/ü.txt", 30, "1700000001", ["0b", "0c"]]]
    (folder / "inputs.json").write_text(provenance.dump(files))
    token_counts = np.bincount(np.concatenate([encode_document(text) for text in train]))
    shares = token_counts[token_counts > 0] / token_counts.sum()
    made = CorpusManifest(
        dtype="uint16", sample_tokens=SAMPLE_TOKENS, vocab=small_tokenizer().get_vocab_size(), eos_token=EOS,
        eos_id=small_tokenizer().token_to_id(EOS), tokenizer_sha256=sha256(text.encode()).hexdigest(),
        unigram_entropy_nats=round(float(-(shares * np.log(shares)).sum()), 6),
        counts={of: sum(getattr(split, of) for split in splits.values()) for of in ("documents", "tokens")},
        settings=provenance.summarize(files), **splits,
    )  # fmt: skip
    return rewrite_manifest(folder, made, **changes)


def rewrite_manifest(folder: Path, old_manifest: CorpusManifest, **changes) -> CorpusManifest:
    """The folder's manifest says something else, under a fingerprint that fits."""
    new_manifest = replace(old_manifest, **changes)
    (folder / manifest.MANIFEST_FILE).write_text(manifest.dump_manifest(new_manifest))
    return new_manifest
