"""Documents are dropped by the rules and for no other reason, and copies are known as copies."""

import pickle
import random
import re
import string
import unicodedata
from collections import Counter

import numpy as np
import pytest

from tandem.data_prep import clean
from tandem.data_prep.clean import CleaningRules

LETTERS = "abcXYZ019é漢ß🙂ñ"
SIGNS = string.punctuation + " \t\r\n\x0b\x1c\u00a0\u3000\u2028"


def mixed(rng, size):
    return "".join(rng.choice(rng.choice([LETTERS, SIGNS])) for _ in range(size))


@pytest.mark.parametrize("alphabet", [LETTERS + SIGNS, "ab" + string.punctuation + string.whitespace])
def test_short_is_fewer_characters_than_the_limit_beside_punctuation_and_whitespace(alphabet):
    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 120)))
        left = len(re.sub(rf"[\s{re.escape(string.punctuation)}]", "", text))
        for shortest in (left - 1, left, left + 1, left + 2):
            assert clean.is_short(text, shortest) == (left < shortest)
            seen.add(left < shortest)
    assert seen == {True, False}


@pytest.mark.parametrize("sign", ["-", "\u00a0"])
def test_a_document_that_begins_with_signs_is_not_short_if_letters_follow(sign):
    assert not clean.is_short(sign * 5000 + "a" * 200)
    assert clean.is_short(sign * 5000 + "a" * 199)


def test_text_becomes_nfc_and_text_that_is_stays_the_object_it_was():
    apart = "cafe\u0301 \uac00"
    assert clean.normalize_nfc(apart) == unicodedata.normalize("NFC", apart) == "caf\u00e9 \uac00"
    for composed in ("caf\u00e9 and so on", "no letter is a q\u0301"):
        assert clean.normalize_nfc(composed) is composed


COPIES = ["The cafe\u0301, it is: 1 + 1.", "the  caf\u00e9 it is 11\n", "\tTHE CAF\u00e9 (it is) 1 1"]
OTHERS = ["The cafe, it is: 1 + 1.", "The caf\u00e9, it is: 1 + 2.", "The caf\u00e9, it is: 1 + 1. Yes"]


def test_copies_share_key_and_draw_and_other_texts_do_not():
    assert len({clean.text_key(text) for text in COPIES}) == len({clean.uniform_hash(text) for text in COPIES}) == 1
    assert len({clean.text_key(text) for text in [COPIES[0], *OTHERS, "", "---", "+++", "\ud800"]}) == 8
    assert len(clean.text_key("")) == 16


def test_long_texts_that_begin_alike_are_drawn_apart():
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy. " * 40
    assert len({clean.uniform_hash(f"{licence} {number}") for number in range(20)}) == 20


def test_keys_are_the_same_on_every_machine():
    assert clean.text_key("A b,\n\u00e9").hex() == "7bbfc32a3aba02f14f39cbeedfb7c24f"
    assert clean.uniform_hash("A b,\n\u00e9") == 0.9414478675851247


def test_draws_are_uniform():
    draws = [clean.uniform_hash(f"document {number}") for number in range(5000)]
    shares = np.histogram(draws, 10, (0, 1))[0]
    assert shares.sum() == 5000
    # 500 +- 21 in each tenth.
    assert (abs(shares - 500) < 5 * 21).all()


def test_each_rule_drops_what_it_says_and_counts_it():
    rules = pickle.loads(
        pickle.dumps(
            CleaningRules(nfc=True, min_characters=10, contaminant_keys=frozenset({clean.text_key(COPIES[0])}))
        )
    )
    texts = [*COPIES, *OTHERS, "e\u0301" * 10, "e\u0301" * 9, "too short"]
    counts = Counter()
    kept = [clean.clean_text(text, rules, counts) for text in texts]
    assert kept == [None, None, None, *map(clean.normalize_nfc, OTHERS), "\u00e9" * 10, None, None]
    assert counts == {"normalized_documents": 3, "short_documents": 2, "contaminated_documents": 3}


def test_without_rules_nothing_is_touched():
    rng = random.Random(1)
    texts = ["", "e\u0301", *(mixed(rng, 50) for _ in range(20))]
    counts = Counter()
    assert [clean.clean_text(text, CleaningRules(), counts) for text in texts] == texts
    assert counts == {}
