"""One document of a cluster stays, the first in reading order, however the corpus is cut into units and parts."""

import random
from functools import partial

import numpy as np
import pytest

from tandem.data_prep import duplicates
from tandem.data_prep.minhash import signatures
from tandem.trainer.config import UserError


def find(bands, masks, folder, run=map, records=duplicates.RECORDS_PER_RANGE):
    """The stage, by any `map`: how many documents are dropped."""
    parts = duplicates.plan_band_ranges(bands, folder, records)
    for _ in run(partial(duplicates.write_links, tuple(bands)), parts):
        pass
    return duplicates.write_masks(bands, masks, parts)


def expected(rows):
    """Whether each document is linked, over any documents, to an earlier one: plainly."""
    cluster = list(range(len(rows)))
    seen = {}
    for document, row in enumerate(rows.tolist()):
        for place in enumerate(row):
            first = seen.setdefault(place, document)
            old, new = max(cluster[first], cluster[document]), min(cluster[first], cluster[document])
            if old != new:
                cluster = [new if number == old else number for number in cluster]
    return np.array(cluster) != np.arange(len(rows))


def found(folder, rows, cuts=(), **options):
    """The masks of all units together, the rows being cut into units at `cuts`."""
    folder.mkdir(parents=True)
    bands, masks = [], []
    for number, unit in enumerate(np.split(rows, cuts)):
        bands.append(folder / f"{number}.bands.npy")
        masks.append(folder / f"{number}.mask.npy")
        duplicates.write_bands(bands[-1], unit)
    dropped = find(bands, masks, folder, **options)
    together = np.concatenate([np.load(mask) for mask in masks])
    assert (together.dtype, together.sum()) == (bool, dropped)
    return together


@pytest.fixture
def rows():
    """Rows with many links, of all lengths of chain, among values over the whole range."""
    rng = np.random.default_rng(0)
    rows = rng.choice(rng.integers(0, 2**64, 2500, dtype=np.uint64), (500, 3))
    rows[[5, 400], 0], rows[[7, 300], 1] = 0, 2**64 - 1
    return rows


def test_of_each_cluster_the_first_stays(tmp_path, rows):
    truth = expected(rows)
    assert 100 < truth.sum() < 400
    assert (found(tmp_path / "a", rows) == truth).all()


def backwards(function, items):
    return map(function, reversed(items))


def shuffled(function, items):
    return map(function, random.Random(0).sample(list(items), len(items)))


@pytest.mark.parametrize(
    ("cuts", "records", "run"),
    [([250], 500, map), ([1, 2, 499], 100, backwards), ([0, 100, 100, 333, 500], 60, shuffled)],
)
def test_units_parts_and_their_order_change_nothing(tmp_path, rows, cuts, records, run):
    assert (found(tmp_path / "cut", rows, cuts, records=records, run=run) == expected(rows)).all()


@pytest.mark.parametrize("links", [duplicates.LINKS_PER_READ, 3])
def test_links_are_followed_to_the_end(tmp_path, monkeypatch, links):
    """A chain in random order, in which each document is like the next alone."""
    monkeypatch.setattr(duplicates, "LINKS_PER_READ", links)
    rows = np.arange(2 * 300, dtype=np.uint64).reshape(300, 2)
    chain = np.random.default_rng(1).permutation(300)
    rows[chain[:-1], 0] = 1000 + np.arange(299)
    rows[chain[1::2], 1] = 2000 + np.arange(150)
    rows[chain[2::2], 1] = 2000 + np.arange(149)
    rows[chain[1:], 0] = np.where(np.arange(299) % 2, rows[chain[1:], 0], rows[chain[:-1], 0])
    masks = found(tmp_path / "chain", rows, [150])
    assert (masks == (np.arange(300) > 0)).all()


def test_a_killed_stage_goes_on_with_what_is_missing(tmp_path, rows):
    truth = found(tmp_path / "whole", rows, [200], records=100)

    def killed(function, items):
        for item in items[:4]:
            yield function(item)
        (items[4].links_path.parent / (items[4].links_path.name + ".tmp")).write_bytes(b"half a lin")
        raise KeyboardInterrupt

    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        found(folder, rows, [200], records=100, run=killed)
    done = {path: path.stat().st_mtime_ns for path in folder.glob("links-*[0-9]")}
    assert len(done) == 4
    bands, masks = ([folder / f"{number}.{kind}.npy" for number in range(2)] for kind in ("bands", "mask"))
    find(bands, masks, folder, records=100)
    assert (np.concatenate([np.load(mask) for mask in masks]) == truth).all()
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_a_part_that_is_cut_short_leaves_nothing_that_could_pass_for_it(tmp_path, rows):
    bands = [tmp_path / "0.npy", tmp_path / "1.npy"]
    duplicates.write_bands(bands[0], rows)
    part = duplicates.BandRange(0, 0, 2**64, tmp_path / "links")
    with pytest.raises(UserError, match=r"1.npy: cannot be read \(No such file or directory\); remove"):
        duplicates.write_links(bands, part)
    assert not part.links_path.exists()
    duplicates.write_links(bands[:1], part)
    assert part.links_path.stat().st_size > 0


def test_near_copies_of_texts_go_over_unit_borders_and_the_rest_stays(tmp_path):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghijklmnop ", k=600)) for _ in range(40)]
    near = [text[:300].upper() + "\n-- " + text[300:595] for text in texts[:10]]
    half = [text[:400] + "".join(rng.choices("qrstuvwxyz", k=200)) for text in texts[10:20]]
    masks = found(tmp_path / "texts", signatures([*texts, *half, *near, *near]), [45, 52])
    assert masks.tolist() == [False] * 50 + [True] * 20


def test_a_corpus_without_documents_has_no_duplicates(tmp_path):
    assert found(tmp_path / "none", np.empty((0, 9), np.uint64)).shape == (0,)
    assert find([], [], tmp_path) == 0
