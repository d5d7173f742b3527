"""A tokenizer library alone: texts in memory to arrays of ids, in one thread.

python -m tests.rivals.data_prep.encode_in_memory LIBRARY TOKENIZER RESULT FILE...
"""

import json
import sys
import time
from pathlib import Path

from tests.rivals.data_prep.baseline_script import BATCH_DOCUMENTS
from tests.rivals.data_prep.text_files import read_documents
from tests.rivals.data_prep.tokenizer_libraries import LIBRARIES


def main(arguments: list[str]) -> None:
    """Write the seconds and CPU seconds of encoding, without start-up, to the result file."""
    library, tokenizer, result, *files = arguments
    encode = LIBRARIES[library](Path(tokenizer).read_text())
    texts = list(read_documents(files))
    encode(["warm up"])
    start, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(texts), BATCH_DOCUMENTS):
        encode(texts[first : first + BATCH_DOCUMENTS])
    Path(result).write_text(
        json.dumps({"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu})
    )


if __name__ == "__main__":
    main(sys.argv[1:])
