"""The tokenizer of a corpus: trained on it or given, and the encoding of documents in worker processes.

The one idea: the text of a document is only ever text. The characters of a special token inside it are
encoded like any others, so the EOS id ends documents and occurs nowhere else, which is checked on every
batch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.read import Document
from trainer.config import UserError
from trainer.data.manifest import dtype_of

BYTE_VALUES = 256


@dataclass(frozen=True)
class Encoded:
    """A batch of documents, one after the other, each with EOS at its end."""

    tokens: np.ndarray
    lengths: np.ndarray
    draws: np.ndarray
    """`draw` of each text."""
    ranks: np.ndarray
    """uint64: the place of each document in the global shuffle; depends on seed, place and text."""


@dataclass(frozen=True)
class Encoder:
    """All a worker needs."""

    tokenizer_json: str
    eos: str
    eos_id: int
    vocab: int
    seed: int


def train(texts: Iterable[str], vocab: int, eos: str) -> str:
    """tokenizer.json of a byte-level BPE of at most `vocab` ids, every byte and EOS among them."""
    if vocab <= BYTE_VALUES:
        raise UserError(f"--vocab: {vocab}; must be above {BYTE_VALUES}, room for every byte and EOS; raise it")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[eos], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str(pretty=True))


def encoder(tokenizer_json: str, eos: str, seed: int, where: str) -> Encoder:
    """The encoder of a tokenizer.json.

    Raises: UserError, starting with `where`, if it is no tokenizer, has no EOS, or makes EOS out of plain
    text.
    """
    try:
        tree = json.loads(tokenizer_json)
        for added in tree["added_tokens"]:
            # Only tokens marked special can be switched off in text; an EOS that is not marked would be
            # matched.
            added["special"] = added["special"] or added["content"] == eos
        tokenizer_json = json.dumps(tree)
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: is not a tokenizer.json ({reason}); name one in the format of tokenizers") from None
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if eos not in ids:
        raise UserError(f"{where}: has no token {eos!r}; documents end with it; name the tokenizer's with --eos")
    made = Encoder(tokenizer_json, eos, ids[eos], max(ids.values()) + 1, seed)
    encode(_load(made), made, [Document(where, eos), Document(where, f"a{eos}b {eos}")])
    return made


def encode(tokenizer: Tokenizer, using: Encoder, batch: list[Document]) -> Encoded:
    """Raises: UserError naming a document whose own text yields the EOS id."""
    ids = [
        np.array([*encoding.ids, using.eos_id], dtype_of(using.vocab))
        for encoding in tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
    ]
    for document, tokens in zip(batch, ids, strict=True):
        if (tokens[:-1] == using.eos_id).any():
            raise UserError(
                f"{document.place}: its text yields the EOS id {using.eos_id}; choose another --eos or tokenizer"
            )
    draws = np.array([draw(document.text) for document in batch])
    ranks = np.array([_rank(document, using.seed) for document in batch], np.uint64)
    lengths = np.array([len(tokens) for tokens in ids], np.int64)
    return Encoded(np.concatenate(ids), lengths, draws, ranks)


def draw(text: str) -> float:
    """A uniform number in [0, 1) that belongs to this text; below the held-out share, it is held out."""
    return (int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 11) / 2**53


def _rank(document: Document, seed: int) -> int:
    key = f"{seed}\0{document.place}\0{document.text}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")


def encode_all(using: Encoder, batches: Iterable[list[Document]], workers: int) -> Iterator[Encoded]:
    """The encoded batches in their order, from `workers` processes, a bounded number of them under way."""
    # One thread a worker: --workers is the number of cores in use. tokenizers has no other switch than this.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if workers == 1:
        tokenizer = _load(using)
        yield from (encode(tokenizer, using, batch) for batch in batches)
        return
    spawn = multiprocessing.get_context("spawn")
    waiting: deque[Future[Encoded]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(using,))
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode_in_worker, batch))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Tokenizer, Encoder]


def _start_worker(using: Encoder) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = (_load(using), using)


def _end_with_parent() -> None:
    # A killed parent cannot close the queue its workers wait on; they would wait for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _encode_in_worker(batch: list[Document]) -> Encoded:
    return encode(*_worker, batch)


def _load(using: Encoder) -> Tokenizer:
    tokenizer = Tokenizer.from_str(using.tokenizer_json)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read(path: str) -> str:
    """The text of a tokenizer.json.  Raises: UserError where it cannot be read."""
    try:
        return Path(path).read_bytes().decode()
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer: {path} cannot be read ({error}); name a tokenizer.json") from None
