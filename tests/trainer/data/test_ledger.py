"""The ledger contains one complete line per write, however its process ended."""

import io
import json
import math
import os
import random

import pytest

from tandem.trainer.data import manifest
from tandem.trainer.data.digests import Digests, pack_u64, unpack_u64
from tandem.trainer.data.ledger import (
    LEDGER_FILE,
    Ledger,
    RollbackHistory,
    copy_manifests,
    manifest_copy_path,
    read_rollbacks,
)
from tandem.trainer.data.manifest import CorpusManifest, CorpusSplit, Shard

START = {
    "shuffle_settings": {"run.seed": 7, "data.shuffle_block_tokens": 64, "data.shuffle_window_tokens": 320},
    "phases": [{"name": "p"}],
    "fingerprints": {"a": "f"},
    "skipped_shards": {"a": ["train-000003.tar"]},
    "dp_size": 4,
}


def write(folder, steps=2):
    ledger = Ledger(folder)
    ledger.write_start(5, {"a": 100}, **START)
    for step in range(6, 6 + steps):
        ledger.write_step(step, {"a": 100 + 32 * (step - 5), "b": 64, "c": 0}, Digests(255, 2**64 - 1))
    ledger.close()


def lines(folder):
    return [json.loads(line) for line in (folder / LEDGER_FILE).read_text().splitlines()]


def test_lines_say_what_fixes_the_data_and_what_each_step_took(tmp_path):
    write(tmp_path)
    start, first, second = lines(tmp_path)
    assert start.pop("time") > 0
    assert start == {
        "kind": "start",
        "step": 5,
        "num_ledger_lines": 0,
        "cursor": {"a": 100},
        "seed": 7,
        "shuffle_block_tokens": 64,
        "shuffle_window_tokens": 320,
        "phases": [{"name": "p"}],
        "fingerprints": {"a": "f"},
        "skipped_shards": {"a": ["train-000003.tar"]},
        "dp_size": 4,
        "skipped_ranges": {},
        "is_rollback": False,
    }
    hexadecimal = {"ranges_digest": "00000000000000ff", "tokens_digest": "ffffffffffffffff"}
    assert first == {"kind": "step", "step": 6, "read_ranges": {"a": [100, 132], "b": [0, 64]}, **hexadecimal}
    assert second == {"kind": "step", "step": 7, "read_ranges": {"a": [132, 164]}, **hexadecimal}


def test_a_step_is_on_disk_at_once_and_the_file_only_grows(tmp_path):
    write(tmp_path, steps=1)
    before = (tmp_path / LEDGER_FILE).read_bytes()
    ledger = Ledger(tmp_path)
    ledger.write_start(5, {"a": 100}, **START)
    ledger.write_skipped_shard(6, "a", "train-000001.tar")
    ledger.write_step(6, {"a": 132}, Digests(1, 2))
    content = (tmp_path / LEDGER_FILE).read_bytes()
    ledger.close()
    assert content.startswith(before)
    assert [line["kind"] for line in lines(tmp_path)] == ["start", "step", "start", "skip", "step"]
    assert lines(tmp_path)[3] == {"kind": "skip", "step": 6, "source": "a", "shard": "train-000001.tar"}


def test_every_line_is_one_write(tmp_path, monkeypatch):
    """Otherwise a kill could leave the start of one line followed by the end of another."""
    ledger, sizes = Ledger(tmp_path), []
    file = ledger._file

    class Watched(io.RawIOBase):
        def write(self, line):
            sizes.append(line)
            return file.write(line)

    ledger._file = Watched()
    ledger.write_start(0, {}, **START)
    ledger.write_step(1, {"a": 32}, Digests(1, 2))
    file.close()
    assert len(sizes) == 2
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in sizes)


@pytest.mark.parametrize("tail", [b"", b"{", b'{"kind":"step","step":8,"re', b"\0" * 70_000])
def test_a_torn_last_line_is_cut_and_nothing_else(tmp_path, tail):
    write(tmp_path)
    before = (tmp_path / LEDGER_FILE).read_bytes()
    (tmp_path / LEDGER_FILE).write_bytes(before + tail)
    Ledger(tmp_path).close()
    assert (tmp_path / LEDGER_FILE).read_bytes() == before


def test_a_ledger_of_a_torn_line_alone_is_empty_again(tmp_path):
    (tmp_path / LEDGER_FILE).write_bytes(b'{"kind"')
    Ledger(tmp_path).close()
    assert (tmp_path / LEDGER_FILE).read_bytes() == b""


