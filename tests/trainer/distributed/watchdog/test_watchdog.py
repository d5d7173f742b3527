"""Runs that do not move are ended, with the right rank named; runs that do move are left alone."""

import dataclasses
import json
import os
import pickle
import re
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from jaxtyping import config

import tandem.trainer.distributed.watchdog as watchdogs
from tandem.trainer.config import Watchdog as Settings
from tandem.trainer.distributed.mesh import collectives, flight_record, shared_store
from tandem.trainer.distributed.watchdog import (
    FOLDER,
    Place,
    Report,
    Watchdog,
    connection_lost,
    here,
    newest_verdict,
    verdict,
)
from tandem.trainer.distributed.watchdog import report as reporting
from tandem.trainer.distributed.watchdog.report import state
from tandem.trainer.runtime import REQUEUE_EXIT_CODE
from tests import ranks

BROKEN_STEP = 3
LIMIT_SECONDS = 3.0


def train(folder, break_as, steps=5, start_seconds=20.0, data_seconds=0.0, sleep_seconds=0.0):
    """A loop in the trainer's phases, of which rank 1 makes something else in BROKEN_STEP."""
    rank, second = dist.get_rank(), dist.new_group()
    places = [None] * dist.get_world_size()
    dist.all_gather_object(places, here())
    settings = Settings(step_seconds=LIMIT_SECONDS, start_seconds=start_seconds)
    watchdogs.ANSWER_SECONDS = 3.0  # so that a rank which does not answer in time is soon seen to be taken for dead
    with Watchdog(
        settings, folder, places, rank, collectives, flight_record=flight_record, data_seconds=data_seconds
    ) as watchdog:
        for step in range(1, steps + 1):
            broken = break_as if rank == 1 and step == BROKEN_STEP else ""
            watchdog.at("data", step)
            if broken == "data":
                time.sleep(sleep_seconds)
            if not break_as:
                time.sleep(LIMIT_SECONDS / 3)
            watchdog.at("forward and backward", step)
            if broken == "loop":
                while True:
                    pass
            if broken == "crash":
                raise ValueError("row 7\nis not a row")
            if broken in ("STOP", "KILL"):
                os.kill(os.getpid(), getattr(signal, f"SIG{broken}"))
            dist.all_reduce(torch.ones(2))
            watchdog.at("update", step)
            if broken != "skip":
                dist.all_reduce(torch.ones(2), group=second)
            watchdog.finished(0.01)
    return watchdog._limit


def save(folder):
    """Rank 0 waits in the store for rank 1's file, which never comes: that one is killed."""
    rank, store = dist.get_rank(), shared_store("test")
    places = [None] * dist.get_world_size()
    dist.all_gather_object(places, here())
    watchdogs.GONE_SECONDS = LIMIT_SECONDS
    with Watchdog(Settings(), folder, places, rank, collectives) as watchdog:
        watchdog.finished(0.01)
        watchdog.at("save", BROKEN_STEP)
        watchdog.patient()
        if rank == 1:
            time.sleep(2 * LIMIT_SECONDS)
            os.kill(os.getpid(), signal.SIGKILL)
        with watchdog.in_store():
            store.get("file")


def failed(break_as, folder, **how) -> tuple[str, str, str]:
    """Of a world that the watchdog has ended: how its ranks ended, the verdict, the name of its step's folder."""
    with pytest.raises(AssertionError) as failure:
        ranks.run(train, 3, folder, folder, break_as, *how.values())
    [file] = (folder / FOLDER).glob("step-*/verdict.txt")
    return str(failure.value), file.read_text(), file.parent.name


def ended_with_code(words: str, rank: int) -> bool:
    return f"rank {rank} gave no result (exit code {REQUEUE_EXIT_CODE}" in words


def test_a_rank_that_waits_for_its_data_is_named(tmp_path):
    words, said, folder = failed("data", tmp_path, steps=5, start=20.0, data=0.0, sleep=60.0)
    assert all(ended_with_code(words, rank) for rank in range(3))
    assert folder == "step-00000003"
    assert said.startswith(
        f"step 3: no progress for {LIMIT_SECONDS:g} s: rank 1 on {here().host} is still in data, while"
    )
    assert "the others wait in all_reduce" in said
    assert "time.sleep(sleep_seconds)" in (tmp_path / FOLDER / folder / "rank-00001.txt").read_text()
    report = json.loads((tmp_path / FOLDER / folder / "rank-00000.json").read_text())
    assert (report["phase"], report["collective"]) == ("forward and backward", "all_reduce")


