"""Damage and the end of the data in a whole run of two data-parallel ranks: agreed, on record, and never a rank that waits."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from tandem.trainer.checkpoint.read import open_checkpoint
from tandem.trainer.config import TrainConfig, parse_dataclass
from tandem.trainer.data import manifest
from tandem.trainer.data.token_stream import TokenStream
from tandem.trainer.train import run
from tests import ranks
from tests.promises.conftest import read_step_records, two_phase_config


def run_all(configs: list[TrainConfig], held_out: Path) -> list[int]:
    """The starts one after the other; before the last but one the file of held-out rows is gone too."""
    codes = []
    for number, config in enumerate(configs):
        if number == len(configs) - 2:
            held_out.unlink(missing_ok=True)
        codes.append(run(config))
    return codes


@pytest.fixture(scope="module")
def folders(tmp_path_factory, corpus) -> tuple[Path, Path]:
    """The run's folder and its corpus, in which the first training and the first of two held-out shards are damaged; stopped,
    started with nothing to do, and resumed, without a held-out shard left. Beside it a run that cannot feed its first step.
    """
    root = tmp_path_factory.mktemp("data")
    damaged = root / "corpus"
    shutil.copytree(corpus, damaged)
    facts = manifest.load_manifest(damaged)
    # A training shard's copy stands in for a second held-out one.
    second = dataclasses.replace(facts.train.shards[-1], file="validation-again.tar")
    shutil.copy(damaged / facts.train.shards[-1].file, damaged / second.file)
    first = facts.validation.shards[0]
    held_out = manifest.CorpusSplit(first.tokens + second.tokens, first.documents + second.documents, [first, second])
    facts = dataclasses.replace(facts, validation=held_out)
    (damaged / manifest.MANIFEST_FILE).write_text(manifest.dump_manifest(facts))
    (damaged / facts.train.shards[0].file).unlink()
    truncated = damaged / first.file
    truncated.write_bytes(truncated.read_bytes()[:-512])
    # Tokens for nine of the twelve steps.
    epochs = 9.5 * 256 / facts.train.tokens
    blocks = {"shuffle_block_tokens": 64, "shuffle_window_tokens": facts.train.tokens}
    data = {"damaged_shards": "skip", "at_end": "stop", "max_epochs": {"corpus": epochs}, **blocks}
    configs = []
    for stop in (5, 2, None):
        given = {"name": "run", "seed": 1, "precision": "fp32", "root": str(root), "stop_step": stop}
        tree = two_phase_config(
            "btlm", damaged, root, run=given, data=data, checkpoint={"every_steps": 4, "keep_last": 0},
            evaluate={"every_steps": 4, "tokens": held_out.tokens // 128 * 128},
        )  # fmt: skip
        configs.append(parse_dataclass(TrainConfig, tree, ""))
    configs.append(starved(root, corpus))
    assert ranks.run(run_all, 2, root, configs, damaged / second.file) == [[0] * 4] * 2
    return root / "run", damaged


def starved(root: Path, corpus: Path) -> TrainConfig:
    """Of a run whose corpus feeds one step, as long as nobody has found that its first shard in reading order is missing."""
    folder = root / "starved-corpus"
    shutil.copytree(corpus, folder)
    facts = manifest.load_manifest(folder)
    given = {"name": "starved", "seed": 1, "precision": "fp32", "root": str(root)}
    limit = {"max_epochs": {"corpus": 300 / facts.train.tokens}, "at_end": "stop"}
    data = {"damaged_shards": "skip", "shuffle_block_tokens": 0, **limit}
    tree = two_phase_config("btlm", folder, root, run=given, data=data, evaluate={"every_steps": 1, "tokens": 128})
    config: TrainConfig = parse_dataclass(TrainConfig, tree, "")
    stream = TokenStream(folder, facts, facts.train, source="corpus", seed=1)
    [(shard, _, count)] = stream.shard_ranges(0, 300)
    assert count == 300, "all that the run may read lies in the shard"
    (folder / facts.train.shards[shard].file).unlink()
    return config


@pytest.mark.dist
def test_a_run_leaves_damaged_shards_out_and_ends_after_the_last_step_that_can_be_fed(folders):
    folder, damaged = folders
    file = manifest.load_manifest(damaged).train.shards[0].file
    last = open_checkpoint(folder)
    assert last.manifest["skipped_shards"]["corpus"][0] == file
    assert sorted(read_step_records(folder)) == list(range(1, last.step + 1))
    assert last.step < 9, "what is left out cannot be read instead"
    reasons = ["run.stop_step 5", "run.stop_step 2", "data.max_epochs.corpus"]
    assert [record["reason"] for record in records_of(folder, "end")] == reasons


@pytest.mark.dist
def test_a_run_goes_on_over_damaged_held_out_shards_with_the_rows_that_are_left_and_with_none(folders):
    folder, damaged = folders
    shards = [shard.file for shard in manifest.load_manifest(damaged).validation.shards]
    assert [record["step"] for record in records_of(folder, "validation")] == [4, 5]
    assert 4 in [record["step"] for record in records_of(folder, "checkpoint")], "no validation costs a step"
    last = open_checkpoint(folder)
    assert last.step > 6
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    left_out = [(line["step"], line["shard"]) for line in lines if line["kind"] == "skip" and line["shard"] in shards]
    assert left_out == [(5, shards[0]), (last.step + 1, shards[1])]


@pytest.mark.dist
def test_a_run_that_cannot_feed_its_first_step_ends_and_says_why(folders):
    folder = folders[0].with_name("starved")
    [end] = records_of(folder, "end")
    assert (end["step"], end["reason"]) == (0, "data.max_epochs.corpus")
    assert records_of(folder, "step") == records_of(folder, "validation") == records_of(folder, "checkpoint") == []


@pytest.mark.dist
def test_what_is_left_out_is_on_record_once_and_taken_up_on_resume(folders):
    folder, damaged = folders
    file = manifest.load_manifest(damaged).train.shards[0].file
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    skips = [line for line in lines if line["kind"] == "skip" and line["shard"] == file]
    starts = [line for line in lines if line["kind"] == "start"]
    assert len(skips) == 1
    assert starts[0]["skipped_shards"] == {}
    assert [start["skipped_shards"]["corpus"][0] for start in starts[1:]] == [file] * 2


def records_of(folder: Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]
