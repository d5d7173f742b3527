"""Bad steps in whole runs: what is left out is left out on all ranks, on record, and as if it had never been.

The rows that are bad are so by their tokens: the weights that the run starts from have no number in the embedding of one token.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import yaml

from tandem.trainer import checkpointing
from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.layout import model_metadata
from tandem.trainer.checkpoint.read import open_checkpoint
from tandem.trainer.checkpoint.write import save_imported_weights
from tandem.trainer.config import TrainConfig, UserError, load_config
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.loader import Batch, Loader
from tandem.trainer.distributed.layers import sharding_of
from tandem.trainer.distributed.mesh import mesh_context
from tandem.trainer.metrics.history import read_history
from tandem.trainer.metrics.records import Sinks
from tandem.trainer.startup import build_engine
from tandem.trainer.train import forward_backward, run
from tests import ranks
from tests.promises.conftest import differing_tensors, read_step_records, two_phase_config, wait_for_exit
from tests.ranks import FORKSERVER
from tests.sharded import joined, save_checkpoint

PHASE_STEPS, STEPS = 20, 10
"""Of the first phase; of a run, which stops in it: a rollback may pass over the rows of the rest."""
INTERVAL = 3
"""Steps between checkpoints."""


BACK = {"guard": {"max_skips": 0}, "checkpoint": {"every_steps": INTERVAL, "keep_last": 0}}


@dataclass(frozen=True)
class Bad:
    """The rows of one step, in the order that a seed draws."""

    seed: int
    step: int
    """Counted from 1. Its update lies between two checkpoints."""
    token: int
    """It is read in that step and in no other."""


def config(folder: Path, corpus: Path, seed: int, name: str, **sections: dict) -> Path:
    run = {"init_from": str(folder / "weights"), "name": name, "seed": seed}
    sections["run"] = run | sections.pop("run", {})
    tree = two_phase_config("stablelm", corpus, folder / "runs", steps=PHASE_STEPS, **sections)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def batches(config: TrainConfig) -> list[Batch]:
    """The rows of every step of the first phase."""
    loader = Loader(
        config.data, config.schedule, seed=config.run.seed, vocab_size=config.model.vocab_size, dp_rank=0, dp_size=1
    )
    return list(islice(loader.batches(0, None), PHASE_STEPS))


def rare(folder: Path, corpus: Path) -> Bad:
    """Whatever the corpus is: text that differs from one Python to another. Of most seeds some step has such a token."""
    for seed in range(1, 21):
        clean = load_config(config(folder, corpus, seed, "clean", run={"init_from": None}))
        tokens = [set(batch.tokens.unique().tolist()) for batch in batches(clean)]
        for step in range(INTERVAL + 1, STEPS):
            own = tokens[step - 1] - set().union(*tokens[: step - 1], *tokens[step:])
            if own and step % INTERVAL == 2:
                return Bad(seed, step, min(own))
    raise AssertionError("no token is read in one step alone")


def write_weights(folder: Path, corpus: Path, bad: Bad) -> None:
    """The values that the seed draws, but that the token's embedding is no number, for all configs of the folder."""
    clean = load_config(config(folder, corpus, bad.seed, "clean", run={"init_from": None}))
    with mesh_context(1) as mesh:
        parameters = dict(build_engine(clean, mesh, None).model.named_parameters())
        tensors = {name: joined(sharding_of(each), [each.detach().clone()]) for name, each in parameters.items()}
    tensors["embedding.weight"][bad.token] = math.nan
    true = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    save_imported_weights(
        folder / "weights", tensors.__getitem__, true, metadata=model_metadata(clean.model, clean.mup)
    )