def test_what_torch_has_recorded_of_collectives_is_left_too(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "50")
    _, _, step = failed("data", tmp_path, steps=5, start=20.0, data=0.0, sleep=60.0)
    files = sorted(path.name for path in (tmp_path / FOLDER / step).glob("flight-*"))
    assert files == ["flight-0", "flight-1", "flight-2"]
    # What torchfrtrace reads; on gloo the tool of torch 2.13 itself stumbles over a group without a name.
    entries = pickle.loads((tmp_path / FOLDER / step / "flight-0").read_bytes())["entries"]
    assert {entry["profiling_name"] for entry in entries} >= {"gloo:all_reduce"}


def test_a_rank_whose_store_is_slow_is_waited_for(tmp_path):
    """Longer than the others' limit, and they are told so."""
    began = time.monotonic()
    ranks.run(train, 3, tmp_path, tmp_path, "data", 5, 20.0, 30.0, 3 * LIMIT_SECONDS)
    assert time.monotonic() - began > 3 * LIMIT_SECONDS
    assert not (tmp_path / FOLDER).exists()


def test_a_frozen_rank_is_named_and_killed(tmp_path):
    words, said, step = failed("STOP", tmp_path)
    since_verdict = time.time() - (tmp_path / FOLDER / step / "verdict.txt").stat().st_mtime
    assert since_verdict < ranks.GRACE_SECONDS, "killed by the test, not by the other ranks"
    assert f"rank 1 on {here().host} is silent: stopped by a signal, while the others wait in all_reduce" in said
    assert f"rank 1 gave no result (exit code {-signal.SIGKILL}" in words
    assert ended_with_code(words, 0)
    assert ended_with_code(words, 2)


def test_a_killed_rank_is_named_by_those_whose_connection_broke(tmp_path):
    words, said, _ = failed("KILL", tmp_path)
    assert said.startswith(
        f"step 3: a connection was lost: rank 1 on {here().host} is gone: killed, or ended without a word"
    )
    assert words.count(f"SystemExit: {REQUEUE_EXIT_CODE}") == 2


def test_a_rank_that_waits_in_the_store_for_a_killed_one_is_ended_without_patience(tmp_path):
    with pytest.raises(AssertionError) as failure:
        ranks.run(save, 2, tmp_path, tmp_path)
    assert ended_with_code(str(failure.value), 0)
    said = newest_verdict(tmp_path, 0.0)
    seconds, who = re.fullmatch(r"step 3: no progress for ([\d.]+) s: (.*)\n?", said, re.DOTALL).groups()
    assert who.startswith(f"rank 1 on {here().host} is gone: killed, or ended without a word")
    assert 3 * LIMIT_SECONDS <= float(seconds) < 20, "from when it was seen, and the whole of it is said"


def test_a_rank_in_an_endless_loop_is_named_with_its_line(tmp_path):
    words, said, _ = failed("loop", tmp_path)
    assert f"rank 1 on {here().host} is in no collective (forward and backward, {Path(__file__).name}:" in said
    assert f"in {train.__name__}), while the others wait in all_reduce" in said
    assert all(ended_with_code(words, rank) for rank in range(3))


def test_a_rank_that_left_a_collective_out_is_named(tmp_path):
    _, said, _ = failed("skip", tmp_path)
    assert f"rank 1 on {here().host} is in forward and backward and left out a collective" in said


def test_a_rank_that_crashed_keeps_its_error_and_is_named_by_the_others(tmp_path):
    words, said, _ = failed("crash", tmp_path)
    assert f"rank 1 on {here().host} crashed with ValueError: row 7 is not a row" in said
    assert "ValueError: row 7\nis not a row" in words
    assert words.count(f"SystemExit: {REQUEUE_EXIT_CODE}") == 2


