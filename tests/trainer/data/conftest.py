"""Corpora of known tokens, written by the real writer."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tandem.data_prep.shard_writer import write_split
from tandem.trainer import config
from tandem.trainer.data import manifest
from tandem.trainer.data.manifest import CorpusManifest
from tandem.trainer.disk import atomic_write
from tests.trainer.data.faulty_server import FaultyServer

EOS = 0


@pytest.fixture
def make_corpus(tmp_path):
    """make_corpus("a", seed=1): a folder of random documents in several shards; "
    "`vocab` above 65,536 gives uint32."""

    def make(name: str, *, seed: int = 0, documents: int = 40, vocab: int = 500, tokenizer: str = "one") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(seed)
        dtype = manifest.token_dtype(vocab)

        def texts(count):
            for _ in range(count):
                yield np.append(rng.integers(1, vocab, rng.integers(0, 90)), EOS).astype(dtype)

        sizes = {"sample_tokens": 512, "shard_tokens": 600}
        train = write_split(folder, "train", texts(documents), **sizes)
        validation = write_split(folder, "validation", texts(8), **sizes)
        facts = {"unigram_entropy_nats": 0.0, "counts": {}, "settings": {}}
        written = CorpusManifest(
            dtype, 512, vocab, "<eos>", EOS, tokenizer, **facts, train=train, validation=validation
        )
        atomic_write(folder / manifest.MANIFEST_FILE, manifest.dump_manifest(written))
        return folder

    return make


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[FaultyServer]:
    """tmp_path over http."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FaultyServer(tmp_path) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.test_over.set()
        running.resume.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def settings(tmp_path):
    """settings(max_attempts=3): of a cache in an empty folder."""

    def make(**changes) -> config.ShardCacheConfig:
        return config.ShardCacheConfig(
            **{"folder": str(tmp_path / "copies"), "max_attempts": 4, "timeout_seconds": 1.0} | changes
        )

    return make


@pytest.fixture
def shards(make_corpus):
    """The training shards of the corpus "a"."""
    return manifest.load_manifest(make_corpus("a", documents=60)).train.shards
