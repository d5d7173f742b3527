import numpy as np
import pytest

from tandem.data_prep.tokenizers import distinguishing_texts, unicode_differences
from tandem.data_prep.tokenizers.encoding import ReferenceEncoder
from tandem.data_prep.tokenizers.gigatoken_encoder import GigatokenEncoder
from tandem.data_prep.tokenizers.tiktoken_file import SCHEMES
from tests.data_prep.tokenizers.conftest import split_probe_tokenizer


def differing(reference: ReferenceEncoder, codes: range, per_text: int) -> list[range]:
    """Those runs of so many of the code points that the two libraries make different tokens of."""
    runs = [codes[first : first + per_text] for first in range(0, len(codes), per_text)]
    texts = ["".join(distinguishing_texts.code_point_texts(run, per_text)) for run in runs]
    flat, starts = GigatokenEncoder(reference.tokenizer_json, reference)._encode([text.encode() for text in texts])
    own = np.split(flat, starts[1:-1])
    other_flat, counts = reference(texts)
    others = np.split(other_flat, np.cumsum(counts)[:-1])
    return [run for run, ours, theirs in zip(runs, own, others, strict=True) if not np.array_equal(ours, theirs)]


UNFILLED = range(0x34000, 0xE0000)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "end"), [("gpt2", 0xE4000), ("arcade100k", 0x20000)])
def test_the_characters_that_the_libraries_part_at_are_those_of_the_table(kind, end):
    reference = ReferenceEncoder(split_probe_tokenizer(SCHEMES[kind].split_pattern))
    everything, size = range(end), 1 << 14
    # Planes that Unicode has not begun to fill are sampled: every sixteenth character.
    steps = [16 if UNFILLED.start <= first < UNFILLED.stop else 1 for first in range(0, len(everything), size)]
    parts = [everything[number * size : (number + 1) * size : step] for number, step in enumerate(steps)]
    runs = [run for part in parts for run in differing(reference, part, 64)]
    found = {code for run in runs for single in differing(reference, run, 1) for code in single}
    listed = {
        code for first, last in unicode_differences.DIFFERING_RANGES for code in range(first, last + 1) if code < end
    }
    assert sorted(map(hex, found ^ listed)) == []


def test_only_documents_that_hold_such_a_character_go_to_the_reference():
    texts = ["plain", "漢字 हिन्दी 한국어 👍", "\u088f", "a" * 1000 + "\U00033479", "\u088e\u0890", "\U0003347a", ""]
    assert unicode_differences.find_differing_texts(texts, [text.encode() for text in texts]) == [2, 3]
    first_bytes = {
        chr(code).encode()[0] for first, last in unicode_differences.DIFFERING_RANGES for code in (first, last)
    }
    assert first_bytes == set(unicode_differences._FIRST_BYTES)
