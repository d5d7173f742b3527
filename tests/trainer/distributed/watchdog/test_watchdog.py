"""The watchdog ends runs that hang and names the right rank; it does not disturb other runs."""

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
from tandem.trainer.config import WatchdogConfig as Settings
from tandem.trainer.distributed.mesh import count_collectives, create_shared_store, dump_flight_record
from tandem.trainer.distributed.watchdog import (
    HANGS_FOLDER,
    Watchdog,
    current_process,
    is_connection_lost,
    newest_verdict,
)
from tandem.trainer.distributed.watchdog import report as reporting
from tandem.trainer.distributed.watchdog.report import HangReport, RankProcess, process_state
from tandem.trainer.distributed.watchdog.verdict import verdict
from tandem.trainer.runtime.signals import REQUEUE_EXIT_CODE
from tests import ranks

BROKEN_STEP = 3
LIMIT_SECONDS = 3.0


def train(folder, break_as, steps=5, start_seconds=20.0, data_seconds=0.0, sleep_seconds=0.0):
    """Run a loop with the trainer's phases. In BROKEN_STEP, rank 1 misbehaves as `break_as` describes."""
    rank, second = dist.get_rank(), dist.new_group()
    processes = [None] * dist.get_world_size()
    dist.all_gather_object(processes, current_process())
    settings = Settings(step_timeout_seconds=LIMIT_SECONDS, start_timeout_seconds=start_seconds)
    watchdogs.REPORT_WAIT_SECONDS = 3.0  # a test of a rank that does not answer need not wait longer
    with Watchdog(
        settings, folder, processes, rank, count_collectives,
        flight_record=dump_flight_record, data_timeout_seconds=data_seconds,
    ) as watchdog:  # fmt: skip
        for step in range(1, steps + 1):
            broken = break_as if rank == 1 and step == BROKEN_STEP else ""
            watchdog.enter_phase("data", step)
            if broken == "data":
                time.sleep(sleep_seconds)
            if not break_as:
                time.sleep(LIMIT_SECONDS / 3)
            watchdog.enter_phase("forward and backward", step)
            if broken == "loop":
                while True:
                    pass
            if broken == "crash":
                raise ValueError("row 7\nis not a row")
            if broken in ("STOP", "KILL"):
                os.kill(os.getpid(), getattr(signal, f"SIG{broken}"))
            dist.all_reduce(torch.ones(2))
            watchdog.enter_phase("update", step)
            if broken != "skip":
                dist.all_reduce(torch.ones(2), group=second)
            watchdog.finish_step(0.01)
    return watchdog._timeout_seconds


def save(folder):
    """Rank 0 waits in the store for rank 1, which is killed."""
    rank, store = dist.get_rank(), create_shared_store("test")
    processes = [None] * dist.get_world_size()
    dist.all_gather_object(processes, current_process())
    watchdogs.GONE_PEER_TIMEOUT_SECONDS = LIMIT_SECONDS
    with Watchdog(Settings(), folder, processes, rank, count_collectives) as watchdog:
        watchdog.finish_step(0.01)
        watchdog.enter_phase("save", BROKEN_STEP)
        watchdog.use_start_timeout()
        if rank == 1:
            time.sleep(2 * LIMIT_SECONDS)
            os.kill(os.getpid(), signal.SIGKILL)
        with watchdog.store_wait():
            store.get("file")


def failed(break_as, folder, **how) -> tuple[str, str, str]:
    """Run a world that the watchdog ends; return the ranks' failures, the verdict, and the name of the step's folder."""
    with pytest.raises(AssertionError) as failure:
        ranks.run(train, 3, folder, folder, break_as, *how.values())
    [file] = (folder / HANGS_FOLDER).glob("step-*/verdict.txt")
    return str(failure.value), file.read_text(), file.parent.name


def ended_with_code(words: str, rank: int) -> bool:
    return f"rank {rank} gave no result (exit code {REQUEUE_EXIT_CODE}" in words


