"""A shard from a failing server is fetched, or the run stops with the reason."""

import logging
import os
import re
import time

import pytest

from tandem.trainer.config import PhaseConfig, UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.damaged_shards import batches_skipping_damaged
from tandem.trainer.data.manifest import DamagedShard
from tandem.trainer.data.shard_cache import ShardCache
from tests.trainer.data.loaders import make_loader, make_schedule, merged_steps
from tests.trainer.data.shard_copies import (
    SHORT_TIMEOUT_SECONDS,
    equals_original,
    file_names,
    open_copy_path,
    shard_url,
)


@pytest.mark.parametrize(
    "fault", ["silence", "stalled", "500", "403", "reset", "truncated", "shorter", "longer", "wrong"]
)
def test_a_failure_is_logged_and_tried_again(server, settings, shards, tmp_path, caplog, fault):
    # aiohttp retries once on its own if the connection was reset.
    faults = [fault] * (2 if fault == "reset" else 1)
    server.faults[shard_url(shards[0])] += faults
    timeout_seconds = SHORT_TIMEOUT_SECONDS if fault in ("silence", "stalled") else 5 * SHORT_TIMEOUT_SECONDS
    copy = open_copy_path(ShardCache(settings(timeout_seconds=timeout_seconds)), f"{server.address}/a", shards[0])
    assert equals_original(copy, tmp_path, shards[0])
    assert server.num_requests(shard_url(shards[0])) == len(faults) + 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"{server.address}{shard_url(shards[0])}: attempt 1 of 4 failed (")
    assert record.message.endswith(f"; retry in {timeout_seconds / 64:.3g} s")
    assert file_names(settings().folder) == {f"{shards[0].sha256}.tar"}


def test_a_broken_download_goes_on_where_it_broke(server, settings, shards, tmp_path):
    server.faults[shard_url(shards[0])] += ["truncated", "shorter"]
    assert equals_original(
        open_copy_path(ShardCache(settings()), f"{server.address}/a", shards[0]), tmp_path, shards[0]
    )
    assert server.sent_bytes == shards[0].bytes
    half, quarter = shards[0].bytes // 2, (shards[0].bytes + 1) // 2 // 2
    assert [span for _, span in server.requests] == ["", f"bytes={half}-", f"bytes={half + quarter}-"]


def test_a_server_without_ranges_starts_over(server, settings, shards, tmp_path):
    server.faults[shard_url(shards[0])] += ["truncated", "no ranges"]
    assert equals_original(
        open_copy_path(ShardCache(settings()), f"{server.address}/a", shards[0]), tmp_path, shards[0]
    )
    assert server.sent_bytes == shards[0].bytes // 2 + shards[0].bytes


def test_slow_is_no_failure_while_bytes_come(server, settings, shards, tmp_path, caplog):
    server.faults[shard_url(shards[0])].append("trickle")
    start = time.monotonic()
    assert equals_original(
        open_copy_path(ShardCache(settings(timeout_seconds=SHORT_TIMEOUT_SECONDS)), f"{server.address}/a", shards[0]),
        tmp_path,
        shards[0],
    )
    assert time.monotonic() - start > SHORT_TIMEOUT_SECONDS
    assert not caplog.records


UNREACHABLE, DAMAGED = "restore the connection to it, and start again", "restore it"


def test_a_shard_that_comes_too_slowly_is_unreachable_and_leaves_nothing(server, settings, shards):
    server.faults[shard_url(shards[0])].append("drip always")
    impatient = settings(timeout_seconds=0.3, max_attempts=2, min_bytes_per_second=1e4)
    reason = r"attempts: 2 in [\d.]+ s, last error: only \d+ bytes came in .* data.cache.min_bytes_per_second is 10000"
    with pytest.raises(UserError, match=rf"the shard cannot be fetched \({reason}\); {UNREACHABLE}"):
        ShardCache(impatient).open_shard(f"{server.address}/a", shards[0])
    assert file_names(impatient.folder) == set()


