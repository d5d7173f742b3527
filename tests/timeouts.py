"""How long a test waits for what must come."""

import time
from collections.abc import Callable

PATIENCE_SECONDS = 300
"""Until a test that waits for a run says that it hangs. On a machine with too much to do a run of ten seconds has taken over
sixty. What must be quick has a limit of its own.
"""


def eventually(what: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """It is so after the call. Raises: AssertionError."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)
