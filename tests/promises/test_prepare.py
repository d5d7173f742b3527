"""A preparation survives being killed: at any moment, any number of times."""

import json
import multiprocessing
import random
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import webdataset

from tandem.data_prep import work_units
from tandem.trainer.__main__ import main
from tests import ranks
from tests.data_prep.corpus_writer import small_tokenizer

KILLS = 50
ADOPTING_KILLS = 6
SEED = 5
UNIT_BYTES = 16_000
MOST_FINISHED = 13
"""Units and shards of the whole preparation, roughly."""
MOMENT_SECONDS = 0.01
"""From one published file to the next, roughly."""


@pytest.fixture
def command(tmp_path):
    """A preparation of several units and shards, with everything it can be asked to do."""
    rng = random.Random(SEED)
    words = [f"word{number}" for number in range(300)]
    for file in range(5):
        texts = (" ".join(rng.choices(words, k=rng.randint(5, 200))) for _ in range(30))
        lines = (json.dumps({"text": text, "meta": {"set": f"set{rng.randint(0, 2)}"}}) for text in texts)
        (tmp_path / f"{file}.jsonl").write_text("\n".join(lines))
    # tokenizers alone: checking the faster library takes longer than all the rest.
    options = ["--vocab-size", 400, "--held-out", 0.1, "--sample-tokens", 512, "--shard-tokens", 6000, "--workers", 1,
               "--tokenizer-library", "tokenizers", "--nfc", "--min-characters", 60, "--deduplicate",
               "--group-field", "meta.set"]  # fmt: skip
    inputs = sorted(tmp_path.glob("*.jsonl"))
    return ["prepare", "--input", *inputs, *options]


@dataclass(frozen=True)
class Kill:
    """So many seconds after the first file that is published with at least so much of the folder finished."""

    folder: Path
    finished: int
    seconds: float


@pytest.fixture
def adopting_command(tmp_path):
    """A preparation of several units and shards that adopts token ids in open_lm's form."""
    (tmp_path / "tokenizer.json").write_text(small_tokenizer().to_str())
    rng = random.Random(SEED)
    with webdataset.ShardWriter(str(tmp_path / "%06d.tar"), maxcount=30, verbose=0) as sink:
        for number in range(150):
            ids = rng.choices(range(small_tokenizer().get_vocab_size()), k=65)
            sink.write({"__key__": f"{number:06}", "json.gz": json.dumps(ids)})
    return ["prepare", "--input", tmp_path / "{000000..000004}.tar", "--tokens", "json.gz", "--held-out", 0.1,
            "--tokenizer", tmp_path / "tokenizer.json", "--sample-tokens", 512, "--shard-tokens", 1200,
            "--workers", 1]  # fmt: skip


def killed(command: list[object], whole: Path, folder: Path, kills: int) -> list[int]:
    """Kill preparations of `folder` until it has been killed so often, check that it then becomes what `whole` is, and
    return how much was finished at each kill.

    This runs in a separate process and forks the preparations, because their imports take longer than their work.
    """
    import webdataset.tariterators  # noqa: F401

    import tandem.data_prep.prepare  # noqa: F401

    work_units.MIN_UNIT_BYTES = UNIT_BYTES
    assert not _ended(command, whole)
    expected, rng, after = content(whole), random.Random(SEED), list[int]()
    assert sum(name.endswith(".tar") for name in expected) > 5
    while len(after) < kills:
        moment = Kill(folder, MOST_FINISHED * len(after) // kills, rng.uniform(0, MOMENT_SECONDS))
        if _ended(command, folder, moment):
            after.append(finished(folder))
        else:
            assert content(folder) == expected
            shutil.rmtree(folder)
    assert not _ended(command, folder)
    assert content(folder) == expected
    return after


def _ended(command: list[object], folder: Path, kill: Kill | None = None) -> int:
    process = multiprocessing.get_context("fork").Process(target=_run, args=(command, folder, kill))
    process.start()
    process.join()
    assert process.exitcode in ((0, -signal.SIGALRM) if kill else (0,))
    return process.exitcode or 0


def _run(command: list[object], folder: Path, kill: Kill | None) -> None:
    if kill is not None:
        _set(kill)
    sys.exit(main(list(map(str, [*command, "--output", folder]))))


def _set(kill: Kill) -> None:
    """From inside, by the work done: who looks from outside, or at a clock alone, misses most of it on a busy machine."""
    due = True

    def hear(event: str, _arguments: tuple[object, ...]) -> None:
        nonlocal due
        if due and event == "os.rename" and finished(kill.folder) >= kill.finished:
            due = False
            signal.setitimer(signal.ITIMER_REAL, kill.seconds)

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at once, as SIGKILL does
    sys.addaudithook(hear)


def finished(folder: Path) -> int:
    """Units and shards that need not be made again."""
    return len(list((folder / "work").glob("[0-9a-f]*.json"))) + len(list(folder.glob("*.tar")))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_at_fifty_random_moments_the_corpus_is_the_same_bytes(command, tmp_path):
    """Killed again and again in one folder, work goes on from what is finished; a finished folder makes way for a new one."""
    folders = tmp_path / "whole", tmp_path / "killed"
    (after,) = ranks.run(killed, 1, tmp_path, command, *folders, KILLS, timeout_seconds=400)
    assert len(set(after)) > 4, "the moments must lie all over the work"


def test_killed_while_it_adopts_token_ids_the_corpus_is_the_same_bytes(adopting_command, tmp_path):
    folders = tmp_path / "whole", tmp_path / "killed"
    (after,) = ranks.run(killed, 1, tmp_path, adopting_command, *folders, ADOPTING_KILLS, timeout_seconds=400)
    assert len(set(after)) > 2