@pytest.fixture(scope="module")
def data_hang(tmp_path_factory) -> tuple[Path, str, str, str]:
    """Run a world that hangs in rank 1's wait for data and keeps flight records; return its folder and `failed`'s results."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FR_BUFFER_SIZE", "50")
        return folder, *failed("data", folder, steps=5, start=20.0, data=0.0, sleep=60.0)


def test_a_rank_that_waits_for_its_data_is_named(data_hang):
    tmp_path, words, said, folder = data_hang
    assert all(ended_with_code(words, rank) for rank in range(3))
    assert folder == "step-00000003"
    assert said.startswith(
        f"step 3: no progress for {LIMIT_SECONDS:g} s; rank 1 on {current_process().host} is still in phase 'data', while"
    )
    assert "the others wait in all_reduce" in said
    assert "time.sleep(sleep_seconds)" in (tmp_path / HANGS_FOLDER / folder / "rank-00001.txt").read_text()
    report = json.loads((tmp_path / HANGS_FOLDER / folder / "rank-00000.json").read_text())
    assert (report["phase"], report["collective"]) == ("forward and backward", "all_reduce")


def test_torchs_flight_record_is_kept_too(data_hang):
    tmp_path, _, _, step = data_hang
    files = sorted(path.name for path in (tmp_path / HANGS_FOLDER / step).glob("flight-*"))
    assert files == ["flight-0", "flight-1", "flight-2"]
    # Read what torchfrtrace reads; on gloo, the tool of torch 2.13 itself fails on a group without a name.
    entries = pickle.loads((tmp_path / HANGS_FOLDER / step / "flight-0").read_bytes())["entries"]
    assert {entry["profiling_name"] for entry in entries} >= {"gloo:all_reduce"}


def test_a_rank_whose_store_is_slow_is_waited_for(tmp_path):
    """The other ranks exceed their limit, but rank 1's report shows that its own limit, for data, has not passed."""
    began = time.monotonic()
    ranks.run(train, 3, tmp_path, tmp_path, "data", 5, 20.0, 30.0, 3 * LIMIT_SECONDS)
    assert time.monotonic() - began > 3 * LIMIT_SECONDS
    assert not (tmp_path / HANGS_FOLDER).exists()


def test_a_frozen_rank_is_named_and_killed(tmp_path):
    words, said, step = failed("STOP", tmp_path)
    since_verdict = time.time() - (tmp_path / HANGS_FOLDER / step / "verdict.txt").stat().st_mtime
    assert since_verdict < ranks.GRACE_SECONDS, "the test killed the rank; the other ranks should have"
    assert (
        f"rank 1 on {current_process().host} is silent (stopped by a signal), while the others wait in all_reduce"
        in said
    )
    assert f"rank 1 gave no result (exit code {-signal.SIGKILL}" in words
    assert ended_with_code(words, 0)
    assert ended_with_code(words, 2)


def test_a_killed_rank_is_named_by_those_whose_connection_broke(tmp_path):
    words, said, _ = failed("KILL", tmp_path)
    assert said.startswith(
        f"step 3: a connection was lost; rank 1 on {current_process().host} is gone (killed, or exited without an error)"
    )
    assert words.count(f"SystemExit: {REQUEUE_EXIT_CODE}") == 2


def test_a_rank_that_waits_in_the_store_for_a_killed_one_is_ended_without_patience(tmp_path):
    with pytest.raises(AssertionError) as failure:
        ranks.run(save, 2, tmp_path, tmp_path)
    assert ended_with_code(str(failure.value), 0)
    said = newest_verdict(tmp_path, 0.0)
    seconds, who = re.fullmatch(r"step 3: no progress for ([\d.]+) s; (.*)\n?", said, re.DOTALL).groups()
    assert who.startswith(f"rank 1 on {current_process().host} is gone (killed, or exited without an error)")
    assert 3 * LIMIT_SECONDS <= float(seconds) < 20, "the message contains the whole wait"


def test_a_rank_in_an_endless_loop_is_named_with_its_line(tmp_path):
    words, said, _ = failed("loop", tmp_path)
    place = f"(phase 'forward and backward', {Path(__file__).name}:"
    assert f"rank 1 on {current_process().host} is in no collective {place}" in said
    assert f"in {train.__name__}), while the others wait in all_reduce" in said
    assert all(ended_with_code(words, rank) for rank in range(3))


def test_a_rank_that_left_a_collective_out_is_named(tmp_path):
    _, said, _ = failed("skip", tmp_path)
    assert f"rank 1 on {current_process().host} is in phase 'forward and backward' and skipped a collective" in said


def test_a_rank_that_crashed_keeps_its_error_and_is_named_by_the_others(tmp_path):
    words, said, _ = failed("crash", tmp_path)
    assert f"rank 1 on {current_process().host} crashed with ValueError: row 7 is not a row" in said
    assert "ValueError: row 7\nis not a row" in words
    assert words.count(f"SystemExit: {REQUEUE_EXIT_CODE}") == 2