def by_hand(folder: Path, config: TrainConfig, fed: list[tuple[int, int]]) -> None:
    """A checkpoint of what comes of updating the initial weights: at the rate of the first number's step, on the rows of the
    second's, both counted from 1.
    """
    rows, timeline = batches(config), Timeline(config.schedule)
    with mesh_context(1) as mesh:
        engine = build_engine(config, mesh, None, open_checkpoint(Path(config.run.init_from)))
        for step, row in fed:
            forward_backward(engine, rows[row - 1], timeline.phase_span_at(step - 1).phase.micro_batch_size, mesh)
            engine.update(timeline.lr_at(step - 1))
        save_checkpoint(folder, fed[-1][0], engine, mesh, metadata=model_metadata(config.model, config.mup))


def lines(folder: Path, kind: str) -> list[dict]:
    found = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


@pytest.fixture(scope="module")
def bad(tmp_path_factory, corpus) -> Bad:
    return rare(tmp_path_factory.mktemp("rare"), corpus)


@pytest.fixture(scope="module")
def configured(tmp_path_factory, corpus, bad) -> Callable[..., Path]:
    """configured("skip", guard={...}): the path of a config whose weights meet the bad step."""
    folder = tmp_path_factory.mktemp("guard")
    write_weights(folder, corpus, bad)
    return partial(config, folder, corpus, bad.seed)


@pytest.fixture(scope="module")
def folder(configured, bad) -> Path:
    """With a run of one rank for each way to meet the bad step."""
    assert run(load_config(configured("skip", run={"stop_step": STEPS}))) == 0
    assert run(load_config(configured("last-good", run={"stop_step": bad.step - 1}))) == 0
    assert run(load_config(configured("at-bad", run={"stop_step": bad.step}))) == 0
    back = configured("back", run={"stop_step": STEPS}, **BACK)
    assert run(load_config(back)) == 0
    return back.parent


def test_a_bad_step_changes_nothing_but_the_place_in_the_data(folder, bad):
    at_bad, before = open_checkpoint(folder / "runs" / "at-bad"), open_checkpoint(folder / "runs" / "last-good")
    assert differing_tensors(at_bad, before) == []
    assert (at_bad.step, at_bad.manifest["num_updates"]) == (bad.step, bad.step - 1)
    assert at_bad.manifest["cursor"] != before.manifest["cursor"]


def test_a_skipped_step_is_on_record_everywhere(folder, bad, capsys):
    skip = folder / "runs" / "skip"
    steps = read_step_records(skip)
    assert [number for number, step in steps.items() if step["skipped"]] == [bad.step]
    assert steps[bad.step]["loss"] is None
    [line] = lines(skip, "bad")
    assert (line["step"], line["action"], line["loss"], line["reason"]) == (
        bad.step,
        "skip",
        None,
        "loss is not finite",
    )
    assert main(["audit", str(skip)]) == 0
    assert f"step {bad.step}: update skipped, loss is not finite" in capsys.readouterr().out


def test_the_run_is_the_one_without_the_bad_update(folder, bad, tmp_path):
    fed = [(step, step) for step in range(1, STEPS + 1) if step != bad.step]
    by_hand(tmp_path, load_config(folder / "skip.yaml"), fed)
    assert differing_tensors(open_checkpoint(tmp_path), open_checkpoint(folder / "runs" / "skip")) == []


def test_a_rollback_goes_on_from_the_checkpoint_behind_the_bad_rows(folder, bad, tmp_path, capsys):
    """It makes the steps behind the checkpoint of the rows behind the bad ones."""
    back = folder / "runs" / "back"
    history = read_history(back)
    assert [record["step"] for record in history.steps] == list(range(1, STEPS + 1))
    [rolled] = history.rollbacks
    assert (rolled["step"], rolled["from_step"], rolled["repeated_steps"]) == (bad.step - 2, bad.step, 2)
    [line] = lines(back, "bad")
    assert line["action"] == "rollback"
    by_hand(
        tmp_path,
        load_config(folder / "back.yaml"),
        [(step, step if step <= bad.step - 2 else step + 2) for step in range(1, STEPS + 1)],
    )
    assert differing_tensors(open_checkpoint(tmp_path), open_checkpoint(back)) == []
    assert main(["audit", str(back)]) == 0
    assert "passed over by rollbacks" in capsys.readouterr().out


