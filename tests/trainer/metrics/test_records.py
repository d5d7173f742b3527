"""Records of a run survive kills and resumes, and are read back as one history."""

import contextlib
import io
import json
import math
import os
import pty
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rich.console

from tandem.trainer import config as configuration
from tandem.trainer.config import TrainConfig, UserError
from tandem.trainer.config.numbers import format_duration
from tandem.trainer.metrics.console import ConsoleSink
from tandem.trainer.metrics.history import has_validation, read_history
from tandem.trainer.metrics.records import METRICS_FILE, StepRecord, open_sinks
from tandem.trainer.metrics.throughput import throughput

ROOT = Path(__file__).resolve().parents[3]
TOTAL = {"total_steps": 12, "total_tokens": 12 * 2048}
START = {
    "kind": "start", "step": 0, "tokens": 0, "world_size": 1, "tp_size": 1, "dp_size": 1, "start_seconds": {}, **TOTAL,
}  # fmt: skip


def demo_config(*overrides: str) -> TrainConfig:
    return configuration.load_config(ROOT / "configs" / "demo-btlm.yaml", ["log.wandb=disabled", *overrides])


def record(step: int, **fields: object) -> StepRecord:
    """A plausible step of a run whose second phase, from step 9, has longer rows."""
    phase, seq_len, rows = ("short", 128, 16) if step <= 8 else ("long", 512, 4)
    values = {
        "step": step, "tokens": step * 2048, "phase": phase, "seq_len": seq_len, "global_batch_size": rows,
        "loss": 2.0 + 6.0 / step, "lr": 1e-3 * min(1.0, step / 4), "grad_norm": 0.5 + 3.0 / step,
        "step_seconds": 0.5, "data_seconds": 0.01, "tokens_per_second": 4096.0, "mfu": 0.41,
        "mfu_causal": 0.37, "memory_gib": None, "time": 1.7e9 + step / 2,
    }  # fmt: skip
    return StepRecord(**(values | fields))


def write_run(
    folder: Path,
    *,
    resumed_step: int = 0,
    to: int = 12,
    end: bool = True,
    config: TrainConfig | None = None,
    **fields: object,
) -> None:
    """Write one start as the training loop does, with validation and checkpoint every fourth step; `end=False` is a kill."""
    config = config or demo_config()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(configuration.dump_config(config))
    sinks = open_sinks(folder, config, rank=0, start_step=resumed_step)
    parts = {"imports": 5.25, "process group": 0.3}
    sinks.write_start(tokens=resumed_step * 2048, world_size=4, tp_size=2, dp_size=2, **TOTAL, start_seconds=parts)
    for step in range(resumed_step + 1, to + 1):
        sinks.write_step(record(step, **fields))
        if step % 4 == 0:
            sinks.write_validation(step, step * 2048, 2.1 + 6.0 / step)
            sinks.write_checkpoint(step, 0.25, 1_500_000, stall_seconds=0.125)
    if end:
        sinks.write_end(to, "schedule finished")
    sinks.close()


def lines(folder: Path) -> list[str]:
    return (folder / METRICS_FILE).read_text().splitlines()


def test_a_steps_record_comes_back_as_written(tmp_path: Path) -> None:
    write_run(tmp_path)
    history = read_history(tmp_path)
    written = {"kind": "step", **{name: getattr(record(5), name) for name in StepRecord.__annotations__}}
    assert history.steps[4] == written
    assert [r["step"] for r in history.steps] == list(range(1, 13))
    assert [r["step"] for r in history.checkpoints] == [4, 8, 12]
    assert history.validations[0]["perplexity"] == math.exp(history.validations[0]["loss"])
    assert history.end_record["reason"] == "schedule finished"
    assert history.restarts == []


def test_a_restart_undoes_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    """Also the steps that the new start has not reached yet, and their validations and checkpoints."""
    write_run(tmp_path, to=11, end=False, loss=9.0)
    write_run(tmp_path, resumed_step=4, to=6, end=False, loss=1.0)
    history = read_history(tmp_path)
    losses = {r["step"]: r["loss"] for r in history.steps}
    assert losses == {1: 9.0, 2: 9.0, 3: 9.0, 4: 9.0, 5: 1.0, 6: 1.0}
    assert [r["step"] for r in history.checkpoints] == [4]
    assert [r["step"] for r in history.validations] == [4]
    assert [(r["step"], r["tokens"], r["repeated_steps"]) for r in history.restarts] == [(4, 4 * 2048, 7)]
    assert history.end_record is None