@pytest.mark.parametrize(
    ("fault", "tries", "reason", "remedy"),
    [
        ("500", 4, "ClientResponseError: 500, message='Internal Server Error'", UNREACHABLE),
        ("403", 4, "ClientResponseError: 403", UNREACHABLE),
        ("silence", 4, "FSTimeoutError: no bytes came in time", UNREACHABLE),
        ("404", 1, "FileNotFoundError", DAMAGED),
        ("410", 1, "ClientResponseError: 410", DAMAGED),
        ("wrong", 2, r"the sha256 is \w{12}, not \w{12} as in the manifest, twice in a row", DAMAGED),
        ("longer", 2, r"longer than the \d+ bytes in the manifest, twice in a row", DAMAGED),
    ],
)
def test_only_a_shard_whose_server_answers_without_it_is_damaged(
    server, settings, shards, fault, tries, reason, remedy
):
    server.faults[shard_url(shards[0])].append(f"{fault} always")
    timeout_seconds = SHORT_TIMEOUT_SECONDS if fault == "silence" else 5 * SHORT_TIMEOUT_SECONDS
    with pytest.raises(UserError) as error:
        ShardCache(settings(timeout_seconds=timeout_seconds)).open_shard(f"{server.address}/a", shards[0])
    assert re.fullmatch(
        rf"{server.address}{shard_url(shards[0])}: the shard cannot be fetched "
        rf"\(attempts: {tries} in [\d.e-]+ s, last error: [^\n]*{reason}[^\n]*\); {remedy}",
        str(error.value),
    )
    assert isinstance(error.value, DamagedShard) == (remedy == DAMAGED)
    if remedy == DAMAGED:
        assert error.value.file == shards[0].file
    assert server.num_requests(shard_url(shards[0])) == tries
    assert not file_names(settings().folder)


def test_a_place_that_has_vanished_as_a_whole_is_no_damage_of_its_shards(server, settings, shards, tmp_path):
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"/a: no longer has a manifest.json \(.*\); restore the folder") as error:
        ShardCache(settings()).open_shard(f"{server.address}/a", shards[0])
    assert not isinstance(error.value, DamagedShard)


def test_a_shard_that_its_server_has_a_part_of_is_damaged(server, settings, shards, tmp_path):
    os.truncate(tmp_path / "a" / shards[0].file, shards[0].bytes - 100)
    size = shards[0].bytes
    ended = rf"attempts: 2 .*: the file ended at byte {size - 100} of {size}, twice in a row\); restore it"
    with pytest.raises(DamagedShard, match=ended):
        ShardCache(settings()).open_shard(f"{server.address}/a", shards[0])


def test_a_server_that_is_not_there_stops_the_run_after_the_tries(settings, shards, caplog):
    with pytest.raises(
        UserError, match=r"attempts: 3 in .* s, .*ClientConnectorError.*; restore the connection to it"
    ) as error:
        ShardCache(settings(max_attempts=3)).open_shard("http://127.0.0.1:1/a", shards[0])
    assert not isinstance(error.value, DamagedShard)
    assert [record.message.split(" of ")[0][-1] for record in caplog.records] == ["1", "2"]


def test_rows_read_over_a_network_that_fails_are_those_of_the_folder(server, settings, make_corpus, caplog):
    corpus = manifest.load_manifest(make_corpus("a", documents=140))
    faults = ["500", "truncated", "stalled", "wrong", "shorter", "longer", "403"]
    for number, shard in enumerate(corpus.train.shards):
        server.faults[shard_url(shard)] += [faults[number % len(faults)], faults[(number + 1) % len(faults)]]
    assert len(corpus.train.shards) >= len(faults)
    num_steps = 2 * corpus.train.tokens // (4 * 16) + 1
    schedule = make_schedule(PhaseConfig("one", num_steps * 4 * 16, 16, 4, 1, {"a": 1.0}))
    sizes = {"shuffle_block_tokens": 32, "shuffle_window_tokens": 256}
    cache = settings(timeout_seconds=SHORT_TIMEOUT_SECONDS)
    there = make_loader({"a": f"{server.address}/a"}, schedule, num_workers=2, prefetch_steps=4, cache=cache, **sizes)
    here = make_loader({"a": str(server.folder / "a")}, schedule, num_workers=0, **sizes)
    assert list(merged_steps([there])) == list(merged_steps([here]))
    assert there.fingerprints == here.fingerprints
    assert {record.message.split("/a/")[1].split(":")[0] for record in caplog.records} == {
        shard.file for shard in corpus.train.shards
    }, "a failure of every shard is on record"


@pytest.mark.parametrize("damaged_shards", ["stop", "skip"])
def test_a_run_stops_where_a_shard_cannot_be_reached_also_one_that_skips_damage(
    server, settings, make_corpus, damaged_shards
):
    shard = manifest.load_manifest(make_corpus("a", documents=60)).train.shards[2]
    server.faults[shard_url(shard)].append("500 always")
    schedule = make_schedule(PhaseConfig("one", 4096, 16, 4, 1, {"a": 1.0}))
    there = make_loader(
        {"a": f"{server.address}/a"}, schedule, cache=settings(max_attempts=2), damaged_shards=damaged_shards
    )
    batches = batches_skipping_damaged(
        there, 0, None, lambda met: [met] if met else [], lambda step, met: there.skip_shard(*met)
    )
    with pytest.raises(
        UserError, match=rf"{server.address}{shard_url(shard)}: the shard cannot be fetched .attempts: 2 in .*500"
    ):
        list(batches)
    assert not there.skipped_shards
