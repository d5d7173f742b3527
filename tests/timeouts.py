"""How long a test waits for what must come."""

import time
from collections.abc import Callable

TEST_TIMEOUT_SECONDS = 300
"""Until a test that waits for a run says that it hangs. On a machine with too much to do a run of ten seconds has taken over
sixty. What must be quick has a limit of its own.
"""


def wait_until(condition: Callable[[], object], timeout_seconds: float = TEST_TIMEOUT_SECONDS) -> None:
    """It is so after the call. Raises: AssertionError."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)