def run_with_slow_reading(path: Path, seconds: float) -> None:
    """In a fork: a checkpoint takes so long to be read."""
    newest = checkpointing.open_newest

    def slow(*args: object) -> object:
        time.sleep(seconds)
        return newest(*args)

    checkpointing.open_newest = slow
    sys.exit(main(["train", str(path)]))


def test_a_checkpoint_that_takes_longer_to_read_than_a_step_may_is_no_hang(folder, configured):
    limit_seconds = 3.0
    more = {"run": {"stop_step": STEPS}, "watchdog": {"step_timeout_seconds": limit_seconds}, **BACK}
    process = FORKSERVER.Process(target=run_with_slow_reading, args=(configured("slow", **more), 3 * limit_seconds))
    process.start()
    assert wait_for_exit(process) == 0
    runs = folder / "runs" / "slow"
    assert [line["action"] for line in lines(runs, "bad")] == ["rollback"]
    assert not (runs / "hangs").exists()


def test_a_run_that_keeps_coming_back_stops_and_says_where(folder, bad, configured):
    path = configured("stop", **{**BACK, "guard": {"max_skips": 0, "max_rollbacks": 0}})
    with pytest.raises(
        UserError, match=rf"step {bad.step}: loss is not finite .*no more rollbacks to step {bad.step - 2} .so far: 0"
    ):
        run(load_config(path))
    assert open_checkpoint(folder / "runs" / "stop").step == bad.step - 2
    assert lines(folder / "runs" / "stop", "bad")[-1]["action"] == "stop"


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(folder, configured):
    with pytest.raises(UserError, match="the run has no checkpoint"):
        run(load_config(configured("none", guard={"max_skips": 0})))


def run_until_it_has_gone_back(path: Path) -> None:
    """In a fork: killed when the rollback is on record."""
    rollback = Sinks.write_rollback

    def killed(*said: object) -> None:
        rollback(*said)
        os.kill(os.getpid(), signal.SIGKILL)

    Sinks.write_rollback = killed  # type: ignore[method-assign]
    main(["train", str(path)])


def test_killed_after_a_rollback_the_run_does_not_read_the_bad_rows_again(folder, configured):
    path = configured("killed", run={"stop_step": STEPS}, **BACK)
    runs = folder / "runs" / "killed"
    process = FORKSERVER.Process(target=run_until_it_has_gone_back, args=(path,))
    process.start()
    assert wait_for_exit(process) == -signal.SIGKILL
    assert run(load_config(path)) == 0
    assert [line["is_rollback"] for line in lines(runs, "start")] == [False, True, False]
    assert len(lines(runs, "bad")) == 1
    assert differing_tensors(open_checkpoint(folder / "runs" / "back"), open_checkpoint(runs)) == []
    assert main(["audit", str(runs)]) == 0


@pytest.mark.dist
def test_ranks_decide_as_one(folder, configured, tmp_path):
    """tp 2 x dp 2: only one of the two replicas meets the bad row."""
    tp2 = load_config(configured("tp2", run={"stop_step": STEPS}, parallel={"tp_size": 2}, **BACK))
    assert ranks.run(run, 4, tmp_path, tp2) == [0] * 4
    one, other = read_step_records(folder / "runs" / "back"), read_step_records(folder / "runs" / "tp2")
    assert [other[step]["loss"] for step in range(1, STEPS + 1)] == pytest.approx(
        [one[step]["loss"] for step in range(1, STEPS + 1)], rel=1e-5
    )
    assert [line["action"] for line in lines(folder / "runs" / "tp2", "bad")] == ["rollback"]
    assert main(["audit", str(folder / "runs" / "tp2")]) == 0
