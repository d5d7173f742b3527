"""wandb gets all curves of a run, and a run continues whatever happens to wandb."""

import json
import math
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb

from tandem.trainer.config import UserError
from tandem.trainer.metrics.history import read_history
from tandem.trainer.metrics.wandb_sink import WandbSink
from tests.timeouts import TEST_TIMEOUT_SECONDS
from tests.trainer.metrics.test_records import ROOT, demo_config, write_rollback


def run_with_wandb(folder: Path, port: int, **settings: str) -> subprocess.CompletedProcess[str]:
    """Start one run twice with log.wandb=auto, in a process without wandb settings other than `settings`."""
    script = (
        "import sys, time; from pathlib import Path; from tests.trainer.metrics.test_records import *\n"
        "config = demo_config('log.wandb=auto')\n"
        "write_run(Path(sys.argv[1]), to=6, config=config)\n"
        "time.sleep(1.1)  # wandb names its folders by the second\n"
        "write_run(Path(sys.argv[1]), resumed_step=4, config=config)\n"
    )
    nowhere = str(folder.parent / "none")
    home = {"HOME": str(folder.parent), "NETRC": nowhere, "WANDB_CONFIG_DIR": nowhere}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = clean | home | {"WANDB_BASE_URL": f"http://127.0.0.1:{port}"} | settings
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TEST_TIMEOUT_SECONDS
    )


def wandb_files(folder: Path) -> list[Path]:
    """Check that each start has a file with its curves, all with the same run id; return the files."""
    run_id = (folder / "wandb" / "run_id").read_text().strip()
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    for file, step in zip(files, (4, 12), strict=True):
        perplexity = str(math.exp(2.1 + 6.0 / step))[:12]
        assert perplexity.encode() in file.read_bytes(), "the curves are there"
    return files


@pytest.mark.parametrize(
    "settings", [{}, {"WANDB_API_KEY": "a" * 40, "WANDB_MODE": "offline"}], ids=["no key", "WANDB_MODE"]
)
def test_wandb_offline_is_one_run_without_network_calls(tmp_path: Path, settings: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = run_with_wandb(tmp_path / "run", server.getsockname()[1], **settings)
        assert done.returncode == 0, done.stderr
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    assert "wandb" not in done.stdout + done.stderr
    assert len(wandb_files(tmp_path / "run")) == 2


def test_a_wandb_server_that_is_down_stops_no_run(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again when the run starts, with no server on it
    done = run_with_wandb(tmp_path / "run", port, WANDB_API_KEY="a" * 40, WANDB_INIT_TIMEOUT="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("writing offline into the run folder instead") == 2
    assert len(wandb_files(tmp_path / "run")) == 2


def test_a_run_outlives_wandb(tmp_path: Path) -> None:
    """Its service is killed: the log has one line about it, the run ends normally, and metrics.jsonl has every step."""
    moments = ["between two steps", "finish", "teardown"]
    script = (
        "import sys; from pathlib import Path; import psutil, threading, wandb\n"
        "from tests.trainer.metrics.test_records import *\n"
        "end = wandb.teardown\n"
        "for moment in sys.argv[2:]:\n"
        "    print('moment:', moment, file=sys.stderr, flush=True)\n"
        "    sinks = open_sinks(Path(sys.argv[1], moment), demo_config('log.wandb=offline'), rank=0, start_step=0)\n"
        "    children = psutil.Process().children()\n"
        "    [service] = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]\n"
        "    sinks.write_start(tokens=0, world_size=4, tp_size=2, dp_size=2, **TOTAL, start_seconds={})\n"
        "    sinks.write_step(record(1))\n"
        "    if moment == 'between two steps': service.kill()\n"
        "    for step in range(2, 9): sinks.write_step(record(step))\n"
        "    if moment == 'finish': service.suspend(); threading.Timer(0.5, service.kill).start()\n"
        "    if moment == 'teardown': wandb.teardown = lambda: (service.kill(), end())\n"
        "    sinks.close()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), *moments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    logs = done.stderr.split("moment: ")[1:]
    for moment, log in zip(moments, logs, strict=True):
        assert log.count("wandb: failed") == 1, log
        assert [r["step"] for r in read_history(tmp_path / moment).steps] == list(range(1, 9))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a wandb file, by names of curves. Source: LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, at, message, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        message, at = message + content[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(message)
            items = record.history.item if record.HasField("history") else []
            rows += [{item.nested_key[0]: json.loads(item.value_json) for item in items}] if items else []
            message = b""
    return rows


def test_wandb_keeps_both_passes_of_a_step_in_one_curve_over_our_own_step(tmp_path: Path) -> None:
    write_rollback(tmp_path, demo_config("log.wandb=offline"))
    [file] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    rows = read_rows(file)
    assert [row["_step"] for row in rows] == list(range(len(rows))), "wandb drops rows unless its counter grows"
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert [step for step, _ in losses] == [*range(1, 11), *range(9, 13)]
    assert [loss for step, loss in losses if step == 9] == [9.0, 1.0], "the last one counts"
    assert [row["step"] for row in rows if row.get("train/skipped") == 1] == [3, 10]
    assert [(row["step"], row["train/rollback_from_step"]) for row in rows if "train/rollback_from_step" in row] == [
        (8, 10)
    ]
    assert [row["checkpoint/stall_seconds"] for row in rows if "checkpoint/stall_seconds" in row] == [0.125]


def test_a_wandb_that_cannot_begin_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**settings: object) -> None:
        raise RuntimeError("the service\nis gone")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(
        UserError, match=r"log.wandb: offline mode failed .the service is gone.; set log.wandb=disabled$"
    ):
        WandbSink(tmp_path, demo_config("log.wandb=offline"))
