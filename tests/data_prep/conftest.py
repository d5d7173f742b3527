"""A small corpus of real formats, and the verb run in this process."""

import argparse
import random
import threading
from pathlib import Path

import pyarrow
import pytest

from tandem.data_prep import prepare, verify
from tests.trainer.data.faulty_server import FaultyServer

WORDS = ["the", "of", "and", "row", "shard", "stream", "cursor", "loss", "1", "23", "def", "return", "(", ")", ":"]


def make_texts() -> list[str]:
    """Documents of several lengths, with an empty one and a copy."""
    rng = random.Random(0)
    made = [" ".join(rng.choices(WORDS, k=rng.randint(1, 120))) for _ in range(300)]
    return [*made, "", made[7], "naïve 漢字 🙂\r\n\ttab", "before <|endoftext|> after <|endoftext|>"]


def write_texts(root: Path, texts: list[str]) -> Path:
    """Write each text to a file in one of three folders."""
    for number, text in enumerate(texts):
        path = root / str(number % 3) / f"{number}.{'txt' if number % 2 else 'py'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return root


@pytest.fixture
def texts():
    return make_texts()


@pytest.fixture
def folder(tmp_path, texts) -> Path:
    return write_texts(tmp_path / "texts", texts)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory) -> Path:
    """The same texts for a whole module, which must not change them."""
    return write_texts(tmp_path_factory.mktemp("shared") / "texts", make_texts())


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


def prepare_small(output: Path, *arguments) -> Path:
    """Prepare the folder with small shards and vocabulary."""
    small = ["--workers", 1, "--sample-tokens", 512, "--shard-tokens", 2000, "--held-out", 0.1]
    vocab = [] if "--tokenizer" in arguments or "--vocab-size" in arguments else ["--vocab-size", 300]
    run_verb(prepare, "--output", output, *small, *vocab, *arguments)
    return output


@pytest.fixture
def prepared(tmp_path):
    """prepared("out", "--input", folder, ...): the prepared folder `out`."""
    return lambda name, *arguments: prepare_small(tmp_path / name, *arguments)


@pytest.fixture
def verified():
    return lambda output: run_verb(verify, output)


def file_contents(output: Path) -> dict[str, bytes]:
    """The name and bytes of every file of a folder."""
    return {path.name: path.read_bytes() for path in output.iterdir()}


@pytest.fixture
def content():
    return file_contents


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of tmp_path."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FaultyServer(tmp_path) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def address(server):
    """tmp_path over http."""
    return server.address
