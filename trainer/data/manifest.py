"""The manifest of a prepared corpus, and the checks of shards and tokenizers against it.

`data_prep` writes the manifest last, so a folder with a manifest is complete. The manifest contains everything that readers
rely on: token counts, the layout of the shards, their hashes and the tokenizer's hash. Its *fingerprint* is a hash of its
content: two corpora with the same fingerprint contain the same tokens in the same order. Neither numpy nor torch is imported
here.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal

from xxhash import xxh3_128

from tandem.trainer.config import ShardCacheConfig, UserError, parse_content
from tandem.trainer.config.constraints import COUNT, SHA256, Pattern, Range
from tandem.trainer.config.outside import parse_json
from tandem.trainer.data import remote_files
from tandem.trainer.data.tokenizer_file import find_difference, parse_tokenizer

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT_NAME = "tandem-corpus"
FORMAT_VERSION = 3
TAR_BLOCK_BYTES = 512
"""A tar member is one header block and its data, padded to whole blocks. Source: POSIX.1-1988 ustar."""


class DamagedShard(UserError):
    """A shard is missing, truncated or altered. `file` is its name in the manifest."""

    def __init__(self, file: str, message: str):
        super().__init__(message)
        self.file = file


@dataclass(frozen=True)
class Shard:
    """A webdataset tar of whole documents. Each sample except the last has `CorpusManifest.sample_tokens` tokens."""

    file: Annotated[str, Pattern(r"[\w-][\w.-]{0,199}\.tar", "the name of a tar in the folder")]
    bytes: Annotated[int, COUNT]
    tokens: Annotated[int, COUNT]
    documents: Annotated[int, COUNT]
    sha256: Annotated[str, SHA256]
    """Hash of the file. It names cached copies, and `tandem verify` checks it."""
    xxh3_128: Annotated[str, Pattern(r"[0-9a-f]{32}", "an XXH3-128 in hexadecimal")]
    """A hash that is seven times as fast, checked when a shard is opened. It does not protect against deliberate changes."""


@dataclass(frozen=True)
class CorpusSplit:
    tokens: Annotated[int, COUNT]
    documents: Annotated[int, COUNT]
    shards: list[Shard]


@dataclass(frozen=True)
class CorpusManifest:
    dtype: Literal["uint16", "uint32"]
    """Little-endian."""
    sample_tokens: Annotated[int, Range(at_least=1, at_most=1 << 31)]
    """Tokens in one tar sample. Their bytes fill whole tar blocks, so that samples begin at regular intervals."""
    vocab: Annotated[int, Range(at_least=1, at_most=1 << 32)]
    """One more than the tokenizer's largest id."""
    eos_token: str
    eos_id: Annotated[int, COUNT]
    tokenizer_sha256: Annotated[str, SHA256]
    """Hash of the bytes of tokenizer.json."""
    unigram_entropy_nats: Annotated[float, Range(at_least=0, at_most=math.log(1 << 32))]
    """Entropy of the training tokens: the loss of a model that knows only the token frequencies."""
    counts: dict[str, Annotated[int, COUNT]]
    settings: dict[str, Any]
    """The settings of the preparation. The same settings and input give the same bytes."""
    train: CorpusSplit
    validation: CorpusSplit
    groups: dict[str, dict[str, Annotated[int, COUNT]]] = dataclasses.field(default_factory=dict)
    """Documents and tokens by value of the grouping field, if one was given, including held-out documents."""

    @property
    def shards(self) -> list[Shard]:
        """All shards, those of the training split first."""
        return [*self.train.shards, *self.validation.shards]

    @property
    def token_bytes(self) -> int:
        return 2 if self.dtype == "uint16" else 4

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the whole content."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def sample_offset(self, sample_index: int) -> int:
        """Return the byte offset in a shard at which the tokens of this sample begin."""
        return sample_index * (TAR_BLOCK_BYTES + self.sample_tokens * self.token_bytes) + TAR_BLOCK_BYTES


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Return the smallest type that can hold every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def dump_manifest(manifest: CorpusManifest) -> str:
    """Return the text of manifest.json."""
    header = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "fingerprint": manifest.fingerprint}
    return json.dumps(header | dataclasses.asdict(manifest), indent=1) + "\n"


