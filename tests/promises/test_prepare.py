"""A preparation survives being killed: at any moment, any number of times."""

import json
import random
import shutil
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from data_prep import plan
from tests.promises.conftest import ended
from tests.ranks import SERVER
from trainer.__main__ import main

KILLS = 50
SEED = 5
UNIT_BYTES = 16_000
MOST_FINISHED = 13
"""Units and shards of the whole preparation, roughly."""


@pytest.fixture
def command(tmp_path):
    """command(folder): a preparation of several units and shards, with everything it can be asked to do."""
    rng = random.Random(SEED)
    words = [f"word{number}" for number in range(300)]
    for file in range(5):
        texts = (" ".join(rng.choices(words, k=rng.randint(5, 200))) for _ in range(30))
        lines = (json.dumps({"text": text, "meta": {"set": f"set{rng.randint(0, 2)}"}}) for text in texts)
        (tmp_path / f"{file}.jsonl").write_text("\n".join(lines))
    # tokenizers alone: checking the faster library takes longer than all the rest.
    options = ["--vocab", 400, "--held-out", 0.1, "--sample-tokens", 512, "--shard-tokens", 6000, "--workers", 1,
               "--tokenizer-library", "tokenizers", "--nfc", "--min-characters", 60, "--deduplicate",
               "--group-field", "meta.set"]  # fmt: skip
    inputs = sorted(tmp_path.glob("*.jsonl"))
    return lambda folder: ["prepare", "--input", *inputs, "--output", folder, *options]


def forked(command: list[object]) -> BaseProcess:
    process = SERVER.Process(target=_run, args=(list(map(str, command)),))
    process.start()
    return process


def _run(command: list[str]) -> None:
    plan.SMALLEST_UNIT_BYTES = UNIT_BYTES
    sys.exit(main(command))


def finished(folder: Path) -> int:
    """Units and shards that need not be made again."""
    return len(list((folder / "work").glob("[0-9a-f]*.json"))) + len(list(folder.glob("*.tar")))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_at_fifty_random_moments_the_corpus_is_the_same_bytes(command, tmp_path):
    """Killed again and again in one folder, work goes on from what is finished; a finished folder makes way for a new one."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert ended(forked(command(tmp_path / "first"))) == 0  # with it the server starts, which takes longer than all
    began = time.monotonic()
    assert ended(forked(command(whole))) == 0
    seconds, expected = time.monotonic() - began, content(whole)
    assert sum(name.endswith(".tar") for name in expected) > 5
    rng, kills, after = random.Random(SEED), 0, []
    while kills < KILLS:
        process, until = forked(command(folder)), MOST_FINISHED * kills // KILLS
        while (
            process.is_alive() and finished(folder) < until
        ):  # by the work done: a clock alone misses most of it on a busy machine
            time.sleep(0.001)
        process.join(rng.uniform(0, seconds / MOST_FINISHED))
        if process.is_alive():
            process.kill()
            kills += 1
            after.append(finished(folder))
        process.join()
        if process.exitcode == 0:
            assert content(folder) == expected
            shutil.rmtree(folder)
    assert ended(forked(command(folder))) == 0
    assert content(folder) == expected
    assert len(set(after)) > 4, "the moments must lie all over the work"
