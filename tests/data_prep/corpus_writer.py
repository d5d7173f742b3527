"""Corpora of known documents, without `tandem prepare`: a small tokenizer, the real writer of shards, a manifest."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tandem.data_prep import provenance
from tandem.data_prep.shard_writer import write_split
from tandem.trainer.data import manifest
from tandem.trainer.data.manifest import Manifest

EOS = "<|endoftext|>"
SAMPLE_TOKENS = 512


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE of a few merges."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the row of a shard and the tokens of the row"] * 9, trainer)
    made.encode_special_tokens = True
    return made


def ids(text: str) -> np.ndarray:
    """The tokens of a document, EOS at its end; the characters of EOS in it are text."""
    return np.array([*tokenizer().encode(text).ids, tokenizer().token_to_id(EOS)], np.uint16)


def corpus(
    folder: Path, train: Sequence[str], validation: Sequence[str] = (), *, shard_tokens: int = 1200, **changes
) -> Manifest:
    """The corpus of these documents, in this order, is in the folder; `changes` are told by its manifest, true or not."""
    folder.mkdir(exist_ok=True)
    sizes = {"sample_tokens": SAMPLE_TOKENS, "shard_tokens": shard_tokens}
    splits = {
        name: write_split(folder, name, (ids(text) for text in texts), **sizes)
        for name, texts in (("train", train), ("validation", validation))
    }
    text = tokenizer().to_str()
    (folder / manifest.TOKENIZER_FILE).write_text(text, encoding="utf-8")
    files = [["0/a.txt", 12, "1700000000", ["0a"]], ["0/ü.txt", 30, "1700000001", ["0b", "0c"]]]
    (folder / "inputs.json").write_text(provenance.dump(files))
    counted = np.bincount(np.concatenate([ids(text) for text in train]))
    shares = counted[counted > 0] / counted.sum()
    made = Manifest(
        dtype="uint16", sample_tokens=SAMPLE_TOKENS, vocab=tokenizer().get_vocab_size(), eos_token=EOS,
        eos_id=tokenizer().token_to_id(EOS), tokenizer_sha256=sha256(text.encode()).hexdigest(),
        unigram_entropy_nats=round(float(-(shares * np.log(shares)).sum()), 6),
        counts={of: sum(getattr(split, of) for split in splits.values()) for of in ("documents", "tokens")},
        settings=provenance.identity(files), **splits,
    )  # fmt: skip
    return rewrite(folder, made, **changes)


def rewrite(folder: Path, before: Manifest, **changes) -> Manifest:
    """The folder's manifest says something else, under a fingerprint that fits."""
    made = replace(before, **changes)
    (folder / manifest.FILE).write_text(manifest.dump(made))
    return made
