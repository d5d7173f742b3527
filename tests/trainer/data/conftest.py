"""Fixtures: small corpora from the real writer, and an HTTP server for them."""

import shutil
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tandem.trainer import config
from tandem.trainer.data import manifest
from tandem.trainer.data.manifest import CorpusManifest
from tandem.trainer.disk import atomic_write
from tests.data_prep.corpus_writer import write_split
from tests.trainer.data.faulty_server import FaultyServer

EOS = 0


@pytest.fixture(scope="session")
def write_corpus(tmp_path_factory):
    """Write a corpus, or return the folder of one that was written with the same arguments."""

    @cache
    def write(seed: int, documents: int, vocab: int, tokenizer: str) -> Path:
        folder = tmp_path_factory.mktemp("corpus")
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

    return write


@pytest.fixture
def make_corpus(tmp_path, write_corpus):
    """make_corpus("a", seed=1) makes a folder of random documents in several shards, as uint32 if `vocab` is above 65,536."""

    def make(name: str, *, seed: int = 0, documents: int = 40, vocab: int = 500, tokenizer: str = "1" * 64) -> Path:
        return shutil.copytree(write_corpus(seed, documents, vocab, tokenizer), tmp_path / name)

    return make


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[FaultyServer]:
    """Serve tmp_path over http."""
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
    """settings(max_attempts=3) returns the settings of a cache in an empty folder."""

    def make(**changes) -> config.ShardCacheConfig:
        return config.ShardCacheConfig(
            **{"folder": str(tmp_path / "copies"), "max_attempts": 4, "timeout_seconds": 1.0} | changes
        )

    return make


@pytest.fixture
def shards(make_corpus):
    """The training shards of the corpus "a"."""
    return manifest.load_manifest(make_corpus("a", documents=60)).train.shards