def test_a_healthy_run_is_left_alone_and_leaves_nothing(tmp_path):
    """The run takes longer than the limit, but no step does."""
    assert ranks.run(train, 3, tmp_path, tmp_path, "") == [LIMIT_SECONDS] * 3
    assert not (tmp_path / HANGS_FOLDER).exists()


def freeze(folder):
    """Suspend the only rank for longer than its limit; it must continue afterwards."""
    if not (child := os.fork()):
        time.sleep(0.5)
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(6.5)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    with Watchdog(Settings(start_timeout_seconds=3.0), folder, [current_process()], 0, count_collectives) as watchdog:
        watchdog.enter_phase("data", 1)
        os.waitpid(child, 0)
        time.sleep(0.5)
        assert watchdog._waited_seconds < 2
    return True


def test_time_in_which_this_process_was_stopped_does_not_count(tmp_path):
    assert ranks.run(freeze, 1, tmp_path, tmp_path) == [True]


def alone(folder):
    with Watchdog(Settings(start_timeout_seconds=1.0), folder, [current_process()], 0, count_collectives) as watchdog:
        watchdog.enter_phase("forward and backward", 1)
        time.sleep(30)


def test_a_start_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(AssertionError, match=f"exit code {REQUEUE_EXIT_CODE}"):
        ranks.run(alone, 1, tmp_path, tmp_path)
    said = newest_verdict(tmp_path, since=0.0)
    assert (
        f"step 1: no progress for 1 s; rank 0 on {current_process().host} is still in phase 'forward and backward', "
        in said
    )
    assert f" is still in phase 'forward and backward', {Path(__file__).name}:" in said
    assert newest_verdict(tmp_path, since=time.time() + 60) is None


def blocked(folder):
    """Hang on a report that can never be read, as on a dead file system; the exit deadline must end the process."""
    watchdogs.EXIT_DEADLINE_SECONDS = 2.0
    file, open_file = reporting.report_path(folder / HANGS_FOLDER, 1, 1), os.open
    file.parent.mkdir(parents=True)
    file.touch()

    def open_on_a_dead_disk(path, *arguments, **options):
        if Path(path) == file:
            time.sleep(3600)
        return open_file(path, *arguments, **options)

    os.open = open_on_a_dead_disk
    alone(folder)


def test_the_process_ends_even_where_the_file_system_hangs(tmp_path):
    with pytest.raises(AssertionError, match=f"exit code {REQUEUE_EXIT_CODE}"):
        ranks.run(blocked, 1, tmp_path, tmp_path)
    assert newest_verdict(tmp_path, since=0.0) is None


def out_at_last(folder):
    """Exceed the limit, but move again while another rank's report says that its limit has not passed."""
    processes = [current_process(), RankProcess(current_process().host, current_process().machine_id, 1, 7)]
    patient = report(1, process=processes[1], step=1, timeout_seconds=90.0, timed_out=False)
    reporting.write_report(reporting.report_path(folder / HANGS_FOLDER, 1, 1), patient, "")
    with Watchdog(Settings(start_timeout_seconds=1.0), folder, processes, 0, count_collectives) as watchdog:
        watchdog.enter_phase("update", 1)
        file, own = reporting.report_path(folder / HANGS_FOLDER, 1, 0), {"timed_out": False}
        while not own["timed_out"]:
            time.sleep(0.01)
            with suppress(FileNotFoundError):
                own = json.loads(file.read_text())
    return own["timed_out"], [thread.name for thread in threading.enumerate() if thread.name == "watchdog"]


def test_a_rank_that_gets_out_in_the_end_is_left_alone(tmp_path):
    assert ranks.run(out_at_last, 1, tmp_path, tmp_path) == [(True, [])]
    assert sorted(file.name for file in tmp_path.glob(f"{HANGS_FOLDER}/*/*")) == ["rank-00001.json", "rank-00001.txt"]


def test_a_process_is_running_stopped_or_gone_also_where_nobody_has_asked_how_it_ended():
    with subprocess.Popen(["sleep", "60"]) as child:
        place = RankProcess(
            current_process().host, current_process().machine_id, child.pid, reporting._process_stat(child.pid)[1]
        )
        assert process_state(place) == "running"
        assert process_state(dataclasses.replace(place, start_ticks=place.start_ticks - 1)) == "gone"
        child.send_signal(signal.SIGSTOP)
        assert eventually(place, "stopped")
        child.kill()
        assert eventually(place, "gone")
    assert process_state(place) == "gone"


