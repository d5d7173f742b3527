"""Memory maps of shards that are kept for the next read."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class MemoryMaps:
    """Memory maps kept for the next read, but not more than so many, or of so many bytes; the last made always is."""

    def __init__(self, max_maps: int, max_bytes: int = sys.maxsize):
        self._max_maps, self._max_bytes = max_maps, max_bytes
        self._maps: dict[tuple[str, str], np.ndarray] = {}
        self._lock = threading.Lock()

    def find(self, folder: str, file: str) -> np.ndarray | None:
        return self._maps.get((folder, file))

    def add(self, folder: str, file: str, array: np.ndarray) -> None:
        """The map, which lives as long as an array of it, is kept; the first made are forgotten, and close when nobody reads
        from them any more.
        """
        with self._lock:
            self._maps[folder, file] = array
            kept_bytes = sum(mapped.nbytes for mapped in self._maps.values())
            while len(self._maps) > 1 and (len(self._maps) > self._max_maps or kept_bytes > self._max_bytes):
                kept_bytes -= self._maps.pop(next(iter(self._maps))).nbytes
