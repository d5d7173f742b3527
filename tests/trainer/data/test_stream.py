import tarfile

import numpy as np
import pytest

from trainer.config import UserError
from trainer.data import manifest
from trainer.data.stream import OPEN_SHARDS, Stream


def open_stream(folder, *, name="a", seed=0):
    corpus = manifest.load(folder)
    return Stream(folder, corpus, corpus.train, name=name, seed=seed), corpus


def shard_tokens(folder, corpus):
    """The tokens of each training shard, by the tar library rather than by our offsets."""
    for shard in corpus.train.shards:
        with tarfile.open(folder / shard.file) as tar:
            data = b"".join(tar.extractfile(member).read() for member in tar)
        yield np.frombuffer(data, np.dtype(corpus.dtype).newbyteorder("<"))


@pytest.mark.parametrize("vocab", [500, 100_000])
def test_an_epoch_is_every_shard_once_whole(make_corpus, vocab):
    folder = make_corpus("a", vocab=vocab, documents=200)
    stream, corpus = open_stream(folder)
    assert len(corpus.train.shards) > OPEN_SHARDS, "the test shall close maps"
    shards = [tokens.tobytes() for tokens in shard_tokens(folder, corpus)]
    orders = []
    for epoch in range(2):
        found, position = [], epoch * stream.tokens
        while position < (epoch + 1) * stream.tokens:
            place = next(
                index
                for index, shard in enumerate(shards)
                if stream.read(position, corpus.train.shards[index].tokens).tobytes() == shard
            )
            found.append(place)
            position += corpus.train.shards[place].tokens
        assert sorted(found) == list(range(len(shards)))
        orders.append(found)
    assert orders[0] != orders[1], "epochs have their own order"
    assert orders[0] != sorted(orders[0])


def test_any_cut_of_the_stream_gives_the_same_tokens(make_corpus):
    stream, _ = open_stream(make_corpus("a"))
    whole = stream.read(0, 2 * stream.tokens + 100)
    rng = np.random.default_rng(0)
    for _ in range(200):
        first, last = sorted(rng.integers(0, len(whole), 2))
        assert np.array_equal(stream.read(int(first), int(last - first)), whole[first:last])


def test_order_depends_on_seed_and_name_only(make_corpus):
    folder = make_corpus("a", documents=200)
    read = [open_stream(folder, name=name, seed=seed)[0].read(0, 3000) for name, seed in
            (("a", 0), ("a", 0), ("a", 1), ("b", 0))]  # fmt: skip
    assert np.array_equal(read[0], read[1])
    assert not np.array_equal(read[0], read[2])
    assert not np.array_equal(read[0], read[3])


def test_no_document_is_cut_where_shards_meet(make_corpus):
    folder = make_corpus("a", documents=200)
    corpus = manifest.load(folder)
    assert all(tokens[-1] == corpus.eos_id for tokens in shard_tokens(folder, corpus))


def test_a_flipped_byte_stops_the_first_read_of_its_shard_and_no_other(make_corpus):
    folder = make_corpus("a", documents=60)
    stream, corpus = open_stream(folder, seed=None)
    damaged = corpus.train.shards[2]
    content = bytearray((folder / damaged.file).read_bytes())
    content[700] ^= 1
    (folder / damaged.file).write_bytes(content)
    border = sum(shard.tokens for shard in corpus.train.shards[:2])
    stream.read(0, border)
    with pytest.raises(UserError, match=rf"{damaged.file}: sha256 .*damaged"):
        stream.read(border - 1, 2)