def eventually(place: RankProcess, expected: str) -> bool:
    deadline = time.monotonic() + 10
    while process_state(place) != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return process_state(place) == expected


def test_of_a_rank_on_another_machine_with_the_same_name_nothing_is_said(tmp_path):
    """As with containers or hosts of equal names: the process ID is not used here, which proves nothing."""
    other = dataclasses.replace(current_process(), machine_id="another", pid=2**22, start_ticks=1)
    assert process_state(other) == "gone"
    watchdog = Watchdog(Settings(), tmp_path, [current_process(), other], 0, count_collectives)
    watchdog._write_report(timed_out=True)
    [file] = (tmp_path / HANGS_FOLDER).glob("step-*/rank-00000.json")
    assert json.loads(file.read_text())["local_peer_states"] == {}


def test_reports_of_an_earlier_start_do_not_count(tmp_path):
    processes = [current_process(), current_process()]
    for rank, started in enumerate((current_process().start_ticks, current_process().start_ticks - 1)):
        given = report(rank, process=dataclasses.replace(current_process(), start_ticks=started))
        reporting.write_report(reporting.report_path(tmp_path, 12, rank), given, "")
    reporting.report_path(tmp_path, 12, 1).with_name("rank-00002.json").write_text('{"torn')
    assert list(reporting.read_reports(tmp_path, processes, {})) == [0]


def test_a_report_that_is_written_anew_or_withdrawn_is_read_so(tmp_path):
    hangs, seen = tmp_path / HANGS_FOLDER, {}
    file = reporting.report_path(hangs, 12, 0)
    for over in (False, True):
        reporting.write_report(file, report(0, process=current_process(), timed_out=over), "")
        assert reporting.read_reports(hangs, [current_process()], seen)[0].timed_out is over
    reporting.remove_report(file)
    assert reporting.read_reports(hangs, [current_process()], seen) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "steps", "limit"),
    [
        (Settings(), [], 1800),
        (Settings(), [0.1], 60),
        (Settings(), [500.0] + [20.0] * 32, 200),
        (Settings(), [500.0] * 100 + [30.0] * 17, 300),
        (Settings(step_timeout_seconds=7.0), [20.0], 7),
        (Settings(step_timeout_seconds=0.0, start_timeout_seconds=5.0), [], 5),
        (Settings(step_timeout_seconds=0.0, start_timeout_seconds=5.0), [20.0], float("inf")),
        (Settings(start_timeout_seconds=0.0), [], float("inf")),
    ],
)
def test_the_limit_follows_the_median_of_the_last_steps(tmp_path, settings, steps, limit):
    watchdog = Watchdog(settings, tmp_path, [current_process()], 0, dict)
    for seconds in steps:
        watchdog.finish_step(seconds)
    assert watchdog._phase_timeout_seconds("update") == limit
    assert watchdog._phase_timeout_seconds("data") == max(limit, 660)


def test_moving_costs_next_to_nothing(tmp_path):
    watchdog, calls = Watchdog(Settings(), tmp_path, [current_process()], 0, dict), 100_000
    config.update("jaxtyping_disable", True)  # as in a command
    try:
        began = time.perf_counter()
        for step in range(calls):
            watchdog.enter_phase("data", step)
        seconds = time.perf_counter() - began
    finally:
        config.update("jaxtyping_disable", False)
    assert seconds / calls < 10e-6  # generous for a busy machine; even more would not be noticeable


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
    assert is_connection_lost(error) is lost


PLACES = [RankProcess(f"host-{'abcdefg'[rank // 2]}", "", 100 + rank, 5) for rank in range(14)]


def report(rank: int, process: RankProcess | None = None, **fields) -> HangReport:
    """Make the report of a rank that waits with all others in the ninth collective of one group."""
    given = {
        "phase": "update", "step": 12, "num_phases": 40, "waited_seconds": 60.0, "timeout_seconds": 60.0, "timed_out": True,
        "location": "engine.py:88 in update", "collective": "all_reduce", "group_name": "0", "num_collectives": {"0": 9},
        "local_peer_states": {},
    }  # fmt: skip
    return HangReport(rank=rank, process=process or PLACES[rank], **(given | fields))


def said(num_ranks: int, **changed: dict | None) -> str:
    """Return the verdict on `num_ranks` equal reports. r3=None: rank 3 has none; r3={...}: rank 3's differs."""
    reports = {rank: report(rank) for rank in range(num_ranks)}
    for name, fields in changed.items():
        rank = int(name[1:])
        reports.pop(rank) if fields is None else reports.update({rank: report(rank, **fields)})
    return (
        verdict(reports, PLACES[:num_ranks], Path("FOLDER")).removeprefix("step 12: ").removesuffix("; stacks: FOLDER")
    )