def write_rollback(folder: Path, config: TrainConfig | None = None) -> None:
    """Write steps 1 to 10, of which 3 and 10 are bad, a rollback from 10 to 8, and steps 9 to 12. Step 8's checkpoint is
    committed after step 9.
    """
    config = config or demo_config()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(configuration.dump_config(config))
    sinks = open_sinks(folder, config, rank=0, start_step=0)
    sinks.write_start(
        tokens=0, world_size=4, tp_size=2, dp_size=2, **TOTAL, start_seconds={"imports": 5.25, "kernels": 3.5}
    )
    for step in range(1, 11):
        sinks.write_step(record(step, loss=math.nan if step == 10 else 9.0, skipped=step in (3, 10)))
        if step == 9:
            sinks.write_checkpoint(8, 1.25, 1_500_000, stall_seconds=0.125)
    sinks.write_rollback(8, 10, "loss nan")
    for step in range(9, 13):
        sinks.write_step(record(step, loss=1.0))
    sinks.write_end(12, "finished")
    sinks.close()


def test_a_rollback_undoes_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    write_rollback(tmp_path)
    history = read_history(tmp_path)
    assert [r["step"] for r in history.steps] == list(range(1, 13))
    assert {r["step"]: r["loss"] for r in history.steps} == {n: 9.0 if n <= 8 else 1.0 for n in range(1, 13)}
    assert [r["step"] for r in history.skipped_steps] == [3], "step 10 was repeated successfully"
    [back] = history.rollbacks
    assert [back[name] for name in ("step", "from_step", "reason", "tokens", "repeated_steps")] == [
        8, 10, "loss nan", 8 * 2048, 2,
    ]  # fmt: skip
    assert [(r["step"], r["seconds"], r["stall_seconds"]) for r in history.checkpoints] == [(8, 1.25, 0.125)]
    assert history.starts[0]["start_seconds"] == {"imports": 5.25, "kernels": 3.5}
    assert history.end_record["reason"] == "finished"


def test_a_rollback_to_where_its_process_began_has_the_tokens_of_that_start(tmp_path: Path) -> None:
    """The rollback goes to the checkpoint that the process resumed from, whose step it has not run itself."""
    sinks = open_sinks(tmp_path, demo_config(), rank=0, start_step=4)
    sinks.write_start(tokens=4 * 2048, world_size=1, tp_size=1, dp_size=1, **TOTAL)
    sinks.write_step(record(5))
    sinks.write_rollback(4, 5, "loss nan")
    sinks.close()
    assert read_history(tmp_path).rollbacks[0]["tokens"] == 4 * 2048
    assert read_history(tmp_path).steps == []


def test_a_validation_counts_until_the_run_goes_back_before_its_step(tmp_path: Path) -> None:
    """Otherwise a start from the checkpoint of that step would skip the validation."""
    write_run(tmp_path, to=8, end=False)
    assert [has_validation(tmp_path, step) for step in (3, 4, 8)] == [False, True, True]
    write_run(tmp_path, resumed_step=4, to=6, end=False)
    assert [has_validation(tmp_path, step) for step in (4, 8)] == [True, False]
    write_rollback(tmp_path / "back")
    sinks = open_sinks(tmp_path / "back", demo_config(), rank=0, start_step=12)
    sinks.write_validation(8, 8 * 2048, 3.0)
    sinks.write_validation(12, 12 * 2048, 2.0)
    sinks.write_rollback(8, 12, "loss nan")
    sinks.close()
    assert [has_validation(tmp_path / "back", step) for step in (8, 12)] == [True, False]
    assert not has_validation(tmp_path / "none", 0)


def test_records_of_runs_without_a_guard_are_read(tmp_path: Path) -> None:
    write_run(tmp_path, to=4)
    records = [json.loads(line) for line in lines(tmp_path)]
    new = ("start_seconds", "skipped", "stall_seconds")
    old = [{name: value for name, value in record.items() if name not in new} for record in records]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in old))
    history = read_history(tmp_path)
    assert (history.skipped_steps, history.rollbacks, history.starts[0]["start_seconds"]) == ([], [], {})
    assert history.checkpoints[0]["stall_seconds"] is None


def test_an_end_before_a_resume_is_not_the_end(tmp_path: Path) -> None:
    write_run(tmp_path, to=4)
    write_run(tmp_path, resumed_step=4, to=6, end=False)
    assert read_history(tmp_path).end_record is None


