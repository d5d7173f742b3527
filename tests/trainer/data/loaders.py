"""Loaders over small corpora, and their batches merged over all data-parallel ranks."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tandem.trainer.config import DataConfig, LinearLRConfig, PhaseConfig, ScheduleConfig
from tandem.trainer.data import manifest
from tandem.trainer.data.damaged_shards import GatherDamaged
from tandem.trainer.data.loader import Loader
from tandem.trainer.data.shuffle import BlockShuffle
from tandem.trainer.data.token_stream import TokenStream

VOCAB_SIZE = 512


def make_schedule(*phases: PhaseConfig) -> ScheduleConfig:
    return ScheduleConfig(None, list(phases), LinearLRConfig("linear", 1.0, 0.0, 1, None))


def make_loader(sources, schedule, *, seed=0, vocab_size=VOCAB_SIZE, dp_rank=0, dp_size=1, **fields) -> Loader:
    return Loader(
        DataConfig(sources, **fields), schedule, seed=seed, vocab_size=vocab_size, dp_rank=dp_rank, dp_size=dp_size
    )


def make_loaders(sources, schedule, dp_size: int, **settings) -> list[Loader]:
    return [make_loader(sources, schedule, dp_rank=rank, dp_size=dp_size, **settings) for rank in range(dp_size)]


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def merge_ranks(batches) -> tuple[str, tuple[int, int], dict[str, int]]:
    """Merge all ranks' batches of one step. Return a hash of all rows, the summed digests and the cursor."""
    assert all(batch.cursor == batches[0].cursor for batch in batches)
    fields = (getattr(batch, name) for name in ("tokens", "targets", "document_ids") for batch in batches)
    sums = [[getattr(batch.digests, name) for batch in batches] for name in ("ranges_digest", "tokens_digest")]
    return digest(fields), tuple(sum(each) % 2**64 for each in sums), batches[0].cursor


def merged_steps(loaders, step=0, cursor=None) -> Iterator[tuple[str, tuple[int, int], dict[str, int]]]:
    """Yield `merge_ranks` of each step."""
    for batches in zip(*(each.batches(step, cursor) for each in loaders), strict=True):
        yield merge_ranks(batches)


def run_in_threads(num_ranks: int, function: Callable[[int, GatherDamaged], object]) -> list:
    """Run `function(rank, exchange)` on ranks that are threads, and return their results. Fail if one waits forever."""
    barrier, reported_ids, results = threading.Barrier(num_ranks, timeout=20), [None] * num_ranks, [None] * num_ranks

    def run(rank: int) -> None:
        def exchange(met):
            reported_ids[rank] = met
            barrier.wait()
            everywhere = sorted({each for each in reported_ids if each})
            barrier.wait()
            return everywhere

        try:
            results[rank] = function(rank, exchange)
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank waits forever"
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error  # the cause before the broken barriers that follow from it
    return results


class TokenReader:
    """Reads the training tokens of a source one at a time, with the shard and offset of each."""

    def __init__(
        self, folder: Path | str, name: str, *, seed=0, shuffle_block_tokens=8_192, shuffle_window_tokens=33_554_432
    ):
        corpus = manifest.load_manifest(folder)
        split = corpus.train
        self.files = [shard.file for shard in split.shards]
        self.tokens = split.tokens
        self.order = BlockShuffle(
            split.tokens,
            shuffle_block_tokens=shuffle_block_tokens,
            shuffle_window_tokens=shuffle_window_tokens,
            source=name,
            seed=seed,
        )
        self.stream = TokenStream(folder, corpus, split, source=name, seed=seed)

    def shard_position(self, position: int) -> tuple[int, int]:
        [(start, _)] = self.order.stream_ranges(position, 1)
        [(shard, first, _)] = self.stream.shard_ranges(start, 1)
        return shard, first

    def needed_shards(self, position: int) -> set[int]:
        """Return the shards that the token and its target are read from."""
        [(start, _)] = self.order.stream_ranges(position, 1)
        return {shard for shard, _, _ in self.stream.shard_ranges(start, 2)}

    def positions_outside(self, first: int, last: int, left_out=()) -> list[int]:
        """Return the positions in [first, last) that are in none of these files."""
        return [p for p in range(first, last) if self.files[self.shard_position(p)[0]] not in left_out]

    def token_ids(self, positions) -> np.ndarray:
        found = [self.stream.read_tokens(self.order.stream_ranges(position, 1)[0][0], 1) for position in positions]
        return np.concatenate([np.empty(0, self.stream.dtype), *found])
