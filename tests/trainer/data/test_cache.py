import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.trainer.data.reading import loader, schedule_of, steps
from trainer import config
from trainer.config import Phase, UserError
from trainer.data import manifest
from trainer.data.cache import Cache
from trainer.data.manifest import DamagedShard

GIB = 2.0**30
SOON_SECONDS = 0.3
"""The timeout where a test waits for it."""
WAIT_SECONDS = 30.0
"""How long a test waits for what shall happen, on a machine that does other things too."""


@pytest.fixture
def settings(tmp_path):
    """settings(attempts=3): of a cache in an empty folder."""

    def make(**changes) -> config.Cache:
        return config.Cache(**{"folder": str(tmp_path / "copies"), "attempts": 4, "timeout_seconds": 1.0} | changes)

    return make


@pytest.fixture
def shards(make_corpus):
    """The training shards of the corpus "a"."""
    return manifest.load(make_corpus("a", documents=60)).train.shards


def url(shard) -> str:
    return f"/a/{shard.file}"


def names(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir()} - {".lock"}


def is_whole(path, tmp_path, shard) -> bool:
    return Path(path).read_bytes() == (tmp_path / "a" / shard.file).read_bytes()


@pytest.mark.parametrize(
    "fault", ["silence", "stalled", "500", "403", "reset", "truncated", "shorter", "longer", "wrong"]
)
def test_a_failure_is_logged_and_tried_again(server, settings, shards, tmp_path, caplog, fault):
    # aiohttp asks once more by itself where a connection was reset.
    faults = [fault] * (2 if fault == "reset" else 1)
    server.faults[url(shards[0])] += faults
    timeout_seconds = SOON_SECONDS if fault in ("silence", "stalled") else 1.0
    copy = Cache(settings(timeout_seconds=timeout_seconds)).path(f"{server.address}/a", shards[0])
    assert is_whole(copy, tmp_path, shards[0])
    assert server.count(url(shards[0])) == len(faults) + 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"{server.address}{url(shards[0])}: try 1 of 4: ")
    assert record.message.endswith(f"; again in {timeout_seconds / 64:.3g} s")
    assert names(settings().folder) == {f"{shards[0].sha256}.tar"}


def test_a_broken_download_goes_on_where_it_broke(server, settings, shards, tmp_path):
    server.faults[url(shards[0])] += ["truncated", "shorter"]
    assert is_whole(Cache(settings()).path(f"{server.address}/a", shards[0]), tmp_path, shards[0])
    assert server.sent_bytes == shards[0].bytes
    half, quarter = shards[0].bytes // 2, (shards[0].bytes + 1) // 2 // 2
    assert [span for _, span in server.asked] == ["", f"bytes={half}-", f"bytes={half + quarter}-"]


def test_a_server_without_ranges_starts_over(server, settings, shards, tmp_path):
    server.faults[url(shards[0])] += ["truncated", "no ranges"]
    assert is_whole(Cache(settings()).path(f"{server.address}/a", shards[0]), tmp_path, shards[0])
    assert server.sent_bytes == shards[0].bytes // 2 + shards[0].bytes


def test_slow_is_no_failure_while_bytes_come(server, settings, shards, tmp_path, caplog):
    server.faults[url(shards[0])].append("trickle")
    start = time.monotonic()
    assert is_whole(
        Cache(settings(timeout_seconds=SOON_SECONDS)).path(f"{server.address}/a", shards[0]), tmp_path, shards[0]
    )
    assert time.monotonic() - start > SOON_SECONDS
    assert not caplog.records


@pytest.mark.parametrize(
    ("fault", "tries", "reason"),
    [
        ("500", 4, "ClientResponseError: 500, message='Internal Server Error'"),
        ("403", 4, "ClientResponseError: 403"),
        ("404", 1, "FileNotFoundError"),
        ("410", 1, "ClientResponseError: 410"),
        ("silence", 4, "FSTimeoutError: no bytes came in time"),
        ("wrong", 2, r"sha256 \w{12}; the manifest says \w{12}, twice the same"),
    ],
)
def test_what_is_hopeless_stops_with_the_shard_s_name(server, settings, shards, fault, tries, reason):
    server.faults[url(shards[0])].append(f"{fault} always")
    with pytest.raises(
        DamagedShard, match=rf"{url(shards[0])}: shard .*; tries: {tries}, .*{reason}.*; restore"
    ) as error:
        Cache(settings(timeout_seconds=SOON_SECONDS)).path(f"{server.address}/a", shards[0])
    assert error.value.file == shards[0].file
    assert "\n" not in str(error.value)
    assert server.count(url(shards[0])) == tries
    assert not names(settings().folder)


def test_a_server_that_is_not_there_is_hopeless_after_the_tries(settings, shards, caplog):
    with pytest.raises(DamagedShard, match=r"tries: 3, .*ClientConnectorError"):
        Cache(settings(attempts=3)).path("http://127.0.0.1:1/a", shards[0])
    assert [record.message.split(" of ")[0][-1] for record in caplog.records] == ["1", "2"]


