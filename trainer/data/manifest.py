"""What a prepared corpus says about itself, and the checks that need nothing but that and the bytes of files.

`data_prep` writes the manifest last, so a folder with one is complete. Only the standard library, `tandem.trainer.config` and
`remote_files` are imported. The one idea: everything a reader relies on (token counts, where a token lies,
the hash of every shard, the tokenizer) is stated here once, and the manifest carries a hash of its own
content, its *fingerprint*: two corpora with the same fingerprint hold the same tokens in the same order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from tandem.trainer.config import ShardCacheConfig, UserError
from tandem.trainer.data import remote_files

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT_NAME = "tandem-corpus"
FORMAT_VERSION = 3
TAR_BLOCK_BYTES = 512
"""A tar member is one header block and its data padded to whole blocks.  Source: POSIX.1-1988 ustar."""


class DamagedShard(UserError):
    """A shard that is missing, truncated or altered, by the name the manifest has for it."""

    def __init__(self, file: str, message: str):
        super().__init__(message)
        self.file = file


@dataclass(frozen=True)
class Shard:
    """A webdataset tar of whole documents; each sample but the last holds `CorpusManifest.sample_tokens` tokens."""

    file: str
    bytes: int
    tokens: int
    documents: int
    sha256: str
    """Of the file; by it copies are named and `tandem verify` goes."""
    xxh3_128: str
    """Of the file too, seven times as fast: by it shards are checked as they are opened. No defence against malice."""


@dataclass(frozen=True)
class CorpusSplit:
    tokens: int
    documents: int
    shards: list[Shard]


@dataclass(frozen=True)
class CorpusManifest:
    dtype: str
    """uint16 or uint32, little-endian."""
    sample_tokens: int
    """Tokens in one tar sample; a multiple of a tar block, so that samples lie at equal distances."""
    vocab: int
    """One more than the tokenizer's largest id."""
    eos_token: str
    eos_id: int
    tokenizer_sha256: str
    """Hash of the bytes of tokenizer.json."""
    unigram_entropy_nats: float
    """Of the training tokens: the loss of a model that knows only how often each token occurs."""
    counts: dict[str, int]
    settings: dict[str, Any]
    """What the preparation was asked for; the same settings give the same bytes."""
    train: CorpusSplit
    validation: CorpusSplit
    groups: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """Documents and tokens by value of the field that was asked for, held-out ones included."""

    @property
    def token_bytes(self) -> int:
        return 2 if self.dtype == "uint16" else 4

    @property
    def fingerprint(self) -> str:
        """Hash of the whole content."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def sample_offset(self, sample_index: int) -> int:
        """Byte in a shard at which the tokens of its sample number `sample_index` begin."""
        return sample_index * (TAR_BLOCK_BYTES + self.sample_tokens * self.token_bytes) + TAR_BLOCK_BYTES


def token_dtype(vocab_size: int) -> str:
    """The smallest type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def dump_manifest(manifest: CorpusManifest) -> str:
    """The text of manifest.json."""
    header = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "fingerprint": manifest.fingerprint}
    return json.dumps(header | dataclasses.asdict(manifest), indent=1) + "\n"


def load_manifest(folder: str | Path, settings: ShardCacheConfig = remote_files.DEFAULT_SETTINGS) -> CorpusManifest:
    """The manifest of a finished corpus, in a local folder or at a remote address, its fingerprint checked.

    Raises: UserError where there is none, or it is damaged or of another version.
    """
    path = remote_files.join_address(folder, MANIFEST_FILE)
    try:
        return parse_manifest(remote_files.read_bytes(path, settings), path)
    except (FileNotFoundError, NotADirectoryError, remote_files.RemoteFileMissing):
        remedy = "correct the address" if remote_files.is_remote(folder) else f"run tandem prepare --output {folder}"
        raise UserError(f"{path}: no such file; a prepared corpus has one; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({str(error)[:200]}); restore it, or the way to it") from None