def test_a_healthy_run_is_left_alone_and_leaves_nothing(tmp_path):
    """It takes longer than the limit, and no step does."""
    assert ranks.run(train, 3, tmp_path, tmp_path, "") == [LIMIT_SECONDS] * 3
    assert not (tmp_path / FOLDER).exists()


def freeze(folder):
    """Stopped for longer than its limit, from outside, a rank by itself goes on afterwards."""
    if not (child := os.fork()):
        time.sleep(0.5)
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(6.5)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    with Watchdog(Settings(start_seconds=3.0), folder, [here()], 0, collectives) as watchdog:
        watchdog.at("data", 1)
        os.waitpid(child, 0)
        time.sleep(0.5)
        assert watchdog._waited < 2
    return True


def test_time_in_which_this_process_was_stopped_does_not_count(tmp_path):
    assert ranks.run(freeze, 1, tmp_path, tmp_path) == [True]


def alone(folder):
    with Watchdog(Settings(start_seconds=1.0), folder, [here()], 0, collectives) as watchdog:
        watchdog.at("forward and backward", 1)
        time.sleep(30)


def test_a_start_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(AssertionError, match=f"exit code {REQUEUE_EXIT_CODE}"):
        ranks.run(alone, 1, tmp_path, tmp_path)
    said = newest_verdict(tmp_path, since=0.0)
    assert (
        f"step 1: no progress for 1 s: rank 0 on {here().host} stays in forward and backward, {Path(__file__).name}:"
        in said
    )
    assert newest_verdict(tmp_path, since=time.time() + 60) is None


def blocked(folder):
    """A report that cannot be read stands for a file system that has stopped; seconds until the end are what is tested."""
    watchdogs.DEADLINE_SECONDS = 2.0
    file = reporting.file_of(folder / FOLDER, 1, 1)
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    alone(folder)


def test_the_process_ends_even_where_the_file_system_hangs(tmp_path):
    with pytest.raises(AssertionError, match=f"exit code {REQUEUE_EXIT_CODE}"):
        ranks.run(blocked, 1, tmp_path, tmp_path)
    assert newest_verdict(tmp_path, since=0.0) is None


def out_at_last(folder):
    """This rank is over its limit, and gets out while another says that it still has time."""
    places = [here(), Place(here().host, here().machine, 1, 7)]
    patient = report(1, place=places[1], step=1, limit_seconds=90.0, over=False)
    reporting.write(reporting.file_of(folder / FOLDER, 1, 1), patient, "")
    with Watchdog(Settings(start_seconds=1.0), folder, places, 0, collectives) as watchdog:
        watchdog.at("update", 1)
        file, own = reporting.file_of(folder / FOLDER, 1, 0), {"over": False}
        while not own["over"]:
            time.sleep(0.01)
            with suppress(FileNotFoundError):
                own = json.loads(file.read_text())
    return own["over"], [thread.name for thread in threading.enumerate() if thread.name == "watchdog"]


def test_a_rank_that_gets_out_in_the_end_is_left_alone(tmp_path):
    assert ranks.run(out_at_last, 1, tmp_path, tmp_path) == [(True, [])]
    assert sorted(file.name for file in tmp_path.glob(f"{FOLDER}/*/*")) == ["rank-00001.json", "rank-00001.txt"]


def test_a_process_is_running_stopped_or_gone_also_where_nobody_has_asked_how_it_ended():
    with subprocess.Popen(["sleep", "60"]) as child:
        place = Place(here().host, here().machine, child.pid, reporting._stat(child.pid)[1])
        assert state(place) == "running"
        assert state(dataclasses.replace(place, started=place.started - 1)) == "gone"
        child.send_signal(signal.SIGSTOP)
        assert eventually(place, "stopped")
        child.kill()
        assert eventually(place, "gone")
    assert state(place) == "gone"


def eventually(place: Place, expected: str) -> bool:
    deadline = time.monotonic() + 10
    while state(place) != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return state(place) == expected


def test_of_a_rank_on_another_machine_with_the_same_name_nothing_is_said(tmp_path):
    """Containers, and hosts that nobody has named: its number is nobody's here, and that says nothing."""
    other = dataclasses.replace(here(), machine="another", pid=2**22, started=1)
    assert state(other) == "gone"
    watchdog = Watchdog(Settings(), tmp_path, [here(), other], 0, collectives)
    watchdog._leave(over=True)
    [file] = (tmp_path / FOLDER).glob("step-*/rank-00000.json")
    assert json.loads(file.read_text())["neighbours"] == {}


