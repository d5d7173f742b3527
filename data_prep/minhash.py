"""MinHash signatures: numbers that agree between documents with similar 13-grams. duplicates.py uses them.

The definition is SlimPajama's: lower-case text without ASCII punctuation, runs of whitespace as one space, its set of
13-grams of *characters*, 9 bands of 13 minima. Two documents of Jaccard similarity s agree in at least one band with
probability 1 - (1 - s^13)^9:

    s            0.5     0.6    0.7    0.75   0.8    0.85   0.9    0.95    0.98
    probability  0.001   0.012  0.084  0.195  0.399  0.689  0.930  0.9985  1.0000

So a limit of "Jaccard 0.8" is gradual. datasketch computes 9 x 13 from a limit of 0.8 and 128 permutations if both kinds of
error have equal weight. As in SlimPajama, documents that agree in a band are not compared again.

The minima are over functions g_k = a + k b (mod 2^32) of two hashes a and b of the 13-gram. Any two g are independent, and
each costs an addition instead of a multiplication modulo a prime. All arithmetic is exact and per document, so the result
is the same on every machine and in every batch. Batches of less than a few hundred thousand characters cost more per
character.
"""

import string

import numpy as np

NGRAM_SIZE = 13
NUM_BANDS, ROWS_PER_BAND = 9, 13
BLOCK_NGRAMS = 1 << 15
"""13-grams per block: their intermediate arrays fit in the second-level cache."""
_HASH_MULTIPLIER = 0x9E3779B97F4A7C15
_PUNCTUATION = string.punctuation.encode()


def signatures(texts: list[str]) -> np.ndarray:
    """Return [documents, bands] uint64. Documents whose minima differ agree in a band with probability 2^-64.

    A document of fewer than 13 characters is one gram. A document of punctuation alone is compared unchanged, so that it
    agrees only with its copies.
    """
    normalized_texts = [(_normalize_text(text) or text).ljust(NGRAM_SIZE, "\0") for text in texts]
    starts = np.cumsum([0, *map(len, normalized_texts)])
    codes = _character_codes("".join(normalized_texts))
    minima = np.full((NUM_BANDS * ROWS_PER_BAND, len(texts)), np.iinfo(np.uint32).max, np.uint32)
    for first in range(0, len(codes) - NGRAM_SIZE + 1, BLOCK_NGRAMS):
        _update_minima(minima, starts, first, _ngram_hashes(codes[first : first + BLOCK_NGRAMS + NGRAM_SIZE - 1]))
    return _hash_bands(minima)


def _normalize_text(text: str) -> str:
    # bytes.translate is four times as fast as str.translate; no byte of a multi-byte character is below 128.
    kept = text.lower().encode("utf-8", "surrogatepass").translate(None, _PUNCTUATION)
    return " ".join(kept.decode("utf-8", "surrogatepass").split())


def _character_codes(text: str) -> np.ndarray:
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _ngram_hashes(codes: np.ndarray) -> np.ndarray:
    """Hash each 13 consecutive codes to 64 bits: a polynomial, computed by doubling, then mixed."""
    single = powers = codes.astype(np.uint64)
    width = 1
    for digit in f"{NGRAM_SIZE:b}"[1:]:
        powers = powers[:-width] * _multiplier_power(width) + powers[width:]
        width *= 2
        if digit == "1":
            powers = powers[:-1] * _multiplier_power(1) + single[width:]
            width += 1
    return _mix_bits(powers)


def _multiplier_power(exponent: int) -> np.uint64:
    return np.uint64(pow(_HASH_MULTIPLIER, exponent, 1 << 64))


def _mix_bits(values: np.ndarray) -> np.ndarray:
    """Mix the bits of each value in place (the finalizer of MurmurHash3)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values ^= values >> np.uint64(33)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(33)
    return values


def _update_minima(minima: np.ndarray, starts: np.ndarray, first_ngram: int, hashes: np.ndarray) -> None:
    """Update the minima [functions, documents] with the hashes of the grams that begin at `first_ngram`."""
    values, steps = (hashes >> np.uint64(32)).astype(np.uint32), hashes.astype(np.uint32)
    first_document = starts.searchsorted(first_ngram, "right") - 1
    end_document = starts.searchsorted(first_ngram + len(hashes), "left")
    # A gram that crosses into the next document does not count: it gets the highest value.
    ends = starts[first_document + 1 : end_document + 1, None]
    crossing = (ends - np.arange(first_ngram + 1, first_ngram + NGRAM_SIZE)).ravel()
    crossing = crossing[(crossing >= 0) & (crossing < len(hashes))]
    values[crossing], steps[crossing] = np.iinfo(np.uint32).max, 0
    cuts = np.maximum(starts[first_document:end_document] - first_ngram, 0)
    for row in minima[:, first_document:end_document]:
        np.minimum(row, np.minimum.reduceat(values, cuts), out=row)
        values += steps


def _hash_bands(minima: np.ndarray) -> np.ndarray:
    bands = np.zeros((NUM_BANDS, minima.shape[1]), np.uint64)
    for row in minima.reshape(NUM_BANDS, ROWS_PER_BAND, -1).swapaxes(0, 1):
        bands = bands * np.uint64(_HASH_MULTIPLIER) + row
    return np.ascontiguousarray(_mix_bits(bands).T)