def parse_manifest(content: bytes, path: str | Path) -> CorpusManifest:
    """The manifest in the content of a manifest.json that lies at `path`, its fingerprint checked.

    Raises: UserError where it is damaged or of another version.
    """
    try:
        tree = json.loads(content.decode())
        header = (tree.pop("format"), tree.pop("version"))
        fingerprint = tree.pop("fingerprint")
        if header != (FORMAT_NAME, FORMAT_VERSION):
            raise UserError(
                f"{path}: format {header}; this version reads {(FORMAT_NAME, FORMAT_VERSION)}; prepare the corpus again"
            )
        tree |= {name: _parse_split(tree[name]) for name in ("train", "validation")}
        manifest = CorpusManifest(**tree)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is not a corpus manifest ({_one_line(error)}); prepare the corpus again") from None
    if manifest.fingerprint != fingerprint:
        raise UserError(
            f"{path}: content does not match its fingerprint; it was changed or damaged; prepare the corpus again"
        )
    return manifest


def check_shard_files(folder: str | Path, manifest: CorpusManifest) -> None:
    """Raises DamagedShard for the first shard that is missing or has another size than the manifest says.

    Note: of a remote folder nothing is asked; its shards are checked as they are fetched.
    """
    if remote_files.is_remote(folder):
        return
    for shard in [*manifest.train.shards, *manifest.validation.shards]:
        path = Path(folder) / shard.file
        if not path.is_file():
            raise DamagedShard(
                shard.file,
                f"{path}: shard is missing; {MANIFEST_FILE} lists it; restore it or prepare the corpus again",
            )
        _check_size(path, path.stat().st_size, shard)


def check_shard_content(file: BufferedReader, path: Path, shard: Shard) -> None:
    """Raises DamagedShard where an open file is not the shard; OSError where it cannot be read."""
    _check_size(path, os.fstat(file.fileno()).st_size, shard)
    xxh3_hash = hashlib.file_digest(file, xxh3_128).hexdigest()
    if xxh3_hash != shard.xxh3_128:
        raise DamagedShard(
            shard.file,
            f"{path}: xxh3_128 {xxh3_hash[:12]}; {MANIFEST_FILE} says {shard.xxh3_128[:12]}; the shard is damaged; restore it",
        )


def check_tokenizer(file: str | Path, manifest: CorpusManifest, message_prefix: str) -> None:
    """Raises UserError, its message starting with `message_prefix`, if the file is not the tokenizer of the corpus."""
    try:
        sha256 = hashlib.sha256(remote_files.read_bytes(file)).hexdigest()
    except OSError as error:
        raise UserError(
            f"{message_prefix}: {file} cannot be read ({_one_line(error)}); name the corpus's tokenizer.json"
        ) from None
    if sha256 != manifest.tokenizer_sha256:
        raise UserError(
            f"{message_prefix}: {file} has sha256 {sha256[:12]}; "
            f"the corpus was prepared with {manifest.tokenizer_sha256[:12]}; "
            f"name the {TOKENIZER_FILE} in the corpus folder, or prepare again"
        )


def check_fingerprints(saved_fingerprints: Mapping[str, str], fingerprints: Mapping[str, str]) -> None:
    """Raises UserError where a source the run has read from is now another corpus.

    Note: sources may be added, and stay in `data.sources` once read; a position in a source that changed means nothing.
    """
    for source, found in fingerprints.items():
        if source not in saved_fingerprints and found in saved_fingerprints.values():
            raise UserError(
                f"data.sources.{source}: is a corpus the run has read from under another name; its position would be lost; "
                "restore the name, or start a new run"
            )
    for source, saved in saved_fingerprints.items():
        found = fingerprints.get(source, saved)
        if found != saved:
            raise UserError(
                f"data.sources.{source}: fingerprint {found[:12]}; "
                f"the run was saved with corpus {saved[:12]}; "
                "resume with the corpus it began with, or start a new run"
            )


def _check_size(path: Path, size_bytes: int, shard: Shard) -> None:
    if size_bytes != shard.bytes:
        raise DamagedShard(
            shard.file,
            f"{path}: has {size_bytes} bytes; {MANIFEST_FILE} says {shard.bytes}; restore it or prepare the corpus again",
        )


def _parse_split(tree: dict[str, Any]) -> CorpusSplit:
    return CorpusSplit(**(tree | {"shards": [Shard(**shard) for shard in tree["shards"]]}))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
