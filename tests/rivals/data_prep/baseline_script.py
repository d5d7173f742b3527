"""The common tokenizing script: read .jsonl.zst, encode with a library, append ids and document lengths to files.

python -m tests.rivals.data_prep.baseline_script LIBRARY TOKENIZER OUTPUT WORKERS FILE...
"""

import sys
from collections.abc import Iterator
from itertools import islice
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import orjson

from tandem.trainer.data.manifest import token_dtype
from tests.rivals.data_prep.text_files import read_documents
from tests.rivals.data_prep.tokenizer_libraries import EOS, LIBRARIES

BATCH_DOCUMENTS = 256


def main(arguments: list[str]) -> None:
    """Give every worker its share of the files and an output file of its own."""
    library, tokenizer, output, workers, *files = arguments
    parts = [(library, tokenizer, f"{output}/{index}", files[index :: int(workers)]) for index in range(int(workers))]
    if len(parts) == 1:
        encode_files(*parts[0])
        return
    with Pool(len(parts)) as pool:
        pool.starmap(encode_files, parts)


def encode_files(library: str, tokenizer: str, stem: str, files: list[str]) -> None:
    """Write the ids of all documents, each followed by EOS, to `stem`.bin, and their lengths to `stem`.npy."""
    text = Path(tokenizer).read_text()
    encode, eos_id, dtype = LIBRARIES[library](text), *eos_id_and_dtype(text)
    texts, lengths = read_documents(files), []
    with open(f"{stem}.bin", "wb") as out:
        while batch := list(islice(texts, BATCH_DOCUMENTS)):
            for tokens in encode(batch):
                out.write(np.append(tokens, eos_id).astype(dtype).tobytes())
                lengths.append(len(tokens) + 1)
    np.save(f"{stem}.npy", lengths)


def read_token_documents(output: Path, dtype: str) -> Iterator[np.ndarray]:
    """Read the documents that this script wrote."""
    for path in sorted(output.glob("*.bin")):
        ends = np.cumsum(np.load(path.with_suffix(".npy")))
        yield from np.split(np.fromfile(path, dtype), ends[:-1])


def eos_id_and_dtype(tokenizer_json: str) -> tuple[int, str]:
    """Return the id of EOS and the dtype that holds every id."""
    tree = orjson.loads(tokenizer_json)
    added = {token["content"]: token["id"] for token in tree["added_tokens"]}
    return added[EOS], token_dtype(max([*tree["model"]["vocab"].values(), *added.values()]) + 1)


if __name__ == "__main__":
    main(sys.argv[1:])
