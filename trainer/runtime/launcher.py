"""The command that starts the ranks of a run on this machine, and the names that it shares with them."""

import sys
from collections.abc import Sequence

RENDEZVOUS_NAME = "tandem"
"""Name of our rendezvous, and torchrun's ID of a run that uses it."""
STORE_FILE_VARIABLE = "TANDEM_STORE_FILE"
"""Names the file through which the ranks of one machine find one another. Other users cannot open it."""


def launcher_command(num_ranks: int, arguments: Sequence[str]) -> list[str]:
    """Return the command that starts `num_ranks` ranks of `tandem ARGUMENTS` on this machine and restarts them if one fails."""
    launcher = [sys.executable, "-m", "tandem.trainer.runtime.agent", "--nnodes=1", f"--nproc-per-node={num_ranks}"]
    return [*launcher, "-m", "tandem.trainer", *arguments]
