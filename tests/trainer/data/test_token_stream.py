import dataclasses
import gc
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tandem.trainer import config
from tandem.trainer.config import PhaseConfig, UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.shard_cache import ShardCache
from tandem.trainer.data.token_stream import MAX_OPEN_SHARDS, DamagedSourceShard, TokenStream
from tests.trainer.data.loaders import make_loader, make_schedule


def open_stream(folder, *, name="a", seed=0):
    corpus = manifest.load_manifest(folder)
    return TokenStream(folder, corpus, corpus.train, source=name, seed=seed), corpus


def shard_tokens(folder, corpus):
    """Yield the tokens of each training shard, read with tarfile instead of our offsets."""
    for shard in corpus.train.shards:
        with tarfile.open(folder / shard.file) as tar:
            data = b"".join(tar.extractfile(member).read() for member in tar)
        yield np.frombuffer(data, np.dtype(corpus.dtype).newbyteorder("<"))


@pytest.mark.parametrize("vocab", [500, 100_000])
def test_an_epoch_is_every_shard_once_whole(make_corpus, vocab):
    folder = make_corpus("a", vocab=vocab, documents=500)
    stream, corpus = open_stream(folder)
    assert len(corpus.train.shards) > MAX_OPEN_SHARDS, "the test must exceed the limit of open maps"
    shards = [tokens.tobytes() for tokens in shard_tokens(folder, corpus)]
    orders = []
    for epoch in range(2):
        found, position = [], epoch * stream.epoch_tokens
        while position < (epoch + 1) * stream.epoch_tokens:
            place = next(
                index
                for index, shard in enumerate(shards)
                if stream.read_tokens(position, corpus.train.shards[index].tokens).tobytes() == shard
            )
            found.append(place)
            position += corpus.train.shards[place].tokens
        assert sorted(found) == list(range(len(shards)))
        orders.append(found)
    assert orders[0] != orders[1], "epochs have their own order"
    assert orders[0] != sorted(orders[0])


def test_any_cut_of_the_stream_gives_the_same_tokens(make_corpus):
    stream, _ = open_stream(make_corpus("a"))
    whole = stream.read_tokens(0, 2 * stream.epoch_tokens + 100)
    rng = np.random.default_rng(0)
    for _ in range(200):
        first, last = sorted(rng.integers(0, len(whole), 2))
        assert np.array_equal(stream.read_tokens(int(first), int(last - first)), whole[first:last])


def test_order_depends_on_seed_and_name_only(make_corpus):
    folder = make_corpus("a", documents=200)
    read = [open_stream(folder, name=name, seed=seed)[0].read_tokens(0, 3000) for name, seed in
            (("a", 0), ("a", 0), ("a", 1), ("b", 0))]  # fmt: skip
    assert np.array_equal(read[0], read[1])
    assert not np.array_equal(read[0], read[2])
    assert not np.array_equal(read[0], read[3])


def test_no_document_is_cut_where_shards_meet(make_corpus):
    folder = make_corpus("a", documents=200)
    corpus = manifest.load_manifest(folder)
    assert all(tokens[-1] == corpus.eos_id for tokens in shard_tokens(folder, corpus))


def test_a_flipped_byte_stops_the_first_read_of_its_shard_and_no_other(make_corpus):
    folder = make_corpus("a", documents=60)
    stream, corpus = open_stream(folder, seed=None)
    damaged = corpus.train.shards[2]
    content = bytearray((folder / damaged.file).read_bytes())
    content[700] ^= 1
    (folder / damaged.file).write_bytes(content)
    border = sum(shard.tokens for shard in corpus.train.shards[:2])
    stream.read_tokens(0, border)
    with pytest.raises(UserError, match=rf"{damaged.file}: the shard is damaged: its xxh3_128 is "):
        stream.read_tokens(border - 1, 2)


class Cutting(ShardCache):
    """Another program may truncate the file between open and mmap."""

    def open_shard(self, folder, shard):
        file = super().open_shard(folder, shard)
        os.truncate(file.name, shard.bytes // 2)
        return file


def test_a_shard_cut_short_after_its_check_is_not_mapped(make_corpus):
    folder = make_corpus("a")
    corpus = manifest.load_manifest(folder)
    stream = TokenStream(folder, corpus, corpus.train, source="a", seed=None, cache=Cutting(config.ShardCacheConfig()))
    with pytest.raises(DamagedSourceShard, match=rf"{corpus.train.shards[0].file}: has fewer than the \d+ bytes"):
        stream.read_tokens(0, 1)


def held() -> tuple[int, int, int]:
    """Collect garbage, and return the open files, memory maps and resident bytes of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines()), pages * 4096


SOAK_SHARDS = 2_000
BOOKKEEPING_BYTES = 500
"""Memory per shard after it was hashed and closed, for its path and file state: 1/100,000 of a full shard."""


def test_2000_shards_streamed_leave_no_file_open_no_map_and_no_memory(make_corpus):
    folder = make_corpus("a", documents=20)
    corpus = manifest.load_manifest(folder)
    shard, *_ = corpus.train.shards
    files = [f"soak-{index:06d}.tar" for index in range(SOAK_SHARDS)]
    for file in files:
        os.link(folder / shard.file, folder / file)
    shards = [dataclasses.replace(shard, file=file) for file in files]
    tokens, documents = SOAK_SHARDS * shard.tokens, SOAK_SHARDS * shard.documents
    many = dataclasses.replace(corpus, train=manifest.CorpusSplit(tokens, documents, shards))
    (folder / manifest.MANIFEST_FILE).write_text(manifest.dump_manifest(many))
    phase = PhaseConfig("p", tokens // 1024 * 1024, 128, 8, 1, {"a": 1.0})
    blocks = {"shuffle_block_tokens": 128, "shuffle_window_tokens": 8 * 1024}
    files_before, _, _ = held()
    batches = make_loader({"a": str(folder)}, make_schedule(phase), num_workers=2, prefetch_steps=4, **blocks).batches(
        0, None
    )
    gc.collect()
    gc.freeze()  # objects of the libraries need not be examined at every sample
    try:
        seen = [held() for step, _ in enumerate(batches) if step % 10 == 0]
    finally:
        gc.unfreeze()
    quarter = len(seen) // 4
    first, last = seen[quarter // 2 : quarter], seen[-quarter:]
    for index, room in enumerate((MAX_OPEN_SHARDS // 4, MAX_OPEN_SHARDS // 4, SOAK_SHARDS * BOOKKEEPING_BYTES)):
        assert max(now[index] for now in last) <= max(before[index] for before in first) + room
    assert max(now[0] for now in last) - files_before <= MAX_OPEN_SHARDS + 8