def test_a_copy_that_the_disk_altered_is_fetched_again(server, settings, shards, tmp_path, caplog):
    copy = Cache(settings()).path(f"{server.address}/a", shards[0])
    with Cache(settings()).opened(f"{server.address}/a", shards[0]) as again:
        assert again.read() == copy.read_bytes()
    assert len(server.asked) == 1, "a good copy is used by the next run"
    content = bytearray(copy.read_bytes())
    content[700] ^= 1
    copy.write_bytes(content)
    assert is_whole(Cache(settings()).path(f"{server.address}/a", shards[0]), tmp_path, shards[0])
    assert server.count(url(shards[0])) == 2
    assert "the shard is damaged; restore it; it is fetched again" in caplog.text


def test_a_local_shard_is_its_own_file_and_never_mended(settings, shards, tmp_path):
    path = tmp_path / "a" / shards[0].file
    assert Cache(settings()).path(tmp_path / "a", shards[0]) == path
    content = bytearray(path.read_bytes())
    for altered, message in ((content[:-1], "has .* bytes"), (content[:-1] + b"x", "xxh3_128"), (None, "is missing")):
        path.unlink()
        if altered is not None:
            path.write_bytes(altered)
        with pytest.raises(DamagedShard, match=rf"{path}: .*{message}"):
            Cache(settings()).path(tmp_path / "a", shards[0])
    assert not Path(settings().folder).exists()


def test_a_file_is_hashed_once_by_a_process(settings, shards, tmp_path):
    path, cache = tmp_path / "a" / shards[0].file, Cache(settings())
    cache.path(tmp_path / "a", shards[0])
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    cache.path(tmp_path / "a", shards[0])
    path.rename(tmp_path / "away")
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(DamagedShard, match="xxh3_128"):
        cache.path(tmp_path / "a", shards[0])


def test_the_copies_used_longest_ago_make_room(server, settings, shards, tmp_path):
    room_bytes = max(shard.bytes for shard in shards) * 3
    cache, folder = Cache(settings(gib=room_bytes / GIB)), f"{server.address}/a"
    kept = [cache.path(folder, shard) for shard in shards[:3]]
    cache.path(folder, shards[0])
    with cache.opened(folder, shards[1]) as in_use:
        cache.path(folder, shards[0])
        paths = [cache.path(folder, shard) for shard in shards[3:5]]
        assert names(settings().folder) == {path.name for path in (kept[0], *paths)}, "1 and 2 were used longest ago"
        assert in_use.read() == (tmp_path / "a" / shards[1].file).read_bytes(), "what is open can still be read"
    for shard in shards:
        cache.path(folder, shard)
        assert sum(path.stat().st_size for path in Path(settings().folder).iterdir()) <= room_bytes


def test_ranks_that_push_out_each_other_s_copies_still_read_right(server, settings, shards, tmp_path):
    caches = [Cache(settings(gib=shards[0].bytes * 1.5 / GIB)) for _ in range(2)]

    def read(cache, order):
        for shard in order * 3:
            with cache.opened(f"{server.address}/a", shard) as file:
                assert file.read() == (tmp_path / "a" / shard.file).read_bytes()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(read, caches, ([shards[0], shards[1]], [shards[1], shards[0]])))
    assert len(server.asked) > 2, "the test shall make them lose copies"


def test_a_room_too_small_for_one_shard_is_a_line_and_no_request(server, settings, shards):
    with pytest.raises(
        UserError, match=rf"data.cache.gib: .*; shard {shards[0].file} has {shards[0].bytes} bytes; .*raise"
    ):
        Cache(settings(gib=(shards[0].bytes - 1) / GIB)).path(f"{server.address}/a", shards[0])
    assert not server.asked


def test_a_disk_without_room_is_a_line_that_names_the_folder(server, settings, shards):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (shards[0].bytes - 1, limits[1]))
    try:
        with pytest.raises(
            UserError, match=rf"data.cache.folder: {settings().folder}: File too large; .*data.cache.gib"
        ):
            Cache(settings()).path(f"{server.address}/a", shards[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not names(settings().folder)


def test_threads_that_want_one_shard_fetch_it_once(server, settings, shards):
    server.faults[url(shards[0])].append("trickle")
    cache = Cache(settings())
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(cache.path, [f"{server.address}/a"] * 4, [shards[0]] * 4))) == 1
    assert len(server.asked) == 1


PROCESS = """
import sys, fsspec.implementations.http
from trainer import config
from trainer.data.cache import Cache
from trainer.data.manifest import Shard
cache, shard = Cache(eval(sys.argv[1], {"Cache": config.Cache})), eval(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(cache.path(sys.argv[3], shard), flush=True)
"""


