"""Checks the tokens of a shard. Its hash shows that it is what was written; here the writer is checked.

A wrong token is no DamagedShard, because `data.damaged_shards: skip` must not hide a corpus that was written wrongly.
"""

from pathlib import Path

import numpy as np

from tandem.trainer.config import UserError
from tandem.trainer.data.manifest import MANIFEST_FILE, TAR_BLOCK_BYTES, CorpusManifest, Shard

REMEDY = "its hash is right, so it was written so; prepare the corpus again with the tokenizer of its ids"


def check_ids(tar: np.ndarray, path: str | Path, shard: Shard, manifest: CorpusManifest) -> None:
    """Raises UserError if an id is beyond the vocabulary. `tar` is the whole file in the stored type."""
    largest = max(int(part.max(initial=0)) for part in _token_arrays(tar, shard, manifest))
    if largest >= manifest.vocab:
        ids = f"vocab {manifest.vocab}, ids 0 to {manifest.vocab - 1}"
        raise UserError(f"{path}: contains id {largest}, but {MANIFEST_FILE} states {ids}; {REMEDY}")


def check_documents(tar: np.ndarray, path: str | Path, shard: Shard, manifest: CorpusManifest) -> None:
    """Raises UserError unless the shard has as many ends of documents as the manifest states, the last one at its end."""
    parts, eos_id = [part for part in _token_arrays(tar, shard, manifest) if part.size], manifest.eos_id
    num_documents = sum(int(np.count_nonzero(part == eos_id)) for part in parts)
    if num_documents != shard.documents or (parts and parts[-1].flat[-1] != eos_id):
        stated = f"{shard.documents} and a whole one at the end"
        found = f"contains {num_documents} ends of documents (EOS, id {eos_id})"
        raise UserError(f"{path}: {found}, but {MANIFEST_FILE} states {stated}; {REMEDY}")


def _token_arrays(tar: np.ndarray, shard: Shard, manifest: CorpusManifest) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of the whole samples, and those of the last one, which may be shorter, without a copy."""
    num_whole, num_rest = divmod(shard.tokens, manifest.sample_tokens)
    header = TAR_BLOCK_BYTES // manifest.token_bytes
    rest = num_whole * (header + manifest.sample_tokens)
    whole = tar[:rest].reshape(num_whole, header + manifest.sample_tokens)[:, header:]
    return whole, tar[rest + header : rest + header + num_rest]
