"""Memory maps of shards that are kept for the next read."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class Maps:
    """Memory maps kept for the next read, but not more than so many, or of so many bytes; the last made always is."""

    def __init__(self, most: int, most_bytes: int = sys.maxsize):
        self._most, self._most_bytes = most, most_bytes
        self._kept: dict[tuple[str, str], np.ndarray] = {}
        self._lock = threading.Lock()

    def kept(self, folder: str, file: str) -> np.ndarray | None:
        return self._kept.get((folder, file))

    def keep(self, folder: str, file: str, made: np.ndarray) -> None:
        """The map, which lives as long as an array of it, is kept; the first made are forgotten, and close when nobody reads
        from them any more.
        """
        with self._lock:
            self._kept[folder, file] = made
            kept_bytes = sum(each.nbytes for each in self._kept.values())
            while len(self._kept) > 1 and (len(self._kept) > self._most or kept_bytes > self._most_bytes):
                kept_bytes -= self._kept.pop(next(iter(self._kept))).nbytes
