import importlib.util
import os
import re

import pytest

from tandem.trainer.config import ShardCacheConfig, UserError
from tandem.trainer.data import remote_files
from tests.trainer.data.shard_copies import SHORT_TIMEOUT_SECONDS

QUICK = ShardCacheConfig(max_attempts=4, timeout_seconds=SHORT_TIMEOUT_SECONDS)
CONTENT = bytes(range(256)) * 200


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "in" / "x.bin"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


def test_every_file_below_an_address_is_listed_in_the_order_of_the_names(server, tmp_path):
    for name in ("b/2.jsonl", "b/1.jsonl", "a b.jsonl", "b-/0.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    found = remote_files.list_files(f"{server.address}/in/", QUICK)
    assert [(file.name, file.size_bytes) for file in found] == [
        ("a b.jsonl", 9), ("b/1.jsonl", 9), ("b/2.jsonl", 9), ("b-/0.txt", 8)
    ]  # fmt: skip
    for file in found:
        assert remote_files.read_bytes(file.address, QUICK).decode() == file.name
    assert [file.name for file in remote_files.list_files(f"{server.address}/in/**/*.jsonl", QUICK)] == [
        "a b.jsonl", "b/1.jsonl", "b/2.jsonl"
    ]  # fmt: skip
    assert remote_files.list_files(f"{server.address}/in/b/1.jsonl", QUICK)[0].name == "1.jsonl"


def test_a_file_that_changes_has_another_version(server, file):
    (before,) = remote_files.list_files(f"{server.address}/in/x.bin", QUICK)
    (same,) = remote_files.list_files(f"{server.address}/in/x.bin", QUICK)
    os.utime(file, (0, 0))
    (after,) = remote_files.list_files(f"{server.address}/in/x.bin", QUICK)
    assert before == same
    assert before.version != after.version


def test_an_address_that_cannot_be_listed_is_one_line(server):
    with pytest.raises(UserError, match=r"/\*\*.txt: cannot be read .*pattern"):
        remote_files.list_files(f"{server.address}/**.txt", QUICK)
    with pytest.raises(UserError, match=r"/none.txt: cannot be read .*404") as caught:
        remote_files.list_files(f"{server.address}/none.txt", QUICK)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"127.0.0.1:1/.*: cannot be read .*ClientConnectorError"):
        remote_files.list_files("http://127.0.0.1:1/x.txt", QUICK)


def test_what_is_read_through_failures_is_what_is_there(server, file, caplog):
    server.faults["/in/x.bin"] += ["500", "truncated", "stalled", "503", "no ranges"]
    with remote_files.open_file(f"{server.address}/in/x.bin", QUICK) as opened:
        assert opened.read() == CONTENT
    tries = [
        re.search(r"x.bin: (attempt \d of 4) failed \((\w+)", record.message).groups() for record in caplog.records
    ]
    assert tries == [
        ("attempt 1 of 4", "ClientResponseError"), ("attempt 1 of 4", "ClientPayloadError"),
        ("attempt 1 of 4", "FSTimeoutError"), ("attempt 2 of 4", "ClientResponseError"),
    ], "an attempt that returns bytes resets the count"  # fmt: skip


def test_a_read_may_begin_anywhere(server, file):
    with remote_files.open_file(f"{server.address}/in/x.bin", QUICK) as opened:
        assert opened.read(10) == CONTENT[:10]
        assert opened.seek(-300, os.SEEK_END) == len(CONTENT) - 300
        assert opened.read(20) == CONTENT[-300:-280]
        assert opened.seek(1000) == opened.tell() == 1000
        assert opened.read(7) == CONTENT[1000:1007]
        assert opened.tell() == 1007
        opened.seek(0, os.SEEK_END)
        assert opened.read() == b""


def test_reading_stops_after_the_tries(server, file):
    server.faults["/in/x.bin"].append("500 always")
    with (
        pytest.raises(remote_files.RemoteError, match="500"),
        remote_files.open_file(f"{server.address}/in/x.bin", QUICK) as opened,
    ):
        opened.read()
    assert server.num_requests("/in/x.bin") == QUICK.max_attempts


def test_a_file_that_changes_while_it_is_read_is_not_mixed(server, file):
    server.faults["/in/x.bin"] += ["stalled"]
    with remote_files.open_file(f"{server.address}/in/x.bin", QUICK) as opened:
        assert opened.read1(10) == CONTENT[:10]
        os.utime(file, (0, 0))
        with pytest.raises(OSError, match="changed while it was read"):
            opened.read()