@pytest.mark.parametrize("lost_bytes", [1, 2, 40])
def test_a_torn_last_line_costs_only_itself(tmp_path: Path, lost_bytes: int) -> None:
    write_run(tmp_path, to=6, end=False)
    path = tmp_path / METRICS_FILE
    os.truncate(path, path.stat().st_size - lost_bytes)
    kept = 6 if lost_bytes == 1 else 5  # only the newline was lost
    assert len(read_history(tmp_path).steps) == kept
    write_run(tmp_path, resumed_step=4)
    assert [r["step"] for r in read_history(tmp_path).steps] == list(range(1, 13))
    assert read_history(tmp_path).restarts[0]["repeated_steps"] == kept - 4


def test_a_record_that_only_a_part_of_has_room_ends_the_run_in_one_line(tmp_path: Path) -> None:
    """Otherwise the next record, once there is room again, would continue its line, and both would be lost."""
    sinks = open_sinks(tmp_path, demo_config(), rank=0, start_step=0)
    sinks.write_step(record(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / METRICS_FILE).stat().st_size + 40, limits[1]))
    try:
        with pytest.raises(
            UserError, match=rf"{METRICS_FILE}: a record cannot be written .No space left on device.; free disk space"
        ):
            sinks.write_step(record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sinks.close()
    write_run(tmp_path, resumed_step=1)
    assert [r["step"] for r in read_history(tmp_path).steps] == list(range(1, 13))


def test_a_kill_leaves_every_finished_step_on_disk(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.trainer.metrics.test_records import *\n"
        "sinks = open_sinks(Path(sys.argv[1]), demo_config(), rank=0, start_step=0)\n"
        "sinks.write_start(tokens=0, world_size=1, tp_size=1, dp_size=1, **TOTAL)\n"
        "for step in (1, 2, 3): sinks.write_step(record(step)); print(step, flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert [int(process.stdout.readline()) for _ in range(3)] == [1, 2, 3]
        process.send_signal(signal.SIGKILL)
    assert [r["step"] for r in read_history(tmp_path).steps] == [1, 2, 3]


def test_each_line_is_json_also_when_numbers_are_not_finite(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    write_run(tmp_path, to=4, loss=math.nan, grad_norm=math.inf)
    assert [json.loads(line, parse_constant=refuse)["kind"] for line in lines(tmp_path)][:2] == [
        "start",
        "step",
    ]
    assert read_history(tmp_path).steps[0]["loss"] is None
    assert read_history(tmp_path).steps[0]["grad_norm"] is None


def test_other_ranks_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sinks = open_sinks(tmp_path / "run", demo_config("log.wandb=online"), rank=1, start_step=0)
    sinks.write_start(tokens=0, world_size=4, tp_size=2, dp_size=2, **TOTAL)
    sinks.write_step(record(1))
    sinks.write_validation(1, 2048, 3.0)
    sinks.write_checkpoint(1, 0.1, 10)
    sinks.write_rollback(0, 1, "loss nan")
    sinks.write_end(1, "schedule finished")
    sinks.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_reading_a_folder_without_a_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder; name the folder of a run"):
        read_history(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        read_history(tmp_path)
    (tmp_path / METRICS_FILE).write_text('{"kind": "sta')
    with pytest.raises(UserError, match="has no start record"):
        read_history(tmp_path)


def test_throughput_counts_tokens_and_flops() -> None:
    """1,000 tokens in 2 s at 6 and 4 FLOPs each, on two devices of 10,000 FLOP/s."""
    speed = throughput(1000, 2.0, flops_per_token=6.0, causal_flops_per_token=4.0, num_devices=2, peak_flops=10_000.0)
    assert speed == (500.0, 0.15, 0.1)


def test_a_pipe_gets_a_line_per_interval_and_event(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, to=11, config=demo_config("log.every_steps=5"))
    printed = capfd.readouterr().err.splitlines()
    assert [line.split()[3] for line in printed if "| step" in line] == [
        "1/12",
        "5/12",
        "9/12",
        "10/12",
        "11/12",
    ]
    assert sum(line.startswith("validation at step") for line in printed) == 2
    assert sum(line.startswith("checkpoint at step") for line in printed) == 2
    assert [line for line in printed if line.startswith("phase")] == [
        "phase short: 16 rows of 128 tokens a step", "phase long: 4 rows of 512 tokens a step",
    ]  # fmt: skip
    assert "\x1b" not in "".join(printed)
    write_run(tmp_path, resumed_step=8, end=False, config=demo_config("log.every_steps=5"))
    assert [line for line in capfd.readouterr().err.splitlines() if "| step 12/12 |" in line]


def test_a_pipe_gets_a_line_for_each_skipped_step_each_rollback_and_the_parts_of_the_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_rollback(tmp_path, demo_config("log.every_steps=100"))
    printed = capfd.readouterr().err.splitlines()
    assert printed[0].startswith("start at step 0 of 12")
    assert printed[1] == "ready after 8.8 s: imports 5.2, kernels 3.5"
    steps = [line.split(" | ")[1] for line in printed if "| step" in line]
    assert steps == ["step 1/12", "step 3/12 skipped", "step 9/12", "step 10/12 skipped", "step 12/12"]
    assert "rollback to step 8 from step 10: loss nan" in printed
    assert "checkpoint at step 8: 1.43 MiB in 1.2 s, training waited 0.1 s" in printed


def test_the_last_step_is_shown_although_it_was_shown_before_a_rollback(capfd: pytest.CaptureFixture[str]) -> None:
    sink = ConsoleSink(100)
    sink.write(START)
    sink.write({"kind": "step", **vars(record(1, skipped=True))})
    sink.write({"kind": "rollback", "step": 0, "from_step": 1, "reason": "loss nan"})
    sink.write({"kind": "step", **vars(record(1))})
    sink.write({"kind": "end", "step": 1, "reason": "stopped"})
    *_, shown, end = capfd.readouterr().err.splitlines()
    assert "| step 1/12 |" in shown
    assert end == "end at step 1: stopped"


def test_time_left_is_the_tokens_left_at_the_pace_of_the_clock() -> None:
    screen = rich.console.Console(file=io.StringIO())
    sink = ConsoleSink(1, screen)
    sink.write(START)
    for step in (1, 2, 3):  # 2,048 tokens every 100 s by the clock, whatever tokens_per_second is
        sink.write({"kind": "step", **vars(record(step, time=100.0 * step, tokens_per_second=1e9))})
    assert f"eta {format_duration(900)}" in screen.file.getvalue().splitlines()[-1]


def read_terminal(terminal: int) -> str:
    """Read everything from the terminal, whose other end is closed; one read returns only part of it."""
    text = b""
    with open(terminal, "rb", buffering=0) as end, contextlib.suppress(OSError):  # Linux ends a terminal with EIO
        while part := end.read(1 << 16):
            text += part
    return text.decode()


def test_a_terminal_gets_a_live_bar() -> None:
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        screen = rich.console.Console(file=terminal, width=140, _environ={"TERM": "xterm"})
        sink = ConsoleSink(5, screen)
        sink.write(START)
        for step in (1, 2):
            sink.write({"kind": "step", **vars(record(step))})
        sink.close()
    shown = read_terminal(ours)
    assert "\x1b[" in shown
    assert "step 2/12" in shown
    assert "mfu 41.0%" in shown


def test_a_live_bar_goes_back_with_the_run_and_a_skipped_step_is_a_line_above_it() -> None:
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        screen = rich.console.Console(file=terminal, width=140, _environ={"TERM": "xterm"})
        sink = ConsoleSink(5, screen)
        sink.write(START)
        for step in (1, 2, 3, 4):
            sink.write({"kind": "step", **vars(record(step, skipped=step == 4))})
            if step == 3:
                sink.write({"kind": "checkpoint", "step": 2, "seconds": 1.0, "stall_seconds": 0.1, "bytes": 10})
        assert sink._progress_bar.tasks[0].completed == 4 * 2048
        sink.write({"kind": "rollback", "step": 2, "from_step": 4, "reason": "loss nan"})
        assert sink._progress_bar.tasks[0].completed == 2 * 2048
        sink.write({"kind": "step", **vars(record(3))})
        assert sink._progress_bar.tasks[0].completed == 3 * 2048
        sink.close()
    shown = read_terminal(ours)
    assert "step 4/12 skipped |" in shown
    assert "rollback to step 2 from step 4: loss nan" in shown


def test_records_of_a_version_with_other_names_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path)
    file = tmp_path / METRICS_FILE
    file.write_text(file.read_text().replace('"grad_norm"', '"gradient_norm"'))
    with pytest.raises(
        UserError, match=r"metrics.jsonl: was written by a version with other field names; read it with"
    ):
        read_history(tmp_path)
