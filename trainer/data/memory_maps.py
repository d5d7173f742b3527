"""A cache of memory-mapped shards."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class MemoryMaps:
    """Keeps up to `max_maps` maps of up to `max_bytes` in total, and always the newest one."""

    def __init__(self, max_maps: int, max_bytes: int = sys.maxsize):
        self._max_maps, self._max_bytes = max_maps, max_bytes
        self._maps: dict[tuple[str, str], np.ndarray] = {}
        self._lock = threading.Lock()

    def find(self, folder: str, file: str) -> np.ndarray | None:
        return self._maps.get((folder, file))

    def add(self, folder: str, file: str, array: np.ndarray) -> None:
        """Keep the map, and drop old ones over a limit. A dropped map closes when the last array that uses it is freed."""
        with self._lock:
            self._maps[folder, file] = array
            kept_bytes = sum(mapped.nbytes for mapped in self._maps.values())
            while len(self._maps) > 1 and (len(self._maps) > self._max_maps or kept_bytes > self._max_bytes):
                kept_bytes -= self._maps.pop(next(iter(self._maps))).nbytes
