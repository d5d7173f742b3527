"""Signatures follow the definition exactly, and find what their curve says."""

import random
import re
import string

import numpy as np
import pytest

from tandem.data_prep import minhash
from tandem.data_prep.minhash import NGRAM_SIZE, NUM_BANDS, ROWS_PER_BAND, signatures

TEXTS = [
    "",
    "---",
    "+++",
    "a",
    "A, a.",
    "twelve chars",
    "thirteen char",
    "  Tabs\tand \u00a0 spaces,\n\nand (punctuation)!  ",
    "\u0130stanbul \u03a3\u039f\u03a3 caf\u00e9 \u6f22\u5b57 \U0001f642 \ud800 and then some more",
    "long " * 500,
]


def words(rng, size):
    return "".join(rng.choices(string.ascii_letters + string.digits + " .,\n\u00e9\u6f22", k=size))


def mixed(value):
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ value >> 33) * factor % 2**64
    return value ^ value >> 33


def polynomial(values):
    total = 0
    for value in values:
        total = (total * 0x9E3779B97F4A7C15 + int(value)) % 2**64
    return total


def defined(text):
    """The signature by its definition, one gram and one function at a time."""
    simple = text.lower().translate(str.maketrans("", "", string.punctuation))
    simple = re.sub(r"\s+", " ", simple.strip()) or text
    simple = simple.ljust(NGRAM_SIZE, "\0")
    grams = {simple[at : at + NGRAM_SIZE] for at in range(len(simple) - NGRAM_SIZE + 1)}
    hashes = [mixed(polynomial(map(ord, gram))) for gram in grams]
    minima = [min(((h >> 32) + k * h) % 2**32 for h in hashes) for k in range(NUM_BANDS * ROWS_PER_BAND)]
    return [mixed(polynomial(minima[band * ROWS_PER_BAND : (band + 1) * ROWS_PER_BAND])) for band in range(NUM_BANDS)]


def test_signatures_are_what_the_definition_says():
    rng = random.Random(0)
    texts = [*TEXTS, *(words(rng, size) for size in (12, 13, 14, 40, 300))]
    assert signatures(texts).tolist() == [defined(text) for text in texts]


def test_signatures_do_not_depend_on_the_batch_nor_on_blocks(monkeypatch):
    rng = random.Random(1)
    texts = [words(rng, rng.choice([0, 5, 13, 14, 30, 300])) for _ in range(40)] + TEXTS[:-1]
    alone = np.concatenate([signatures([text]) for text in texts])
    assert (signatures(texts) == alone).all()
    for block in (5, 13, 100):
        monkeypatch.setattr(minhash, "BLOCK_NGRAMS", block)
        assert (signatures(texts) == alone).all()
    assert signatures([]).shape == (0, NUM_BANDS)


def test_case_punctuation_and_spacing_do_not_matter_but_short_and_empty_texts_are_themselves():
    one, same, other = signatures(
        ["Some text, of some length.", "  SOME text\nof -- some length", "some text of no length"]
    )
    assert (one == same).all()
    assert (one != other).all()
    rows = {row.tobytes() for row in signatures(["", "a", "b", "---", "+++", "ab", "A b", "漢"])}
    assert len(rows) == 8


def pairs(rng, similarity, number, size=260):
    """Pairs of texts whose sets of 13-grams have this Jaccard similarity: what they share is at the beginning."""
    shared = round(2 * similarity * (size - NGRAM_SIZE + 1) / (1 + similarity)) + NGRAM_SIZE - 1
    texts = []
    for _ in range(number):
        one, other = ("".join(rng.choices(string.ascii_lowercase, k=size)) for _ in range(2))
        texts += [one, one[:shared] + other[shared:]]
    return texts


@pytest.mark.parametrize(("similarity", "number"), [(0.5, 300), (0.7, 600), (0.8, 600), (0.9, 600), (0.95, 300)])
def test_pairs_are_found_as_often_as_the_curve_says(similarity, number):
    found = signatures(pairs(random.Random(2), similarity, number)).reshape(number, 2, NUM_BANDS)
    share = (found[:, 0] == found[:, 1]).any(axis=1).mean()
    expected = 1 - (1 - similarity**ROWS_PER_BAND) ** NUM_BANDS
    # Sets of whole grams are not quite of the similarity; and 4 standard deviations.
    assert abs(share - expected) < 0.01 + 4 * (expected * (1 - expected) / number) ** 0.5