def test_synced_means_synced(tmp_path, monkeypatch):
    synced = []
    ledger = Ledger(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    ledger.sync()
    ledger.close()
    assert synced == [(tmp_path / LEDGER_FILE).stat().st_ino]


def test_a_checkpoint_learns_after_which_line_it_is_made_and_a_start_says_it(tmp_path):
    write(tmp_path)
    with (tmp_path / LEDGER_FILE).open("ab") as file:
        file.write(b'{"torn')
    ledger = Ledger(tmp_path)
    assert ledger.num_lines == 3
    ledger.write_start(7, {}, **START, num_ledger_lines=3)
    ledger.write_skipped_shard(8, "a", "train-000001.tar")
    assert ledger.num_lines == len(lines(tmp_path)) == 5
    ledger.close()
    assert [line.get("num_ledger_lines") for line in lines(tmp_path)] == [0, None, None, 3, None]


def test_a_bad_step_says_why_and_what_became_of_the_run_in_json(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.write_bad_step(41, math.nan, math.inf, "loss nan", "skip")
    ledger.write_bad_step(42, 11.25, 3.0, "loss 11.25 is 14.3 sigmas above", "rollback")
    ledger.close()
    first, second = lines(tmp_path)
    assert first == {
        "kind": "bad", "step": 41, "loss": None, "grad_norm": None, "reason": "loss nan", "action": "skip",
    }  # fmt: skip
    assert (second["loss"], second["grad_norm"], second["action"]) == (11.25, 3.0, "rollback")


def go_back(folder, step, after, cursor, rollback=True):
    ledger = Ledger(folder)
    passed = {source: (100, end) for source, end in cursor.items()}
    ledger.write_start(step, cursor, **START, num_ledger_lines=after, skipped_ranges=passed, is_rollback=rollback)
    ledger.write_step(step + 1, {"a": cursor["a"] + 32}, Digests(1, 2))
    ledger.close()


def test_a_run_that_goes_on_learns_how_often_it_went_back_to_its_checkpoint_and_to_where(tmp_path):
    assert read_rollbacks(tmp_path, 5, 0) == RollbackHistory(0, None, {}), "there is no ledger yet"
    write(tmp_path, steps=1)
    assert read_rollbacks(tmp_path, 6, 2) == RollbackHistory(0, None, {})
    go_back(tmp_path, 6, 2, {"a": 400})
    assert (lines(tmp_path)[2]["skipped_ranges"], lines(tmp_path)[2]["is_rollback"]) == ({"a": [100, 400]}, True)
    go_back(tmp_path, 6, 2, {"a": 500})
    assert read_rollbacks(tmp_path, 6, 2) == RollbackHistory(2, {"a": 500}, START["skipped_shards"])
    go_back(tmp_path, 6, 2, {"a": 501}, rollback=False)
    go_back(tmp_path, 6, 3, {"a": 600})
    go_back(tmp_path, 7, 2, {"a": 700})
    with (tmp_path / LEDGER_FILE).open("ab") as file:
        for mark in (b"1}\n", b"tr"):  # the trainer writes neither
            file.write(b'{"kind":"start","step":6,"num_ledger_lines":2,"cursor":{"a":9},"is_rollback":' + mark)
    assert read_rollbacks(tmp_path, 6, 2) == RollbackHistory(2, {"a": 500}, START["skipped_shards"]), (
        "starts of processes and other checkpoints are not meant"
    )
    assert read_rollbacks(tmp_path, 6, 3) == RollbackHistory(1, {"a": 600}, START["skipped_shards"])


def test_evidence_adds_up_over_ranks_without_rounding_and_modulo_2_to_the_64():
    draw = random.Random(0)
    for tp_size, dp_size in ((1, 1), (1, 6), (2, 3), (8, 384)):
        parts = [Digests(draw.getrandbits(64), draw.getrandbits(64)) for _ in range(dp_size)]
        summed = [tp_size * sum(values) for values in zip(*map(pack_u64, parts), strict=True)]
        expected = Digests(
            sum(part.ranges_digest for part in parts) % 2**64, sum(part.tokens_digest for part in parts) % 2**64
        )
        assert unpack_u64([float(value) for value in summed], tp_size) == expected
    assert pack_u64(None) == []
    assert unpack_u64([], 2) is None


def test_ranks_of_one_replica_that_read_other_rows_are_an_error():
    one, other = pack_u64(Digests(1, 1)), pack_u64(Digests(2, 1))
    with pytest.raises(RuntimeError, match="not divisible by tp_size 2"):
        unpack_u64([first + second for first, second in zip(one, other, strict=True)], 2)


def test_manifests_are_copied_whole_under_the_names_of_their_sources(tmp_path):
    split = CorpusSplit(10, 1, [Shard("train-000000.tar", 1024, 10, 1, "0" * 64, "0" * 32)])
    corpus = CorpusManifest(
        "uint16", 512, 500, "<eos>", 0, "1" * 64, 0.0, {}, {}, train=split, validation=CorpusSplit(0, 0, [])
    )
    run = tmp_path / "run"
    run.mkdir()
    copy_manifests(run, {"plain": corpus, "a/b": corpus})
    copies = [manifest_copy_path(run, source) for source in ("plain", "a/b")]
    assert sorted(copies) == sorted((run / "manifests").iterdir()), "and nothing half written beside them"
    assert copies[0].name == "plain.json"
    assert [copy.read_text() for copy in copies] == [manifest.dump_manifest(corpus)] * 2