@pytest.mark.parametrize(("status", "tries"), [("403", 1), ("404", 1), ("503", 4)])
def test_small_files_are_tried_again_unless_that_is_no_use(server, file, status, tries):
    server.faults["/in/x.bin"].append(f"{status} always")
    with pytest.raises(remote_files.RemoteError):
        remote_files.read_bytes(f"{server.address}/in/x.bin", QUICK)
    assert server.num_requests("/in/x.bin") == tries


IMPATIENT = ShardCacheConfig(max_attempts=2, timeout_seconds=0.3, min_bytes_per_second=1e4)


@pytest.mark.parametrize("fault", ["drip", "slow headers"])
def test_a_server_that_sends_too_slowly_is_given_up_after_the_tries(server, file, fault):
    """It sends a byte often enough for every timeout of a read. The bytes of an attempt must not reset the count."""
    server.faults["/in/x.bin"].append(f"{fault} always")
    address, reason = f"{server.address}/in/x.bin", "no bytes came in time"
    if fault == "drip":
        reason = r"only \d+ bytes came in \d.\d+ s; data.cache.min_bytes_per_second is 10000"
    with pytest.raises(remote_files.RemoteError, match=reason):
        remote_files.read_bytes(address, IMPATIENT)
    assert server.num_requests("/in/x.bin") == IMPATIENT.max_attempts
    with pytest.raises(remote_files.RemoteError, match=reason), remote_files.open_file(address, IMPATIENT) as opened:
        opened.read()


def test_a_slow_server_is_read_if_its_rate_is_high_enough(server, file):
    server.faults["/in/x.bin"].append("trickle")
    patient = ShardCacheConfig(max_attempts=1, timeout_seconds=0.4, min_bytes_per_second=1e3)
    assert remote_files.read_bytes(f"{server.address}/in/x.bin", patient) == CONTENT


def test_a_file_without_an_end_is_refused_and_not_tried_again(server, file):
    server.faults["/in/x.bin"].append("endless always")
    with pytest.raises(OSError, match=r"x.bin: has more than 100,000 bytes, so it is not the file that belongs there"):
        remote_files.read_bytes(f"{server.address}/in/x.bin", QUICK, max_bytes=100_000)
    assert server.num_requests("/in/x.bin") == 1
    assert server.sent_bytes < 64 << 20, "the download ends at the limit, apart from what the buffers hold"


def test_an_index_without_an_end_is_refused(server, file, monkeypatch):
    monkeypatch.setattr(remote_files, "MAX_INDEX_BYTES", 100_000)
    server.faults["/in/"].append("endless always")
    with pytest.raises(UserError, match=r"/in/: cannot be read \(.*the index has more than 100,000 bytes"):
        remote_files.list_files(f"{server.address}/in/", IMPATIENT)


def test_a_file_longer_than_announced_is_not_read_beyond_its_size(server, file):
    server.faults["/in/x.bin"].append("longer always")
    with (
        pytest.raises(remote_files.FileChanged, match="the server sends more than the 51200 bytes that it announced"),
        remote_files.open_file(f"{server.address}/in/x.bin", QUICK) as opened,
    ):
        opened.read()


@pytest.mark.parametrize(
    ("target", "reason"), [("file:///etc/passwd", "NonHttpUrlRedirect"), ("/in/x.bin", "TooManyRedirects")]
)
def test_redirects_to_other_schemes_and_in_circles_are_not_followed(server, file, target, reason):
    server.faults["/in/x.bin"].append(f"to {target} always")
    with pytest.raises(remote_files.RemoteError, match=reason):
        remote_files.read_bytes(f"{server.address}/in/x.bin", IMPATIENT)


def test_a_compressed_file_comes_as_it_is_stored(server, tmp_path):
    """Some servers declare .gz files as gzip-encoded. If the client decompressed them, their reader would find no gzip."""
    (tmp_path / "x.gz").write_bytes(b"not really gzip")
    server.content_encoding = "gzip"
    assert remote_files.read_bytes(f"{server.address}/x.gz", QUICK) == b"not really gzip"


def test_what_cannot_be_read_names_what_can_or_what_to_install():
    with pytest.raises(UserError, match=r"ftp://a/b: ftp:// is not supported; .* http, https, s3, gs"):
        remote_files.read_bytes("ftp://a/b")
    for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs")):
        if importlib.util.find_spec(package) is None:
            with pytest.raises(UserError, match=rf"{scheme}://a/b: .*{package}.*pip install 'tandem\[{scheme}\]'"):
                remote_files.read_bytes(f"{scheme}://a/b")
