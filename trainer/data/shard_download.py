"""One shard over the network: tries that go on where the last one broke, until its bytes are there or hope is gone."""

from __future__ import annotations

import hashlib
import logging
import time
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from tandem.trainer import config
from tandem.trainer.config import UserError
from tandem.trainer.data import remote_files
from tandem.trainer.data.manifest import FILE, DamagedShard, Shard

SLOW_SECONDS = 60.0
"""How often a fetch that goes on for long says how far it is."""

log = logging.getLogger(__name__)


def fetched(folder: str | Path, shard: Shard, part: BinaryIO, settings: config.Cache) -> None:
    """The file, empty before, has the bytes of the shard of the remote folder.

    Raises: DamagedShard where the place answers and has not its bytes, UserError where it does not answer, or has not
    even the manifest any more: then it is the place that is gone.
    """
    address, began = remote_files.below(folder, shard.file), time.monotonic()
    patience = remote_files.Patience(address, settings, (remote_files.Missing, _Settled))
    fetch = _Fetch(address, shard, part)
    while True:
        try:
            fetch.go_on(settings.timeout_seconds)
            return
        except remote_files.Unreachable as error:
            try:
                patience.failed(error)
            except remote_files.Unreachable:
                tries = f"tries: {patience.failures} in {time.monotonic() - began:.3g} s, the last: {error}"
                message = f"{address}: shard cannot be fetched; {tries}; restore"
                if isinstance(error, remote_files.Missing):
                    _check_place(folder, settings)
                if isinstance(error, (remote_files.Missing, _Altered)):
                    raise DamagedShard(shard.file, f"{message} it") from None
                raise UserError(f"{message} the way to it, and start again") from None


def _check_place(folder: str | Path, settings: config.Cache) -> None:
    try:
        remote_files.content(remote_files.below(folder, FILE), settings)
    except OSError as error:
        raise UserError(f"{folder}: has no {FILE} any more ({error}); restore the folder, or the way to it") from None


class _Altered(remote_files.Unreachable):
    """The server answered in full, and what it has is not the shard."""


class _Settled(_Altered):
    """It says so for the second time."""


class _Fetch:
    """What of a shard has come, and its hash; a try goes on where the one before it broke."""

    def __init__(self, address: str, shard: Shard, part: BinaryIO):
        self._address, self._shard, self._part = address, shard, part
        self._wrong = ""
        self._start_over()

    def go_on(self, timeout_seconds: float) -> None:
        """The part holds the shard. Raises: remote.Unreachable."""
        said, size_bytes = time.monotonic(), self._shard.bytes
        with closing(remote_files.blocks(self._address, self._done_bytes, timeout_seconds)) as blocks:
            for block in blocks:
                if self._done_bytes + len(block) > size_bytes:
                    self._start_over()
                    raise self._altered(f"longer than the {size_bytes} bytes that the manifest says")
                self._part.write(block)
                self._digest.update(block)
                self._done_bytes += len(block)
                if time.monotonic() - said > SLOW_SECONDS:
                    said = time.monotonic()
                    log.warning("%s: slow: %d of %d bytes so far", self._address, self._done_bytes, size_bytes)
        if self._done_bytes < size_bytes:
            raise self._altered(f"ended at byte {self._done_bytes} of {size_bytes}")
        if (found := self._digest.hexdigest()) != self._shard.sha256:
            self._start_over()
            raise self._altered(f"sha256 {found[:12]}; the manifest says {self._shard.sha256[:12]}")

    def _start_over(self) -> None:
        self._part.seek(0)
        self._done_bytes, self._digest = 0, hashlib.sha256()

    def _altered(self, reason: str) -> _Altered:
        again, self._wrong = reason == self._wrong, reason
        return _Settled(f"{reason}, twice the same") if again else _Altered(reason)
