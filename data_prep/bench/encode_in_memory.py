"""A library alone: texts in memory to arrays of ids, in one thread.

python -m tandem.data_prep.bench.encode_in_memory LIBRARY TOKENIZER RESULT FILE...
"""

import json
import sys
import time
from pathlib import Path

from tandem.data_prep.bench.baseline_script import BATCH_DOCUMENTS
from tandem.data_prep.bench.text_files import read_documents
from tandem.data_prep.bench.tokenizer_libraries import LIBRARIES


def main(arguments: list[str]) -> None:
    """The result's file says the seconds and CPU seconds of encoding, without what it takes to begin."""
    library, tokenizer, result, *files = arguments
    encode = LIBRARIES[library](Path(tokenizer).read_text())
    texts = list(read_documents(files))
    encode(["warm up"])
    start, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(texts), BATCH_DOCUMENTS):
        encode(texts[first : first + BATCH_DOCUMENTS])
    found = {"encoding_seconds": time.perf_counter() - start, "encoding_cpu_seconds": time.process_time() - cpu}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