def load_manifest(folder: str | Path, settings: ShardCacheConfig = remote_files.DEFAULT_SETTINGS) -> CorpusManifest:
    """Read the manifest of a corpus in a local folder or at a remote address, and check its fingerprint.

    Raises: UserError if it is missing, damaged or of another version.
    """
    path = remote_files.join_address(folder, MANIFEST_FILE)
    try:
        return parse_manifest(remote_files.read_bytes(path, settings), path)
    except (FileNotFoundError, NotADirectoryError, remote_files.RemoteFileMissing):
        remedy = "correct the address" if remote_files.is_remote(folder) else f"run tandem prepare --output {folder}"
        raise UserError(f"{path}: no such file, but every prepared corpus has one; {remedy}") from None
    except OSError as error:
        reason = str(error)[:200]
        raise UserError(f"{path}: cannot be read ({reason}); restore the file or the connection to it") from None


def parse_manifest(content: bytes, path: str | Path) -> CorpusManifest:
    """Parse the content of the manifest.json at `path`, and check its fingerprint.

    Raises: UserError if it is damaged or of another version.
    """
    remedy = "prepare the corpus again"
    try:
        tree = parse_json(content.decode())
        name, version, fingerprint = (tree.pop(key) for key in ("format", "version", "fingerprint"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a corpus manifest ({one_line(error)}); {remedy}") from None
    if name != FORMAT_NAME or repr(version) != repr(FORMAT_VERSION):
        raise UserError(
            f"{path}: has format {one_line(name)} {one_line(version)}, but this version of Tandem reads {FORMAT_NAME} "
            f"{FORMAT_VERSION}; {remedy}"
        )
    manifest = parse_content(CorpusManifest, tree, path, remedy)
    if manifest.fingerprint != fingerprint:
        raise UserError(f"{path}: does not match its fingerprint; it was changed or damaged; {remedy}")
    if wrong_count := _find_wrong_count(manifest):
        raise UserError(f"{path}: states impossible counts: {wrong_count}; {remedy}")
    return manifest


def _find_wrong_count(manifest: CorpusManifest) -> str | None:
    """Return a description of the first impossible count, because readers take memory and time in proportion to counts."""
    if manifest.sample_tokens * manifest.token_bytes % TAR_BLOCK_BYTES:
        return f"sample_tokens {manifest.sample_tokens} of {manifest.dtype} do not fill whole blocks of {TAR_BLOCK_BYTES} bytes"
    if manifest.dtype != token_dtype(manifest.vocab):
        return (
            f"dtype {manifest.dtype}, but ids below vocab {manifest.vocab} are stored as {token_dtype(manifest.vocab)}"
        )
    if manifest.eos_id >= manifest.vocab:
        return f"eos_id {manifest.eos_id} is not below vocab {manifest.vocab}"
    files = set()
    for shard in manifest.shards:
        if shard.file in files:
            return f"{shard.file} is listed twice"
        files.add(shard.file)
        used_bytes = -(-shard.tokens // manifest.sample_tokens) * TAR_BLOCK_BYTES + shard.tokens * manifest.token_bytes
        if used_bytes > shard.bytes or shard.bytes % TAR_BLOCK_BYTES or shard.documents > shard.tokens:
            return f"{shard.file} with {shard.bytes} bytes, {shard.tokens} tokens and {shard.documents} documents"
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        for unit in ("tokens", "documents"):
            stated, found = getattr(split, unit), sum(getattr(shard, unit) for shard in split.shards)
            if stated != found:
                return f"{name}.{unit} is {stated}, but its shards have {found}"
    return None


def check_shard_files(folder: str | Path, manifest: CorpusManifest) -> None:
    """Check that every shard exists and has the size in the manifest. Raises: DamagedShard for the first that does not.

    Note: This does nothing for a remote folder, whose shards are checked when they are fetched.
    """
    if remote_files.is_remote(folder):
        return
    for shard in manifest.shards:
        path = Path(folder) / shard.file
        try:
            if not path.is_file():
                raise missing_shard(path, shard)
            _check_size(path, path.stat().st_size, shard)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); correct its permissions") from None


def missing_shard(path: Path, shard: Shard) -> DamagedShard:
    """Return the error for a shard that does not exist."""
    message = f"{path}: the shard is missing; {MANIFEST_FILE} lists it; restore it or prepare the corpus again"
    return DamagedShard(shard.file, message)


def check_shard_content(file: BufferedReader, path: Path, shard: Shard) -> None:
    """Check size and hash of an open file. Raises: DamagedShard if it is not the shard, OSError if it cannot be read."""
    _check_size(path, os.fstat(file.fileno()).st_size, shard)
    xxh3_hash = hashlib.file_digest(file, xxh3_128).hexdigest()
    if xxh3_hash != shard.xxh3_128:
        raise DamagedShard(
            shard.file,
            f"{path}: the shard is damaged: its xxh3_128 is {xxh3_hash[:12]}, not {shard.xxh3_128[:12]} as in the manifest; "
            "restore it",
        )


def check_tokenizer(
    file: str | Path,
    manifest: CorpusManifest,
    message_prefix: str,
    remedy: str = f"use the {TOKENIZER_FILE} in the corpus folder, or prepare the corpus again",
    *,
    corpus_folder: str | Path | None = None,
) -> None:
    """Raises UserError if the file is not the corpus's tokenizer. `message_prefix` names the field or option.

    With `corpus_folder`, a file with other bytes may be the same tokenizer (`tokenizer_file.find_difference`).
    """
    try:
        content = remote_files.read_bytes(file)
    except OSError as error:
        reason = f"{file} cannot be read ({one_line(error)})"
        raise UserError(f"{message_prefix}: {reason}; name the corpus's tokenizer.json") from None
    sha256, expected = hashlib.sha256(content).hexdigest(), manifest.tokenizer_sha256
    if sha256 == expected:
        return
    reason = ""
    if corpus_folder is not None:
        with suppress(OSError):  # without the corpus's own file, the hashes decide
            own = parse_tokenizer(read_corpus_tokenizer(corpus_folder, manifest), corpus_folder)
            try:
                difference = find_difference(parse_tokenizer(content, file), own, manifest.eos_token)
            except UserError as error:
                difference = str(error)
            if difference is None:
                return
            reason = f" ({one_line(difference)})"
    raise UserError(
        f"{message_prefix}: {file} has sha256 {sha256[:12]}, but the corpus was prepared with a tokenizer whose sha256 is "
        f"{expected[:12]}{reason}; {remedy}"
    )


def read_corpus_tokenizer(
    corpus_folder: str | Path, manifest: CorpusManifest, settings: ShardCacheConfig = remote_files.DEFAULT_SETTINGS
) -> bytes:
    """Read the tokenizer.json of a corpus.

    Raises: UserError if it is not the one in the manifest. FileNotFoundError or another OSError if it cannot be read.
    """
    path = remote_files.join_address(corpus_folder, TOKENIZER_FILE)
    content = remote_files.read_bytes(path, settings)
    if (sha256 := hashlib.sha256(content).hexdigest()) != manifest.tokenizer_sha256:
        raise UserError(
            f"{path}: has sha256 {sha256[:12]}, but {MANIFEST_FILE} states {manifest.tokenizer_sha256[:12]}; it was replaced "
            "or damaged after the corpus was prepared; restore it, or prepare the corpus again"
        )
    return content


def check_fingerprints(saved_fingerprints: Mapping[str, str], fingerprints: Mapping[str, str]) -> None:
    """Raises UserError if a source that the run has read from is now another corpus.

    A read position is meaningless in another corpus. Sources can be added. A source that has been read must stay in
    `data.sources`.
    """
    for source, found in fingerprints.items():
        if source not in saved_fingerprints and found in saved_fingerprints.values():
            raise UserError(
                f"data.sources.{source}: the run has read this corpus under another name, and its read position would be lost; "
                "restore the name, or start a new run"
            )
    for source, saved in saved_fingerprints.items():
        found = fingerprints.get(source, saved)
        if found != saved:
            raise UserError(
                f"data.sources.{source}: the corpus has fingerprint {found[:12]}, but the run was saved with one that has "
                f"{saved[:12]}; resume with that corpus, or start a new run"
            )


def _check_size(path: Path, size_bytes: int, shard: Shard) -> None:
    if size_bytes != shard.bytes:
        raise DamagedShard(
            shard.file,
            f"{path}: has {size_bytes} bytes, not {shard.bytes} as in {MANIFEST_FILE}; restore it or prepare the corpus again",
        )


def one_line(value: Any) -> str:
    """Return a value, or the type and text of an error, on one line of at most 200 characters."""
    text = f"{type(value).__name__}: {value}" if isinstance(value, Exception) else str(value)
    return " ".join(text.split())[:200]
