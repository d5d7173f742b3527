"""Start the ranks of a run on this machine with torchrun."""

import sys
from collections.abc import Sequence


def launcher_command(num_ranks: int, arguments: Sequence[str]) -> list[str]:
    """Return the command that starts `num_ranks` ranks of `tandem ARGUMENTS` on this machine and restarts them if one fails."""
    launcher = [sys.executable, "-m", "tandem.trainer.runtime.agent", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [*launcher, "-m", "tandem.trainer", *arguments]