def test_reports_of_an_earlier_start_do_not_count(tmp_path):
    places = [here(), here()]
    for rank, started in enumerate((here().started, here().started - 1)):
        given = report(rank, place=dataclasses.replace(here(), started=started))
        reporting.write(reporting.file_of(tmp_path, 12, rank), given, "")
    reporting.file_of(tmp_path, 12, 1).with_name("rank-00002.json").write_text('{"torn')
    assert list(reporting.read(tmp_path, places, {})) == [0]


def test_a_report_that_is_written_anew_or_withdrawn_is_read_so(tmp_path):
    hangs, seen = tmp_path / FOLDER, {}
    file = reporting.file_of(hangs, 12, 0)
    for over in (False, True):
        reporting.write(file, report(0, place=here(), over=over), "")
        assert reporting.read(hangs, [here()], seen)[0].over is over
    reporting.remove(file)
    assert reporting.read(hangs, [here()], seen) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "steps", "limit"),
    [
        (Settings(), [], 1800),
        (Settings(), [0.1], 60),
        (Settings(), [500.0] + [20.0] * 32, 200),
        (Settings(), [500.0] * 100 + [30.0] * 17, 300),
        (Settings(step_seconds=7.0), [20.0], 7),
        (Settings(step_seconds=0.0, start_seconds=5.0), [], 5),
        (Settings(step_seconds=0.0, start_seconds=5.0), [20.0], float("inf")),
        (Settings(start_seconds=0.0), [], float("inf")),
    ],
)
def test_the_limit_follows_the_median_of_the_last_steps(tmp_path, settings, steps, limit):
    watchdog = Watchdog(settings, tmp_path, [here()], 0, dict)
    for seconds in steps:
        watchdog.finished(seconds)
    assert watchdog._own_limit("update") == limit
    assert watchdog._own_limit("data") == max(limit, 660)


