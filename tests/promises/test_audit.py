"""The audit proves what the trainer read, over a kill, a restart from an older checkpoint, phases and changes of ranks."""

import json
import os
import shlex
import shutil
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.trainer import train
from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint import write
from tandem.trainer.config import TrainConfig, parse_dataclass
from tandem.trainer.data.ledger import LEDGER_FILE, Ledger
from tests import ranks
from tests.promises.conftest import two_phase_config, wait_for_exit
from tests.ranks import FORKSERVER

pytestmark = [pytest.mark.dist]
TORN = b'{"kind":"step","step":99,"read_ranges":{"corp'


def tree(corpus: Path, root: Path, **sections: dict) -> dict:
    return two_phase_config("btlm", corpus, root, checkpoint={"every_steps": 2, "keep_last": 0}, **sections)


def steps(folder: Path) -> list[int]:
    path = folder / LEDGER_FILE
    records = map(json.loads, path.read_text().splitlines()) if path.is_file() else []
    return [record["step"] for record in records if record["kind"] == "step"]


def go_on(trees: list[dict]) -> list[int]:
    """Run several configs one after the other on this world's ranks. Check that no checkpoint is ahead of a synced ledger."""
    synced, sync, commit, unsynced = {}, os.fsync, write.commit, []

    def watched_sync(handle: int) -> None:
        sync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    def watched_commit(folder: Path, tables: list[dict], facts: dict) -> None:
        ledger = folder.parents[1] / LEDGER_FILE
        with ledger.open("rb") as lines:
            told = sum(map(len, islice(lines, facts["num_ledger_lines"])))
        if not told or synced.get(ledger.stat().st_ino, 0) < told:
            unsynced.append(facts["step"])
        commit(folder, tables, facts)

    os.fsync, write.commit = watched_sync, watched_commit
    codes = [train.run(parse_dataclass(TrainConfig, each, "")) for each in trees]
    assert unsynced == []
    return codes


def run_to_step_7(config: Path) -> None:
    """Train in a fork, which is killed when step 7 is in the ledger."""
    write = Ledger.write_step

    def killed(ledger: Ledger, step: int, *read: Any) -> None:
        write(ledger, step, *read)
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    Ledger.write_step = killed  # type: ignore[method-assign]
    main(["train", str(config)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus) -> Path:
    """A run that was killed on one rank, left a torn line, and continued with dp 2 and then with tp 2."""
    root = tmp_path_factory.mktemp("audit")
    found = root / "runs" / "tiny"
    (root / "config.yaml").write_text(yaml.safe_dump(tree(corpus, root / "runs")))
    process = FORKSERVER.Process(target=run_to_step_7, args=(root / "config.yaml",))
    process.start()
    assert wait_for_exit(process) == -signal.SIGKILL
    with (found / LEDGER_FILE).open("ab") as file:
        file.write(TORN)
    shutil.rmtree(found / "checkpoints" / "step-00000006")  # before which the one of step 4 was committed
    assert main(["audit", str(found)]) == 0, "as the kill left it"
    replicas = tree(corpus, root / "runs", run={"stop_step": 9})
    halves = tree(corpus, root / "runs", parallel={"tp_size": 2})
    assert ranks.run(go_on, 2, root, [replicas, halves])[0] == [0, 0]
    return found


def test_nothing_was_lost_or_repeated(folder, capsys):
    assert main(["audit", str(folder), "--tokens", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["proven"]
    assert said["num_steps"] == 12
    assert said["tokens_checked"]
    assert said["sources"]["corpus"]["tokens"] == 12 * 256
    notes = "\n".join(said["notes"])
    assert "step 4: restart, dp 2; discards steps 5 to" in notes
    assert "step 9: restart, dp 1; dp was 2" in notes
    assert "step 7: phase long" in notes
    assert main(["audit", str(folder), "--step", "12"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[0].split(": ")[1])
    assert command[:2] == ["tandem", "inspect"]
    assert main(command[1:]) == 0, "what it prints can be pasted"


def test_a_row_that_the_trainer_was_not_fed_is_named(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    lines = (tmp_path / "run" / LEDGER_FILE).read_text().splitlines(keepends=True)
    place = max(place for place, line in enumerate(lines) if '"kind":"step","step":11,' in line)
    one = json.loads(lines[place])
    other = json.loads(lines[place + 1])
    lines[place] = json.dumps(one | {"ranges_digest": other["ranges_digest"]}) + "\n"
    (tmp_path / "run" / LEDGER_FILE).write_text("".join(lines))
    assert main(["audit", str(tmp_path / "run")]) == 1
    assert "step 11 did not read the ranges" in (said := capsys.readouterr().out), said


def test_no_torn_line_is_left(folder):
    assert TORN not in (folder / LEDGER_FILE).read_bytes()
    assert steps(folder)[-8:] == list(range(5, 13))
