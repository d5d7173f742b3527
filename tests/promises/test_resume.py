"""A run that was stopped is the run that was not: bitwise at the same layout, to rounding at another."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from tandem.trainer.checkpoint.compatibility import check_past_phases
from tandem.trainer.checkpoint.read import Checkpoint, open_checkpoint, open_newest
from tandem.trainer.config import TrainConfig, UserError, parse_dataclass
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.ledger import LEDGER_FILE
from tandem.trainer.distributed.mesh import mesh_context
from tandem.trainer.metrics import history
from tandem.trainer.startup import build_engine
from tandem.trainer.train import run
from tests import ranks
from tests.promises.conftest import differing_tensors, read_step_records, two_phase_config
from tests.promises.test_parallel import EPSILON
from tests.sharded import save_checkpoint

STOPS = (4, 8, None)
"""In the first phase, in the second, at the end; the border between the phases is step 6."""
LAYOUTS = {"tp1_dp1": (1, 1), "tp1_dp2": (2, 1), "tp2_dp1": (2, 2), "tp4_dp1": (4, 4)}
"""Name -> ranks, tp_size."""
VARIANTS = {"btlm": "fp32", "stablelm": "bf16"}
"""Name -> precision: DeepSpeed has an optimizer of its own for each."""


def config(variant: str, corpus: Path, root: Path, tp_size: int, **sections: dict) -> TrainConfig:
    sections["parallel"] = {"tp_size": tp_size, "zero_stage": 1, "recompute": "none"} | sections.pop("parallel", {})
    tree = two_phase_config(variant, corpus, root, **sections)
    tree["optim"]["eps"] = EPSILON
    found: TrainConfig = parse_dataclass(TrainConfig, tree, "")
    return found


def run_all(configs: list[TrainConfig]) -> list[int]:
    """Runs, one after the other in one world; their exit codes."""
    return [run(config) for config in configs]


def reload_and_save(config: TrainConfig, source: Path, target: Path) -> float:
    """Saves what was loaded, without a step between; returns the weight decay that the optimizer ended up with."""
    with mesh_context(config.parallel.tp_size) as mesh:
        snapshot = open_checkpoint(source)
        engine = build_engine(config, mesh, snapshot)
        facts = {
            name: snapshot.manifest[name]
            for name in ("model", "mup", "cursor", "fingerprints", "shuffle_settings", "phases")
        }
        save_checkpoint(target, snapshot.step, engine, mesh, metadata=facts)
        return max(group["weight_decay"] for group in engine._optimizer.param_groups)


def fed(folder: Path) -> dict[int, dict]:
    """What the ledger says each step was fed, of the last start that made it."""
    lines = map(json.loads, (folder / LEDGER_FILE).read_text().splitlines())
    return {line["step"]: line for line in lines if line["kind"] == "step"}


@pytest.fixture(scope="module")
def root(tmp_path_factory, corpus) -> Path:
    """Run folders of one world of four ranks (tp 2 x dp 2): straight, and stopped twice, with prefetch."""
    folder = tmp_path_factory.mktemp("resume")
    configs = []
    for variant, precision in VARIANTS.items():
        run = {"seed": 1, "precision": precision, "root": str(folder)}
        configs.append(config(variant, corpus, folder, 2, run=run | {"name": f"{variant}-straight"}))
        for stop in STOPS:
            stopped = run | {"name": f"{variant}-stopped", "stop_step": stop}
            configs.append(config(variant, corpus, folder, 2, run=stopped))
    assert set(ranks.run(run_all, 4, folder, configs)[0]) == {0}
    return folder


@pytest.mark.dist
@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_resumed_is_never_stopped_bitwise(root, variant):
    straight, stopped = root / f"{variant}-straight", root / f"{variant}-stopped"
    one, other = read_step_records(straight), read_step_records(stopped)
    assert sorted(one) == sorted(other) == list(range(1, 13))
    for step, record in one.items():
        for field in ("loss", "grad_norm", "lr", "tokens", "seq_len"):
            assert other[step][field] == record[field], f"step {step} {field}"
    assert differing_tensors(open_checkpoint(straight), open_checkpoint(stopped)) == []
    assert fed(straight) == fed(stopped)


@pytest.mark.dist
@pytest.mark.parametrize(("layout", "world"), LAYOUTS.items())
def test_another_layout_continues_the_run_and_keeps_its_state_bitwise(root, corpus, layout, world, tmp_path):
    world_size, tp_size = world
    saved = root / "btlm-stopped" / "checkpoints" / "step-00000004"
    base = {"name": "moved", "seed": 1, "precision": "fp32", "root": str(tmp_path)}
    shutil.copytree(saved, tmp_path / "moved" / "checkpoints" / saved.name)
    moved = config("btlm", corpus, tmp_path, tp_size, run=base)
    changed = config("btlm", corpus, tmp_path, tp_size, run=base, optim={"weight_decay": 0.05} | OPTIM)
    facts = ranks.run(continue_and_reload, world_size, tmp_path, moved, changed, saved)[0]
    assert facts == {"exit_code": 0, "weight_decay": 0.05}, "the config wins over the checkpoint"
    assert differing_tensors(Checkpoint(saved), open_checkpoint(tmp_path / "reloaded")) == []
    one, other = read_step_records(root / "btlm-straight"), read_step_records(tmp_path / "moved")
    assert sorted(other) == list(range(5, 13))
    for step, record in other.items():
        assert record["loss"] == pytest.approx(one[step]["loss"], rel=1e-6), step
        assert record["grad_norm"] == pytest.approx(one[step]["grad_norm"], rel=1e-5), step
    straight = fed(root / "btlm-straight")
    assert fed(tmp_path / "moved") == {step: straight[step] for step in range(5, 13)}, "the rows, and their bytes"


OPTIM = {"beta1": 0.9, "beta2": 0.95, "eps": EPSILON, "max_grad_norm": 1.0}


def continue_and_reload(moved: TrainConfig, changed: TrainConfig, saved: Path) -> dict:
    target = saved_root(moved) / "reloaded"
    weight_decay = reload_and_save(changed, saved, target)
    return {"exit_code": run(moved), "weight_decay": weight_decay}


def saved_root(config: TrainConfig) -> Path:
    return Path(config.run.root)


@pytest.mark.parametrize(
    ("phase", "field", "value", "refused"),
    [
        (0, "tokens", 7 * 256, True),  # the border of the phases moves into the past
        (0, "global_batch_size", 4, True),
        (1, "seq_len", 64, True),
        (1, "tokens", 20 * 256, False),  # a longer future
        (1, "micro_batch_size", 2, False),
    ],
)
def test_the_past_of_a_schedule_is_fixed_and_its_future_free(root, corpus, phase, field, value, refused):
    snapshot = Checkpoint(root / "btlm-stopped" / "checkpoints" / "step-00000008")
    schedule = config("btlm", corpus, root, 1).schedule
    phases = list(schedule.phases)
    phases[phase] = dataclasses.replace(phases[phase], **{field: value})
    timeline = Timeline(dataclasses.replace(schedule, phases=phases, tokens_per_step=None))
    expected = (
        pytest.raises(UserError, match=rf"schedule.phases\[{phase}\].{field}") if refused else contextlib.nullcontext()
    )
    with expected:
        check_past_phases(timeline, snapshot)


def test_whoever_edits_the_mixture_of_the_phase_a_run_is_in_is_told_which_two_phases_to_write(root, corpus):
    snapshot = Checkpoint(root / "btlm-stopped" / "checkpoints" / "step-00000008")
    schedule = config("btlm", corpus, root, 1).schedule
    short, long = schedule.phases
    edited = dataclasses.replace(long, mixture={"corpus": 0.5, "other": 0.5})
    message = r"schedule.phases\[1\].mixture: .* two phases, 'long' as before but with tokens: 512, "
    with pytest.raises(UserError, match=message) as said:
        check_past_phases(Timeline(dataclasses.replace(schedule, phases=[short, edited])), snapshot)
    assert str(said.value).endswith("a phase with another name and tokens: 1024")
    assert "\n" not in str(said.value)
    two = [dataclasses.replace(long, tokens=512), dataclasses.replace(edited, name="edited", tokens=1024)]
    followed = Timeline(dataclasses.replace(schedule, phases=[short, *two]))
    check_past_phases(followed, snapshot)
    assert followed.total_steps == 12


def test_a_torn_or_damaged_checkpoint_is_passed_over_with_its_name(root, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    shutil.copytree(root / "btlm-stopped" / "checkpoints", folder)
    names = [path.name for path in sorted(folder.iterdir())]
    assert names == ["step-00000004", "step-00000008", "step-00000012"]
    (folder / names[2] / "COMMITTED").unlink()
    file = next((folder / names[1]).glob("rank-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = open_newest(folder)
    assert found is not None
    assert found.step == 4
    assert f"{names[1]} is damaged ({file.name} has changed" in caplog.text
    with pytest.raises(UserError, match="has changed"):
        open_checkpoint(folder / names[1])


def test_a_validation_that_a_signal_cut_short_is_made_by_the_next_start(corpus, tmp_path):
    given = [
        config("btlm", corpus, tmp_path, 1, run={"name": "cut", "stop_step": stop}, evaluate={"every_steps": 4, "tokens": 512})
        for stop in (4, 6)
    ]  # fmt: skip
    assert run(given[0]) == 0
    record = tmp_path / "cut" / "metrics.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(line for line in lines if '"kind": "validation"' not in line))
    assert run(given[1]) == 0
    made = {each["step"]: each["loss"] for each in history.read_history(tmp_path / "cut").validations}
    assert sorted(made) == [4, 6]
    [whole] = [json.loads(line)["loss"] for line in lines if '"kind": "validation"' in line]
    assert made[4] == whole


def test_a_resume_lists_what_differs_and_says_that_an_extension_heats_the_run_again(corpus, tmp_path, capfd) -> None:
    run_section = {"seed": 1, "precision": "fp32", "root": str(tmp_path), "name": "extended"}
    before = config("btlm", corpus, tmp_path, 1, run=run_section | {"stop_step": 8})
    phases = before.schedule.phases
    longer = dataclasses.replace(phases[1], tokens=2 * phases[1].tokens)
    after = dataclasses.replace(
        before,
        run=dataclasses.replace(before.run, stop_step=9),
        schedule=dataclasses.replace(before.schedule, phases=[phases[0], longer]),
        optim=dataclasses.replace(before.optim, weight_decay=0.25),
    )
    old, new = Timeline(before.schedule), Timeline(after.schedule)
    lines = (
        "run.stop_step: 8 -> 9",
        f"schedule.phases[1].tokens: {phases[1].tokens} -> {longer.tokens}",
        f"optim.weight_decay: {before.optim.weight_decay} -> 0.25",
        f"schedule.lr: at step 9 the learning rate changes from {old.lr_at(7):.3g} to {new.lr_at(8):.3g}, because the decay",
    )
    assert run(before) == 0
    assert " -> " not in capfd.readouterr().err
    assert run(after) == 0
    shown = capfd.readouterr().err
    assert [line for line in lines if line not in shown] == [], shown
    assert run(dataclasses.replace(after, run=dataclasses.replace(after.run, stop_step=10))) == 0
    shown = capfd.readouterr().err
    assert "run.stop_step: 9 -> 10" in shown
    assert "schedule.lr" not in shown
