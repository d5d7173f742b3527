"""Shared copies of shards: each is made once, is never mistaken for another, and all fit the cache's size."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tandem.trainer.config import PhaseConfig, UserError
from tandem.trainer.data import manifest, shard_cache
from tandem.trainer.data.manifest import DamagedShard
from tandem.trainer.data.shard_cache import ShardCache
from tandem.trainer.data.token_stream import TokenStream
from tests.trainer.data.loaders import TokenReader, make_loader, make_schedule
from tests.trainer.data.shard_copies import (
    GIB,
    SHORT_TIMEOUT_SECONDS,
    WAIT_TIMEOUT_SECONDS,
    equals_original,
    file_names,
    open_copy_path,
    shard_url,
)


def test_a_copy_is_not_removed_for_what_hinders_its_reader(server, settings, shards):
    folder = f"{server.address}/a"
    copy = open_copy_path(ShardCache(settings()), folder, shards[0])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    cache, files = ShardCache(settings()), [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(files) + 1, limits[1]))
        with pytest.raises(UserError, match=r"data.cache.folder: .*Too many open files"):
            cache.open_shard(folder, shards[0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in files:
            os.close(file)
    assert copy.exists()
    assert open_copy_path(cache, folder, shards[0]) == copy
    assert server.num_requests(shard_url(shards[0])) == 1


def test_a_damaged_shard_is_not_fetched_for_a_second_time(server, settings, shards):
    cache, folder = ShardCache(settings()), f"{server.address}/a"
    server.faults[shard_url(shards[0])].append("wrong always")
    said = set()
    for _ in range(3):
        with pytest.raises(DamagedShard) as error:
            cache.open_shard(folder, shards[0])
        said.add((str(error.value), error.value.file))
        cache.prefetch(folder, shards[0])
    settle(server, 2)
    assert len(said) == 1
    assert server.num_requests(shard_url(shards[0])) == 2


def test_threads_that_wait_for_a_fetch_share_its_failure(server, settings, shards):
    server.faults[shard_url(shards[0])].append("silence always")
    cache, together = ShardCache(settings(max_attempts=3, timeout_seconds=SHORT_TIMEOUT_SECONDS)), threading.Barrier(4)

    def failure(_):
        together.wait()
        with pytest.raises(UserError, match="attempts: 3 "):
            cache.open_shard(f"{server.address}/a", shards[0])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(failure, range(4)))
    assert server.num_requests(shard_url(shards[0])) == 3


def test_a_copy_cut_short_after_it_was_hashed_is_fetched_again(server, settings, shards, tmp_path):
    cache, folder = ShardCache(settings()), f"{server.address}/a"
    copy = open_copy_path(cache, folder, shards[0])
    os.truncate(copy, shards[0].bytes - 1)
    assert equals_original(open_copy_path(cache, folder, shards[0]), tmp_path, shards[0])
    assert len(server.requests) == 2


def test_a_part_is_on_the_disk_before_it_has_a_copy_s_name(server, settings, shards, monkeypatch):
    done, sync, rename = [], os.fsync, Path.rename

    def synced(descriptor):
        done.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))
        sync(descriptor)

    def renamed(path, target):
        done.append(("rename", str(path), str(target)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    copy = open_copy_path(ShardCache(settings()), f"{server.address}/a", shards[0])
    part = str(copy.with_suffix(".part"))
    assert done[:2] == [("sync", part, shards[0].bytes), ("rename", part, str(copy))]
    assert done[2][:2] == ("sync", str(copy.parent))


def test_a_copy_that_the_disk_altered_is_fetched_again(server, settings, shards, tmp_path, caplog):
    copy = open_copy_path(ShardCache(settings()), f"{server.address}/a", shards[0])
    with ShardCache(settings()).open_shard(f"{server.address}/a", shards[0]) as again:
        assert again.read() == copy.read_bytes()
    assert len(server.requests) == 1, "a good copy is used by the next run"
    content = bytearray(copy.read_bytes())
    content[700] ^= 1
    copy.write_bytes(content)
    assert equals_original(
        open_copy_path(ShardCache(settings()), f"{server.address}/a", shards[0]), tmp_path, shards[0]
    )
    assert server.num_requests(shard_url(shards[0])) == 2
    assert "replacing a bad cached copy (no action is needed): " in caplog.text
    assert "the shard is damaged" in caplog.text


def alter(copy: Path, tmp_path: Path) -> None:
    with copy.open("r+b") as file:
        file.seek(700)
        file.write(b"altered")


def give_away(copy: Path, tmp_path: Path) -> None:
    os.chown(copy, 65534, 65534)


def name_twice(copy: Path, tmp_path: Path) -> None:
    os.link(copy, tmp_path / "another name")


def replace_by_link(copy: Path, tmp_path: Path) -> None:
    copy.rename(tmp_path / "elsewhere.tar")
    copy.symlink_to(tmp_path / "elsewhere.tar")


def replace_by_pipe(copy: Path, tmp_path: Path) -> None:
    copy.unlink()
    os.mkfifo(copy)


def open_to_all(copy: Path, tmp_path: Path) -> None:
    copy.chmod(0o666)


@pytest.mark.parametrize("change", [alter, give_away, name_twice, replace_by_link, replace_by_pipe, open_to_all])
def test_a_copy_that_was_or_can_be_altered_after_its_hash_is_fetched_again(server, settings, shards, tmp_path, change):
    if change is give_away and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    cache, folder = ShardCache(settings()), f"{server.address}/a"
    copy = open_copy_path(cache, folder, shards[0])
    assert copy.stat().st_mode & 0o777 == 0o600
    change(copy, tmp_path)
    assert equals_original(open_copy_path(cache, folder, shards[0]), tmp_path, shards[0])
    assert len(server.requests) == 2
    status = copy.lstat()
    assert (status.st_uid, status.st_nlink, status.st_mode) == (os.geteuid(), 1, 0o100600)
    assert open_copy_path(cache, folder, shards[0]) == copy
    assert len(server.requests) == 2


def test_planted_files_are_replaced_and_their_targets_keep_their_content(server, settings, shards, tmp_path):
    folder = Path(settings().folder)
    folder.mkdir()
    victim, other = tmp_path / "victim", tmp_path / "other victim"
    for file in (victim, other):
        file.write_text("mine")
    (folder / f"{shards[0].sha256}.part").symlink_to(victim)
    (folder / ".lock").symlink_to(victim)
    os.link(other, folder / f"{shards[1].sha256}.part")
    (folder / f"{'0' * 64}.part").symlink_to(victim)
    (folder / "corpus.tar").write_text("not a copy")
    cache = ShardCache(settings(max_size_gib=1.5 * shards[0].bytes / GIB))
    for shard in shards[:2]:
        assert equals_original(open_copy_path(cache, f"{server.address}/a", shard), tmp_path, shard)
    assert [file.read_text() for file in (victim, other)] == ["mine", "mine"]
    assert file_names(folder) == {f"{shards[1].sha256}.tar", "corpus.tar"}


def test_a_lock_that_another_user_can_hold_blocks_nobody(server, settings, shards):
    folder = Path(settings().folder)
    folder.mkdir()
    with ExitStack() as locked:
        for name, mode, owner in ((".lock", 0o644, 0), (f"{shards[0].sha256}.part", 0o600, 65534)):
            file = locked.enter_context((folder / name).open("w"))
            (folder / name).chmod(mode)
            if os.geteuid() == 0:
                os.chown(folder / name, owner, owner)
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.geteuid() != 0:
            (folder / name).chmod(0o644)
        open_copy_path(ShardCache(settings()), f"{server.address}/a", shards[0])
    assert (folder / ".lock").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("mode", "owner", "fault"), [(0o777, 0, "writable by other users"), (0o755, 65534, "belongs to user")]
)
def test_a_folder_that_another_user_can_change_is_refused(server, settings, shards, mode, owner, fault):
    folder = Path(settings().folder)
    folder.mkdir()
    folder.chmod(mode)
    if owner and os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(folder, owner or -1, -1)
    with pytest.raises(UserError, match=rf"^data.cache.folder: {folder} .*{fault}"):
        ShardCache(settings()).open_shard(f"{server.address}/a", shards[0])
    assert not server.requests
    folder.rmdir()
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(UserError, match=rf"^data.cache.folder: {folder} is a link"):
        ShardCache(settings()).open_shard(f"{server.address}/a", shards[0])


def test_a_local_shard_is_its_own_file_and_never_mended(settings, shards, tmp_path):
    path = tmp_path / "a" / shards[0].file
    assert open_copy_path(ShardCache(settings()), tmp_path / "a", shards[0]) == path
    content = bytearray(path.read_bytes())
    for altered, message in ((content[:-1], "has .* bytes"), (content[:-1] + b"x", "xxh3_128"), (None, "is missing")):
        path.unlink()
        if altered is not None:
            path.write_bytes(altered)
        with pytest.raises(DamagedShard, match=rf"{path}: .*{message}"):
            open_copy_path(ShardCache(settings()), tmp_path / "a", shards[0])
    assert not Path(settings().folder).exists()


def test_a_local_shard_that_cannot_be_reached_stops_the_run(settings, shards, tmp_path):
    folder = tmp_path / "a"
    (folder / shards[0].file).unlink()
    (folder / shards[0].file).symlink_to(shards[0].file)  # a symlink loop exists but cannot be opened
    with pytest.raises(
        UserError, match=rf"{shards[0].file}: the shard cannot be read \(.*; restore the connection"
    ) as error:
        ShardCache(settings()).open_shard(folder, shards[0])
    assert not isinstance(error.value, DamagedShard)
    folder.rename(tmp_path / "away")
    folder.mkdir()
    with pytest.raises(UserError, match=rf"{folder}: no longer has a manifest.json; .*mounted there") as error:
        ShardCache(settings()).open_shard(folder, shards[1])
    assert not isinstance(error.value, DamagedShard)


def test_a_file_is_hashed_once_by_a_process_unless_it_is_another(settings, shards, tmp_path):
    path, cache, folder = tmp_path / "a" / shards[0].file, ShardCache(settings()), tmp_path / "a"
    cache.open_shard(folder, shards[0]).close()
    facts, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    cache.open_shard(folder, shards[0]).close()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    with pytest.raises(DamagedShard, match="xxh3_128"):
        cache.open_shard(folder, shards[0])
    path, shard = folder / shards[1].file, shards[1]
    cache.open_shard(folder, shard).close()
    facts, content = path.stat(), path.read_bytes()
    (folder / "other").write_bytes(content[:-1] + b"x")
    os.utime(folder / "other", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    (folder / "other").rename(path)
    with pytest.raises(DamagedShard, match="xxh3_128"):
        cache.open_shard(folder, shard)


def test_of_two_copies_the_one_used_later_is_known_however_close_they_are(server, settings, shards):
    cache, folder = ShardCache(settings()), f"{server.address}/a"
    for order in ((0, 1), (1, 0)) * 20:
        earlier, later = (open_copy_path(cache, folder, shards[n]) for n in order)
        assert earlier.stat().st_atime_ns < later.stat().st_atime_ns


def test_the_copies_used_longest_ago_make_room(server, settings, shards, tmp_path):
    room_bytes = max(shard.bytes for shard in shards) * 3
    cache, folder = ShardCache(settings(max_size_gib=room_bytes / GIB)), f"{server.address}/a"
    kept = [open_copy_path(cache, folder, shard) for shard in shards[:3]]
    open_copy_path(cache, folder, shards[0])
    with cache.open_shard(folder, shards[1]) as in_use:
        open_copy_path(cache, folder, shards[0])
        paths = [open_copy_path(cache, folder, shard) for shard in shards[3:5]]
        assert file_names(settings().folder) == {path.name for path in (kept[0], *paths)}, (
            "1 and 2 were used longest ago"
        )
        assert in_use.read() == (tmp_path / "a" / shards[1].file).read_bytes(), "what is open can still be read"
    for shard in shards:
        open_copy_path(cache, folder, shard)
        assert sum(path.stat().st_size for path in Path(settings().folder).iterdir()) <= room_bytes


def test_ranks_that_push_out_each_other_s_copies_still_read_right(server, settings, shards, tmp_path):
    caches = [ShardCache(settings(max_size_gib=shards[0].bytes * 1.5 / GIB)) for _ in range(2)]

    def read(cache, order):
        for shard in order * 3:
            with cache.open_shard(f"{server.address}/a", shard) as file:
                assert file.read() == (tmp_path / "a" / shard.file).read_bytes()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(read, caches, ([shards[0], shards[1]], [shards[1], shards[0]])))
    assert len(server.requests) > 2, "the test shall make them lose copies"


def test_a_room_too_small_for_one_shard_is_a_line_and_no_request(server, settings, shards):
    with pytest.raises(
        UserError,
        match=rf"data.cache.max_size_gib: .* too small for shard {shards[0].file} of {shards[0].bytes} bytes; raise",
    ):
        open_copy_path(ShardCache(settings(max_size_gib=(shards[0].bytes - 1) / GIB)), f"{server.address}/a", shards[0])
    assert not server.requests


def test_a_disk_without_room_is_a_line_that_names_the_folder(server, settings, shards):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (shards[0].bytes - 1, limits[1]))
    try:
        with pytest.raises(
            UserError,
            match=rf"data.cache.folder: {settings().folder} cannot be used .File too large.; .*data.cache.max_size_gib",
        ):
            open_copy_path(ShardCache(settings()), f"{server.address}/a", shards[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not file_names(settings().folder)


def test_threads_that_want_one_shard_fetch_it_once(server, settings, shards):
    server.faults[shard_url(shards[0])].append("trickle")
    cache = ShardCache(settings())
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(open_copy_path, [cache] * 4, [f"{server.address}/a"] * 4, [shards[0]] * 4))) == 1
    assert len(server.requests) == 1


PROCESS = """
import sys, fsspec.implementations.http
from tandem.trainer import config
from tandem.trainer.data.shard_cache import ShardCache
from tandem.trainer.data.manifest import Shard
cache, shard = ShardCache(eval(sys.argv[1], {"ShardCacheConfig": config.ShardCacheConfig})), eval(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(cache.open_shard(sys.argv[3], shard).name, flush=True)
"""


def test_processes_share_a_download_and_a_killed_one_blocks_nobody(server, settings, shards, tmp_path):
    folder, shard, calm = f"{server.address}/a", shards[0], settings(timeout_seconds=WAIT_TIMEOUT_SECONDS)
    command = [sys.executable, "-c", PROCESS, repr(calm), repr(shard), folder]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server.faults[shard_url(shard)] += ["stalled", "held"]
    with subprocess.Popen(command, **pipes) as killed, subprocess.Popen(command, **pipes) as other:
        for process in (killed, other):
            assert process.stdout.readline() == "ready\n"
        killed.stdin.write("\n")
        killed.stdin.flush()
        assert server.stalled.wait(WAIT_TIMEOUT_SECONDS)
        server.stalled.clear()
        part = Path(calm.folder, f"{shard.sha256}.part")
        deadline = time.monotonic() + WAIT_TIMEOUT_SECONDS
        while not (half := part.read_bytes()[: shard.bytes // 4]).strip(b"\0") and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        assert half == (tmp_path / "a" / shard.file).read_bytes()[: shard.bytes // 4], "it died in the middle"
        other.stdin.write("\n")
        other.stdin.flush()
        with ThreadPoolExecutor(1) as threads:
            assert server.stalled.wait(WAIT_TIMEOUT_SECONDS), "the other process began, and is held"
            mine = threads.submit(open_copy_path, ShardCache(calm), folder, shard)
            time.sleep(0.1)
            server.resume.set()
            assert mine.result(WAIT_TIMEOUT_SECONDS) == Path(other.stdout.readline().strip())
        other.stdin.close()
    assert equals_original(mine.result(), tmp_path, shard)
    assert server.num_requests(shard_url(shard)) == 2
    assert file_names(calm.folder) == {f"{shard.sha256}.tar"}


def test_what_a_crash_left_is_removed_by_the_next_fetch(server, settings, shards):
    folder = Path(settings().folder)
    folder.mkdir()
    (folder / f"{'0' * 64}.part").write_bytes(b"torn")
    (folder / "notes.txt").write_text("not ours")
    open_copy_path(ShardCache(settings()), f"{server.address}/a", shards[0])
    assert file_names(folder) == {f"{shards[0].sha256}.tar", "notes.txt"}


def settle(server, num_asked: int) -> None:
    """Wait until the server has had this many requests and no prefetch is running."""
    deadline = time.monotonic() + WAIT_TIMEOUT_SECONDS
    while len(server.requests) < num_asked or any(thread.name == "shards-ahead" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_shard_wanted_soon_is_there_when_it_is_asked_for(server, settings, shards, tmp_path):
    cache, folder = ShardCache(settings()), f"{server.address}/a"
    for shard in shards[:4]:
        cache.prefetch(folder, shard)
    settle(server, 4)
    server.shutdown()
    server.socket.close()
    for shard in shards[:4]:
        assert equals_original(open_copy_path(cache, folder, shard), tmp_path, shard)
    assert len(server.requests) == 4


def test_what_fails_ahead_is_logged_and_tried_again_when_it_is_asked_for(server, settings, shards, tmp_path, caplog):
    cache, folder = ShardCache(settings(max_attempts=1)), f"{server.address}/a"
    server.faults[shard_url(shards[0])].append("500")
    server.faults[shard_url(shards[1])].append("404")
    (tmp_path / "a" / shards[2].file).rename(tmp_path / "away")
    cache.prefetch(folder, shards[0])
    cache.prefetch(folder, shards[1])
    cache.prefetch(tmp_path / "a", shards[2])
    settle(server, 2)
    assert len([record for record in caplog.records if "training will try the shard again" in record.message]) == 3
    (tmp_path / "away").rename(tmp_path / "a" / shards[2].file)
    for shard in shards[:2]:
        assert equals_original(open_copy_path(cache, folder, shard), tmp_path, shard)
    assert open_copy_path(cache, tmp_path / "a", shards[2]) == tmp_path / "a" / shards[2].file


def test_what_waits_to_be_fetched_ahead_takes_half_of_the_room(server, settings, shards):
    room_gib = 4 * max(shard.bytes for shard in shards) / GIB
    cache, folder = (
        ShardCache(settings(max_size_gib=room_gib, timeout_seconds=WAIT_TIMEOUT_SECONDS)),
        f"{server.address}/a",
    )
    for shard in shards[:2]:
        server.faults[shard_url(shard)].append("held")
        cache.prefetch(folder, shard)
    deadline = time.monotonic() + WAIT_TIMEOUT_SECONDS
    while len(server.requests) < 2:  # both threads are blocked, so the next request waits
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(shards) >= 5
    for shard in shards[2:]:
        cache.prefetch(folder, shard)
    server.resume.set()
    settle(server, 4)
    assert {path for path, _ in server.requests} == {shard_url(shard) for shard in shards[:4]}


def test_a_run_fetches_the_shards_of_the_next_window_ahead(server, settings, make_corpus):
    make_corpus("a", documents=60)
    whole = TokenReader(server.folder / "a", "a", shuffle_window_tokens=640, shuffle_block_tokens=32)
    windows = [{shard for shard, _, _ in whole.stream.shard_ranges(first, 640)} for first in (0, 640)]
    assert windows[1] - windows[0]
    schedule = make_schedule(PhaseConfig("one", 4096, 16, 2, 1, {"a": 1.0}))
    sizes = {"shuffle_block_tokens": 32, "shuffle_window_tokens": 640, "prefetch_steps": 1}
    there = make_loader({"a": f"{server.address}/a"}, schedule, cache=settings(), **sizes)
    batches = there.batches(0, None)
    next(batches)
    settle(server, 1)
    copies, shards = file_names(settings().folder), there.manifests["a"].train.shards
    assert {f"{shards[index].sha256}.tar" for index in windows[1]} <= copies
    batches.close()


def mapped_bytes(folder) -> int:
    """Return the files of a folder that this process has mapped, including removed ones."""
    found = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            first, last = line.split()[0].split("-")
            found += int(last, 16) - int(first, 16)
    return found


def test_what_stays_mapped_of_copies_is_a_quarter_of_the_room_for_all_streams(
    server, settings, make_corpus, monkeypatch
):
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    here = {name: manifest.load_manifest(make_corpus(name, seed=len(name), documents=120)) for name in ("a", "bb")}
    size_bytes = max(shard.bytes for corpus in here.values() for shard in corpus.train.shards)
    room = settings(max_size_gib=3 * 2 * 4 * size_bytes / GIB)  # of which this process may map three shards
    cache = ShardCache(room)
    read = {}
    for name, corpus in here.items():
        assert len(corpus.train.shards) > 6
        stream = TokenStream(f"{server.address}/{name}", corpus, corpus.train, source=name, seed=0, cache=cache)
        read[name] = stream.read_tokens(0, stream.epoch_tokens)
        local = TokenStream(server.folder / name, corpus, corpus.train, source=name, seed=0)
        assert (read[name] == local.read_tokens(0, stream.epoch_tokens)).all()
    page_bytes = 4096
    assert size_bytes <= mapped_bytes(room.folder) <= 3 * (size_bytes + page_bytes)


def test_a_room_for_one_shard_is_enough_to_read_by(server, settings, make_corpus):
    corpus = manifest.load_manifest(make_corpus("a"))
    cache = ShardCache(settings(max_size_gib=1.5 * max(shard.bytes for shard in corpus.train.shards) / GIB))
    there = TokenStream(f"{server.address}/a", corpus, corpus.train, source="a", seed=0, cache=cache)
    here = TokenStream(server.folder / "a", corpus, corpus.train, source="a", seed=0)
    with ThreadPoolExecutor(3) as threads:
        for found in threads.map(there.read_tokens, [0] * 3, [there.epoch_tokens] * 3):
            assert (found == here.read_tokens(0, there.epoch_tokens)).all()


def test_a_file_system_without_permissions_is_refused_and_does_not_loop(tmp_path, monkeypatch):
    real_open = os.open

    def open_as_vfat_does(*arguments, **options):
        descriptor = real_open(*arguments, **options)
        os.fchmod(descriptor, 0o755)
        return descriptor

    monkeypatch.setattr("os.open", open_as_vfat_does)
    with pytest.raises(PermissionError, match="does not keep the permissions"):
        shard_cache._open_locked(tmp_path / "lock")