WAIT = ", while the others wait in all_reduce 9"
NONE = {"collective": None, "group_name": None, "num_collectives": {"0": 8}}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"r3": None}, f"rank 3 on host-b is silent (frozen, dead or disconnected){WAIT}"),
        ({"r3": None, "r2": {"local_peer_states": {"3": "running"}}}, f"rank 3 on host-b is silent (alive but frozen){WAIT}"),
        ({"r3": None, "r2": None}, f"ranks 2, 3 on host-b are silent (frozen, dead or disconnected){WAIT}"),
        ({"r3": None, "r0": None, "r2": {"local_peer_states": {"3": "gone"}}},
         f"rank 3 on host-b is gone (killed, or exited without an error){WAIT}"),
        ({"r3": None, "r1": {"num_phases": 39}}, f"rank 3 on host-b is silent (frozen, dead or disconnected){WAIT}"),
        ({"r1": {"crash_error": "KeyError: 1"}, "r3": None}, f"rank 1 on host-a crashed with KeyError: 1{WAIT}"),
        ({"r1": {"num_phases": 39, "phase": "data", **NONE}}, f"rank 1 on host-a is still in phase 'data'{WAIT}"),
        ({"r0": {"num_phases": 39, "phase": "data", "num_collectives": {"0": 7}},
          "r1": {"num_phases": 39, "phase": "data", "collective": None, "num_collectives": {"0": 6}}},
         f"rank 1 on host-a is still in phase 'data'{WAIT}"),
        ({"r2": {"location": "model.py:5 in spin", **NONE}},
         f"rank 2 on host-b is in no collective (phase 'update', model.py:5 in spin){WAIT}"),
        ({"r2": {"location": "model.py:5 in spin", **NONE, "num_collectives": {}}},
         f"rank 2 on host-b is in no collective (phase 'update', model.py:5 in spin){WAIT}"),
        ({"r2": {"collective": "barrier", "num_collectives": {"0": 8}}},
         f"rank 2 on host-b is in barrier (phase 'update', engine.py:88 in update){WAIT}"),
        # Tensor-parallel pairs: 0 waits for 1, 2 waits for 0, 3 waits for 1.
        ({"r0": {"num_collectives": {"tp": 5, "dp": 2}}, "r1": {"collective": None, "num_collectives": {"tp": 4, "dp2": 2}},
          "r2": {"group_name": "dp", "num_collectives": {"dp": 3, "tp2": 5}}, 
          "r3": {"group_name": "dp2", "num_collectives": {"dp2": 3, "tp2": 5}}},
         "rank 1 on host-a is in no collective (phase 'update', engine.py:88 in update), "
         "while the others wait in all_reduce 3"),
        ({"r1": {"num_phases": 41, "phase": "save", "collective": "barrier"}},
         f"rank 1 on host-a is in phase 'save' and skipped a collective{WAIT}"),
        ({"r1": {"connection_error": "gone"}, "r3": None, "r2": {"local_peer_states": {"3": "gone"}}},
         f"LOST rank 3 on host-b is gone (killed, or exited without an error){WAIT}"),
        ({"r1": {"connection_error": "Broken pipe"}, "r3": None, "r2": {"local_peer_states": {"3": "running"}}},
         "LOST all ranks are alive; check the network between hosts host-a, host-b (Broken pipe)"),
        ({f"r{rank}": {"collective": None} for rank in range(4)},
         "all ranks are stuck in phase 'update', engine.py:88 in update; check the network between hosts host-a, host-b"),
        ({}, "all ranks are stuck in all_reduce 9; check the network between hosts host-a, host-b"),
    ],
)  # fmt: skip
def test_the_verdict_names_who_did_not_arrive(changed, expected):
    words = said(4, **changed)
    cause = "a connection was lost; " if expected.startswith("LOST ") else "no progress for 60 s; "
    assert words == cause + expected.removeprefix("LOST ")


def test_the_verdict_on_many_is_short():
    silent = {f"r{rank}": None for rank in (0, 1, 2, 3, 4, 6, 8, 9, 10, 12)}
    assert "ranks 0 to 4, 6, 8 to 10, 12 on hosts host-a, host-b, host-c, host-d and 3 more are silent" in said(
        14, **silent
    )
