"""What a spill is read for, and what it is not."""

import tracemalloc

import numpy as np

from tandem.data_prep import spill


def test_a_shard_is_gathered_without_a_look_at_every_document_of_a_spill(tmp_path):
    documents = 200_000
    entries = np.zeros(documents, spill.ENTRY_DTYPE)
    entries["shuffle_key"] = np.arange(documents) << 8
    one = spill.Spill(tmp_path, "unit", 0)
    one.write([np.zeros(documents, np.uint16)], np.ones(documents, np.int64), entries)
    tracemalloc.start()
    found, start = one.select_entries("train", 1000 << 8, 1003 << 8)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found["shuffle_key"].tolist(), start) == ([number << 8 for number in range(1000, 1004)], 1000)
    assert peak_bytes < documents, "less than a byte for each"
