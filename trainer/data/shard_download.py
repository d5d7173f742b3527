"""Downloads one shard. Each attempt continues where the last one stopped, until the shard is complete or no attempt is left."""

import hashlib
import logging
import time
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from tandem.trainer import config
from tandem.trainer.config import UserError
from tandem.trainer.data import remote_files
from tandem.trainer.data.manifest import MANIFEST_FILE, DamagedShard, Shard

PROGRESS_LOG_SECONDS = 60.0
"""How often a slow download logs its progress."""

log = logging.getLogger(__name__)


def fetch_shard(folder: str | Path, shard: Shard, partial_file: BinaryIO, settings: config.ShardCacheConfig) -> None:
    """Download the shard from the remote folder into an empty file.

    Raises: DamagedShard if the server answers but does not have the shard's bytes. UserError if it does not answer, or if the
    manifest is missing too, because then the whole folder is gone.
    """
    address, start_time = remote_files.join_address(folder, shard.file), time.monotonic()
    retry_policy = remote_files.RetryPolicy(address, settings, (remote_files.RemoteFileMissing, _RepeatedMismatch))
    fetch = _ShardDownload(address, shard, partial_file)
    while True:
        try:
            fetch.resume(settings)
            return
        except remote_files.RemoteError as error:
            try:
                retry_policy.wait_or_raise(error)
            except remote_files.RemoteError:
                seconds = time.monotonic() - start_time
                attempts = f"attempts: {retry_policy.num_failures} in {seconds:.3g} s, last error: {error}"
                message = f"{address}: the shard cannot be fetched ({attempts}); restore"
                if isinstance(error, remote_files.RemoteFileMissing):
                    _check_manifest_exists(folder, settings)
                if isinstance(error, (remote_files.RemoteFileMissing, _ContentMismatch)):
                    raise DamagedShard(shard.file, f"{message} it") from None
                raise UserError(f"{message} the connection to it, and start again") from None


def _check_manifest_exists(folder: str | Path, settings: config.ShardCacheConfig) -> None:
    try:
        remote_files.read_bytes(remote_files.join_address(folder, MANIFEST_FILE), settings)
    except OSError as error:
        remedy = "restore the folder or the connection to it"
        raise UserError(f"{folder}: no longer has a {MANIFEST_FILE} ({error}); {remedy}") from None


class _ContentMismatch(remote_files.RemoteError):
    """The server returned a complete response that is not the shard."""


class _RepeatedMismatch(_ContentMismatch):
    """The server returned the same wrong content twice."""


class _ShardDownload:
    """The received part of a shard and its hash."""

    def __init__(self, address: str, shard: Shard, partial_file: BinaryIO):
        self._address, self._shard, self._partial_file = address, shard, partial_file
        self._last_mismatch = ""
        self._restart()

    def resume(self, settings: config.ShardCacheConfig) -> None:
        """Download the rest of the shard and check its hash. Raises: RemoteError."""
        last_log_time, size_bytes = time.monotonic(), self._shard.bytes
        with closing(remote_files.read_blocks(self._address, self._received_bytes, settings)) as blocks:
            for block in blocks:
                if self._received_bytes + len(block) > size_bytes:
                    self._restart()
                    raise self._content_mismatch(f"the file is longer than the {size_bytes} bytes in the manifest")
                self._partial_file.write(block)
                self._digest.update(block)
                self._received_bytes += len(block)
                if time.monotonic() - last_log_time > PROGRESS_LOG_SECONDS:
                    last_log_time = time.monotonic()
                    progress = self._address, self._received_bytes, size_bytes
                    log.warning("%s: slow download, %d of %d bytes so far", *progress)
        if self._received_bytes < size_bytes:
            raise self._content_mismatch(f"the file ended at byte {self._received_bytes} of {size_bytes}")
        if (sha256 := self._digest.hexdigest()) != self._shard.sha256:
            self._restart()
            expected = self._shard.sha256[:12]
            raise self._content_mismatch(f"the sha256 is {sha256[:12]}, not {expected} as in the manifest")

    def _restart(self) -> None:
        self._partial_file.seek(0)
        self._received_bytes, self._digest = 0, hashlib.sha256()

    def _content_mismatch(self, reason: str) -> _ContentMismatch:
        is_repeated, self._last_mismatch = reason == self._last_mismatch, reason
        return _RepeatedMismatch(f"{reason}, twice in a row") if is_repeated else _ContentMismatch(reason)