def test_moving_costs_next_to_nothing(tmp_path):
    watchdog, calls = Watchdog(Settings(), tmp_path, [here()], 0, dict), 100_000
    config.update("jaxtyping_disable", True)  # as in a command
    try:
        began = time.perf_counter()
        for step in range(calls):
            watchdog.at("data", step)
        seconds = time.perf_counter() - began
    finally:
        config.update("jaxtyping_disable", False)
    assert seconds / calls < 10e-6  # a busy machine's microseconds; more would still be seen by nobody


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.1]:1: Connection reset by peer."), True),
        (RuntimeError("[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv"), True),
        (dist.DistBackendError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"), True),
        (dist.DistBackendError("NCCL error: ncclInvalidUsage: duplicate GPU"), False),
        (dist.DistNetworkError("Connection was likely closed"), True),
        (RuntimeError("Connection reset by peer"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)  # fmt: skip
def test_only_what_a_collective_says_of_a_peer_is_a_lost_connection(error, lost):
    assert connection_lost(error) is lost


PLACES = [Place(f"host-{'abcdefg'[rank // 2]}", "", 100 + rank, 5) for rank in range(14)]


def report(rank: int, place: Place | None = None, **fields) -> Report:
    """Of a rank that waits with all others in the 9th collective of one group."""
    given = {
        "phase": "update", "step": 12, "moves": 40, "seconds": 60.0, "limit_seconds": 60.0, "over": True,
        "line": "engine.py:88 in update", "collective": "all_reduce", "group": "0", "numbers": {"0": 9}, "neighbours": {},
    }  # fmt: skip
    return Report(rank=rank, place=place or PLACES[rank], **(given | fields))


def said(num_ranks: int, **changed: dict | None) -> str:
    """The verdict on so many ranks, all like `report`; r3=None has left none, r3={...} differs there."""
    reports = {rank: report(rank) for rank in range(num_ranks)}
    for name, fields in changed.items():
        rank = int(name[1:])
        reports.pop(rank) if fields is None else reports.update({rank: report(rank, **fields)})
    return (
        verdict(reports, PLACES[:num_ranks], Path("FOLDER")).removeprefix("step 12: ").removesuffix("; stacks: FOLDER")
    )


WAIT = ", while the others wait in all_reduce 9"
NONE = {"collective": None, "group": None, "numbers": {"0": 8}}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"r3": None}, f"rank 3 on host-b is silent: frozen, dead or cut off{WAIT}"),
        ({"r3": None, "r2": {"neighbours": {"3": "running"}}}, f"rank 3 on host-b is silent: alive but frozen{WAIT}"),
        ({"r3": None, "r2": None}, f"ranks 2, 3 on host-b are silent: frozen, dead or cut off{WAIT}"),
        ({"r3": None, "r0": None, "r2": {"neighbours": {"3": "gone"}}},
         f"rank 3 on host-b is gone: killed, or ended without a word{WAIT}"),
        ({"r3": None, "r1": {"moves": 39}}, f"rank 3 on host-b is silent: frozen, dead or cut off{WAIT}"),
        ({"r1": {"crashed": "KeyError: 1"}, "r3": None}, f"rank 1 on host-a crashed with KeyError: 1{WAIT}"),
        ({"r1": {"moves": 39, "phase": "data", **NONE}}, f"rank 1 on host-a is still in data{WAIT}"),
        ({"r0": {"moves": 39, "phase": "data", "numbers": {"0": 7}},
          "r1": {"moves": 39, "phase": "data", "collective": None, "numbers": {"0": 6}}},
         f"rank 1 on host-a is still in data{WAIT}"),
        ({"r2": {"line": "model.py:5 in spin", **NONE}},
         f"rank 2 on host-b is in no collective (update, model.py:5 in spin){WAIT}"),
        ({"r2": {"line": "model.py:5 in spin", **NONE, "numbers": {}}},
         f"rank 2 on host-b is in no collective (update, model.py:5 in spin){WAIT}"),
        ({"r2": {"collective": "barrier", "numbers": {"0": 8}}},
         f"rank 2 on host-b is in barrier (update, engine.py:88 in update){WAIT}"),
        # Tensor-parallel pairs: 0 waits for 1, 2 waits for 0, 3 waits for 1.
        ({"r0": {"numbers": {"tp": 5, "dp": 2}}, "r1": {"collective": None, "numbers": {"tp": 4, "dp2": 2}},
          "r2": {"group": "dp", "numbers": {"dp": 3, "tp2": 5}}, "r3": {"group": "dp2", "numbers": {"dp2": 3, "tp2": 5}}},
         "rank 1 on host-a is in no collective (update, engine.py:88 in update), "
         "while the others wait in all_reduce 3"),
        ({"r1": {"moves": 41, "phase": "save", "collective": "barrier"}},
         f"rank 1 on host-a is in save and left out a collective{WAIT}"),
        ({"r1": {"lost": "gone"}, "r3": None, "r2": {"neighbours": {"3": "gone"}}},
         f"LOST rank 3 on host-b is gone: killed, or ended without a word{WAIT}"),
        ({"r1": {"lost": "Broken pipe"}, "r3": None, "r2": {"neighbours": {"3": "running"}}},
         "LOST all ranks are alive: the network between hosts host-a, host-b: Broken pipe"),
        ({f"r{rank}": {"collective": None} for rank in range(4)},
         "all have arrived (update, engine.py:88 in update) and none got out: the network between hosts host-a, host-b"),
        ({}, "all have arrived in all_reduce 9 and none got out: the network between hosts host-a, host-b"),
    ],
)  # fmt: skip
def test_the_verdict_names_who_did_not_arrive(changed, expected):
    words = said(4, **changed)
    cause = "a connection was lost: " if expected.startswith("LOST ") else "no progress for 60 s: "
    assert words == cause + expected.removeprefix("LOST ")


def test_the_verdict_on_many_is_short():
    silent = {f"r{rank}": None for rank in (0, 1, 2, 3, 4, 6, 8, 9, 10, 12)}
    assert "ranks 0 to 4, 6, 8 to 10, 12 on hosts host-a, host-b, host-c, host-d and 3 more are silent" in said(
        14, **silent
    )