def test_processes_share_a_download_and_a_killed_one_blocks_nobody(server, settings, shards, tmp_path):
    folder, shard, calm = f"{server.address}/a", shards[0], settings(timeout_seconds=WAIT_SECONDS)
    command = [sys.executable, "-c", PROCESS, repr(calm), repr(shard), folder]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server.faults[url(shard)] += ["stalled", "held"]
    with subprocess.Popen(command, **pipes) as killed, subprocess.Popen(command, **pipes) as other:
        for process in (killed, other):
            assert process.stdout.readline() == "ready\n"
        killed.stdin.write("\n")
        killed.stdin.flush()
        assert server.stalled.wait(WAIT_SECONDS)
        server.stalled.clear()
        part = Path(calm.folder, f"{shard.sha256}.part")
        deadline = time.monotonic() + WAIT_SECONDS
        while not (half := part.read_bytes()[: shard.bytes // 4]).strip(b"\0") and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        assert half == (tmp_path / "a" / shard.file).read_bytes()[: shard.bytes // 4], "it died in the middle"
        other.stdin.write("\n")
        other.stdin.flush()
        with ThreadPoolExecutor(1) as threads:
            assert server.stalled.wait(WAIT_SECONDS), "the other process began, and is held"
            mine = threads.submit(Cache(calm).path, folder, shard)
            time.sleep(0.1)
            server.go_on.set()
            assert mine.result(WAIT_SECONDS) == Path(other.stdout.readline().strip())
        other.stdin.close()
    assert is_whole(mine.result(), tmp_path, shard)
    assert server.count(url(shard)) == 2
    assert names(calm.folder) == {f"{shard.sha256}.tar"}


def test_what_a_crash_left_is_removed_by_the_next_fetch(server, settings, shards):
    folder = Path(settings().folder)
    folder.mkdir()
    (folder / f"{'0' * 64}.part").write_bytes(b"torn")
    (folder / "notes.txt").write_text("not ours")
    Cache(settings()).path(f"{server.address}/a", shards[0])
    assert names(folder) == {f"{shards[0].sha256}.tar", "notes.txt"}


def settle(server, num_asked: int) -> None:
    """Returns when that much was asked for, and nothing is fetched ahead any more."""
    deadline = time.monotonic() + WAIT_SECONDS
    while len(server.asked) < num_asked or any(thread.name == "shards-ahead" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_shard_wanted_soon_is_there_when_it_is_asked_for(server, settings, shards, tmp_path):
    cache, folder = Cache(settings()), f"{server.address}/a"
    for shard in shards[:4]:
        cache.soon(folder, shard)
    settle(server, 4)
    server.shutdown()
    server.socket.close()
    for shard in shards[:4]:
        assert is_whole(cache.path(folder, shard), tmp_path, shard)
    assert len(server.asked) == 4


def test_what_fails_ahead_is_raised_when_the_shard_is_asked_for(server, settings, shards, tmp_path):
    cache, folder = Cache(settings(attempts=1)), f"{server.address}/a"
    server.faults[url(shards[0])].append("500")
    cache.soon(folder, shards[0])
    settle(server, 1)
    with pytest.raises(DamagedShard, match="500"):
        cache.path(folder, shards[0])
    assert server.count(url(shards[0])) == 1
    assert is_whole(cache.path(folder, shards[0]), tmp_path, shards[0]), "the next one asks again"


def test_rows_read_over_a_network_that_fails_are_those_of_the_folder(server, settings, make_corpus, caplog):
    corpus = manifest.load(make_corpus("a", documents=140))
    faults = ["500", "truncated", "stalled", "wrong", "shorter", "longer", "403"]
    for number, shard in enumerate(corpus.train.shards):
        server.faults[url(shard)] += [faults[number % len(faults)], faults[(number + 1) % len(faults)]]
    assert len(corpus.train.shards) >= len(faults)
    num_steps = 2 * corpus.train.tokens // (4 * 16) + 1
    schedule = schedule_of(Phase("one", num_steps * 4 * 16, 16, 4, 1, {"a": 1.0}))
    sizes = {"block_tokens": 32, "window_tokens": 256}
    cache = settings(timeout_seconds=SOON_SECONDS)
    there = loader({"a": f"{server.address}/a"}, schedule, workers=2, prefetch_steps=4, cache=cache, **sizes)
    here = loader({"a": str(server.folder / "a")}, schedule, workers=0, **sizes)
    assert list(steps([there])) == list(steps([here]))
    assert there.fingerprints == here.fingerprints
    assert {record.message.split("/a/")[1].split(":")[0] for record in caplog.records} == {
        shard.file for shard in corpus.train.shards
    }, "a failure of every shard is on record"


def test_a_run_stops_with_the_name_of_a_shard_that_is_hopeless(server, settings, make_corpus):
    shard = manifest.load(make_corpus("a", documents=60)).train.shards[2]
    server.faults[url(shard)].append("500 always")
    schedule = schedule_of(Phase("one", 4096, 16, 4, 1, {"a": 1.0}))
    there = loader({"a": f"{server.address}/a"}, schedule, cache=settings(attempts=2))
    with pytest.raises(DamagedShard, match=rf"{server.address}{url(shard)}: shard cannot be fetched; tries: 2, .*500"):
        list(there.batches(0, None))
