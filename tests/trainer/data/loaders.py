"""Loaders over small corpora, and what they read put together from all data-parallel ranks."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tandem.trainer.config import Data, Linear, Phase, Schedule
from tandem.trainer.data import manifest
from tandem.trainer.data.damaged_shards import Exchange
from tandem.trainer.data.loader import Loader
from tandem.trainer.data.shuffle import Order
from tandem.trainer.data.token_stream import Stream

VOCAB = 512


def schedule_of(*phases: Phase) -> Schedule:
    return Schedule(None, list(phases), Linear("linear", 1.0, 0.0, 1, None))


def loader(sources, schedule, *, seed=0, vocab=VOCAB, rank=0, size=1, **fields) -> Loader:
    return Loader(Data(sources, **fields), schedule, seed=seed, vocab=vocab, dp_rank=rank, dp_size=size)


def ranks(sources, schedule, size: int, **settings) -> list[Loader]:
    return [loader(sources, schedule, rank=rank, size=size, **settings) for rank in range(size)]


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def globally(batches) -> tuple[str, tuple[int, int], dict[str, int]]:
    """Of the batches that all ranks have of one step: a hash of all rows, the sums of evidence, and the cursor."""
    assert all(batch.cursor == batches[0].cursor for batch in batches)
    fields = (getattr(batch, name) for name in ("tokens", "targets", "documents") for batch in batches)
    sums = [[getattr(batch.evidence, name) for batch in batches] for name in ("ranges", "tokens")]
    return digest(fields), tuple(sum(each) % 2**64 for each in sums), batches[0].cursor


def steps(loaders, step=0, cursor=None) -> Iterator[tuple[str, tuple[int, int], dict[str, int]]]:
    """`globally`, step by step."""
    for batches in zip(*(each.batches(step, cursor) for each in loaders), strict=True):
        yield globally(batches)


def side_by_side(size: int, function: Callable[[int, Exchange], object]) -> list:
    """What `function(rank, exchange)` returns on each of so many ranks, which are threads; fails where one waits in vain."""
    barrier, said, results = threading.Barrier(size, timeout=20), [None] * size, [None] * size

    def run(rank: int) -> None:
        def exchange(met):
            said[rank] = met
            barrier.wait()
            everywhere = sorted({each for each in said if each})
            barrier.wait()
            return everywhere

        try:
            results[rank] = function(rank, exchange)
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank waits for ever"
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error  # the cause before those who then waited in vain
    return results


class Tokens:
    """The training tokens of a source one at a time: at a position in reading order, which shard, place and id."""

    def __init__(self, folder: Path | str, name: str, *, seed=0, block_tokens=8_192, window_tokens=33_554_432):
        corpus = manifest.load(folder)
        split = corpus.train
        self.files = [shard.file for shard in split.shards]
        self.tokens = split.tokens
        self.order = Order(split.tokens, block_tokens=block_tokens, window_tokens=window_tokens, name=name, seed=seed)
        self.stream = Stream(folder, corpus, split, name=name, seed=seed)

    def place(self, position: int) -> tuple[int, int]:
        [(start, _)] = self.order.runs(position, 1)
        [(shard, first, _)] = self.stream.pieces(start, 1)
        return shard, first

    def needed(self, position: int) -> set[int]:
        """The shards that the token and its target are read from."""
        [(start, _)] = self.order.runs(position, 1)
        return {shard for shard, _, _ in self.stream.pieces(start, 2)}

    def kept(self, first: int, last: int, left_out=()) -> list[int]:
        """The positions of [first, last) that are not in one of these files."""
        return [p for p in range(first, last) if self.files[self.place(p)[0]] not in left_out]

    def ids(self, positions) -> np.ndarray:
        found = [self.stream.read(self.order.runs(position, 1)[0][0], 1) for position in positions]
        return np.concatenate([np.empty(0, self.stream.dtype), *found])
