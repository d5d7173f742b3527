"""A small corpus of real formats, and the verb run in this process."""

import argparse
import random
import threading
from pathlib import Path

import pyarrow
import pytest

from tandem.data_prep import prepare, verify
from tests.trainer.data.faulty_server import FaultyServer

WORDS = [
    "the",
    "of",
    "and",
    "row",
    "shard",
    "stream",
    "cursor",
    "loss",
    "1",
    "23",
    "def",
    "return",
    "(",
    ")",
    ":",
]


@pytest.fixture
def texts():
    """Documents of several lengths, an empty one and two copies of another among them."""
    rng = random.Random(0)
    made = [" ".join(rng.choices(WORDS, k=rng.randint(1, 120))) for _ in range(300)]
    return [*made, "", made[7], "naïve 漢字 🙂\r\n\ttab", "before <|endoftext|> after <|endoftext|>"]


@pytest.fixture
def folder(tmp_path, texts) -> Path:
    root = tmp_path / "texts"
    for number, text in enumerate(texts):
        path = root / str(number % 3) / f"{number}.{'txt' if number % 2 else 'py'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return root


def zstd_frame(data: bytes) -> bytes:
    """One zstd frame."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def run_verb(module, *arguments) -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    module.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def prepared(tmp_path):
    """prepared("out", "--input", folder, ...): the folder, prepared with small shards and vocabulary."""

    def call(name: str, *arguments) -> Path:
        output = tmp_path / name
        small = ["--workers", 1, "--sample-tokens", 512, "--shard-tokens", 2000, "--held-out", 0.1]
        vocab = [] if "--tokenizer" in arguments or "--vocab-size" in arguments else ["--vocab-size", 300]
        run_verb(prepare, "--output", output, *small, *vocab, *arguments)
        return output

    return call


@pytest.fixture
def verified():
    return lambda output: run_verb(verify, output)


@pytest.fixture
def content():
    """The name and bytes of every file of a folder."""
    return lambda output: {path.name: path.read_bytes() for path in Path(output).iterdir()}


@pytest.fixture
def address(tmp_path, monkeypatch):
    """tmp_path over http."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FaultyServer(tmp_path) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running.address
        running.shutdown()
