"""`--tokens` reads shards through webdataset, so it finds errors of our own reader that agree with all hashes."""

import dataclasses
import hashlib
import io
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from xxhash import xxh3_128

from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tandem.trainer.disk import atomic_write
from tests.trainer.data.faulty_server import FaultyServer
from tests.trainer.tools.audit.runs import (
    FRESH_STATE,
    LONG_PHASE,
    SHORT_PHASE,
    findings,
    make_corpus,
    run_audit,
    webdataset_reader,
    write_ledger,
)

SHARD_INDEX = 0
FILE = f"train-{SHARD_INDEX:06d}.tar"


def change_header(content: bytes, member: int, **changes) -> bytes:
    """Change one header of a shard. Every byte that the loader reads as a token stays in place."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        header = tar.getmembers()[member]
    start = header.offset
    for name, value in changes.items():
        setattr(header, name, value)
    return content[:start] + header.tobuf(tarfile.USTAR_FORMAT) + content[start + tarfile.BLOCKSIZE :]


def append_member(content: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    extra = tarfile.TarInfo(last.name.replace(".u16", "-extra.u16"))
    extra.size = 6
    member = extra.tobuf(tarfile.USTAR_FORMAT) + b"\1\0\2\0\3\0".ljust(tarfile.BLOCKSIZE, b"\0")
    return content[:end] + member + bytes(2 * tarfile.BLOCKSIZE)


@pytest.fixture
def run_on(tmp_path) -> Callable[..., tuple[Path, dict[str, str]]]:
    """run_on(change): a run on corpora with one changed shard of "b". The manifest has the hashes of the changed shard."""

    def make(change: Callable[[bytes], bytes]) -> tuple[Path, dict[str, str]]:
        sources = {"a": make_corpus(tmp_path / "a", 1, 90), "b": make_corpus(tmp_path / "b", 2, 16)}
        corpus, path = manifest.load_manifest(sources["b"]), tmp_path / "b" / FILE
        content = change(path.read_bytes())
        path.write_bytes(content)
        shards = list(corpus.train.shards)
        shards[SHARD_INDEX] = dataclasses.replace(
            shards[SHARD_INDEX],
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            xxh3_128=xxh3_128(content).hexdigest(),
        )
        corpus = dataclasses.replace(corpus, train=dataclasses.replace(corpus.train, shards=shards))
        atomic_write(tmp_path / "b" / manifest.MANIFEST_FILE, manifest.dump_manifest(corpus))
        run = tmp_path / "run"
        run.mkdir()
        write_ledger(run, sources, [SHORT_PHASE, LONG_PHASE], FRESH_STATE, 12, 1)
        assert findings(run) == [], "without --tokens: hashes, ranges and the loader's own digests agree"
        return run, sources

    return make


@pytest.mark.parametrize(
    ("change", "first_token", "lost_tokens"),
    [
        # A header that ends its sample a token early: the offsets skip the padding that webdataset believes in.
        (lambda content: change_header(content, 0, size=2 * 511), 511, 1),
        # A folder that webdataset takes for metadata and skips.
        (lambda content: change_header(content, 0, name="__meta__/first.u16"), 0, 512),
        # Another type of token: a client asks the sample for u16 and finds none.
        (lambda content: change_header(content, 0, name="train-000000-000000.u32"), 0, 512),
    ],
    ids=["short", "metadata", "other field"],
)
def test_a_shard_whose_members_are_not_where_the_loader_looks_is_named_with_the_range(
    run_on, change, first_token, lost_tokens
):
    run, sources = run_on(change)
    *steps, miscounted = run_audit(run, webdataset_reader(sources)).findings
    num_tokens = manifest.load_manifest(sources["b"]).train.shards[SHARD_INDEX].tokens
    assert steps
    for found in steps:
        assert f"step {found.step} was fed other tokens than its ranges hold: {FILE}:" in found.message
        assert "webdataset and the loader's byte offsets read these differently" in found.message
        for name in found.shard_ranges:
            file, first, tokens = name.replace("+", ":").split(":")
            assert (file, int(first) + int(tokens) > first_token) == (FILE, True)
    assert miscounted.message == (
        f"webdataset reads {num_tokens - lost_tokens} tokens from {FILE} of b; the manifest lists {num_tokens}: "
        f"{FILE}:{num_tokens - lost_tokens}+{lost_tokens}"
    )


def test_tokens_of_a_shard_that_its_manifest_does_not_count_are_named(run_on):
    run, sources = run_on(append_member)
    [found] = run_audit(run, webdataset_reader(sources)).findings
    num_tokens = manifest.load_manifest(sources["b"]).train.shards[SHARD_INDEX].tokens
    assert (found.kind, found.source, found.shard_ranges) == ("unlike", "b", [f"{FILE}:{num_tokens}+3"])


@pytest.mark.parametrize(
    "change",
    [
        lambda content: change_header(content, 1, name="train-000000-000000.u16"),  # two samples of one name
        lambda content: b"\1" * tarfile.BLOCKSIZE + content[tarfile.BLOCKSIZE :],
    ],
    ids=["one name twice", "no header"],
)
def test_a_shard_that_webdataset_cannot_read_is_the_users_to_replace(run_on, change):
    run, sources = run_on(change)
    with pytest.raises(
        UserError, match=rf"b/{FILE}: webdataset cannot read the shard \(.+\); prepare the corpus again$"
    ):
        run_audit(run, webdataset_reader(sources))


def test_shards_at_a_remote_address_are_read_through_the_cache(run_on, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    run, _ = run_on(lambda content: change_header(content, 0, size=2 * 511))
    with FaultyServer(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        addresses = {name: f"{server.address}/{name}" for name in "ab"}
        found = run_audit(run, webdataset_reader(addresses, tmp_path / "copies")).findings
        server.shutdown()
        thread.join()
    assert f"train-{SHARD_INDEX:06d}.tar" in found[0].message
    assert server.num_requests(f"/b/{FILE}") == 1
