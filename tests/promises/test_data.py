"""Damage and the end of the data in a whole run of two data-parallel ranks: agreed, on record, and never a rank that waits."""

import json
import shutil
from pathlib import Path

import pytest

from tests import ranks
from tests.promises.conftest import steps_of, two_phases
from trainer.checkpoint.read import opened
from trainer.config import RunConfig, section_from
from trainer.data import manifest
from trainer.train import run


def run_both(stopped: RunConfig, resumed: RunConfig) -> list[int]:
    return [run(stopped), run(resumed)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, corpus) -> tuple[Path, Path]:
    """The run's folder and its corpus, in which a training and a held-out shard are damaged; stopped once, and resumed."""
    root = tmp_path_factory.mktemp("data")
    damaged = root / "corpus"
    shutil.copytree(corpus, damaged)
    facts = manifest.load(damaged)
    (damaged / facts.train.shards[0].file).unlink()
    held_out = damaged / facts.validation.shards[0].file
    if len(facts.validation.shards) > 1:
        held_out.write_bytes(held_out.read_bytes()[:-512])
    # Tokens for nine of the twelve steps.
    epochs = 9.5 * 256 / facts.train.tokens
    data = {"damaged_shards": "skip", "at_end": "stop", "max_epochs": {"corpus": epochs}, "block_tokens": 64,
            "window_tokens": facts.train.tokens}  # fmt: skip
    configs = []
    for stop in (5, None):
        given = {"name": "run", "seed": 1, "precision": "fp32", "root": str(root), "stop_step": stop}
        tree = two_phases("btlm", damaged, root, run=given, data=data, checkpoint={"every_steps": 4, "keep": 0})
        configs.append(section_from(RunConfig, tree, ""))
    assert ranks.run(run_both, 2, root, *configs, timeout_seconds=90) == [[0, 0]] * 2
    return root / "run", damaged


@pytest.mark.dist
def test_a_run_leaves_damaged_shards_out_and_ends_after_the_last_step_that_can_be_fed(folders):
    folder, damaged = folders
    file = manifest.load(damaged).train.shards[0].file
    last = opened(folder)
    assert last.manifest["skipped"]["corpus"][0] == file
    assert sorted(steps_of(folder)) == list(range(1, last.step + 1))
    assert last.step < 9, "what is left out cannot be read instead"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["reason"] for record in records if record["kind"] == "end"] == ["run.stop_step 5", "data.max_epochs.corpus"]


@pytest.mark.dist
def test_what_is_left_out_is_on_record_once_and_taken_up_on_resume(folders):
    folder, damaged = folders
    file = manifest.load(damaged).train.shards[0].file
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    skips = [line for line in lines if line["kind"] == "skip" and line["shard"] == file]
    starts = [line for line in lines if line["kind"] == "start"]
    assert len(skips) == 1
    assert starts[0]["skipped"] == {}
    assert starts[1]["skipped"]["corpus"][0] == file
