"""What a command took, its own processes alone: a program with nothing but the standard library, run by its path.

A process begins with the largest memory that the one which starts it ever had, so a small one must start it.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def measure_command(command: list[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Seconds, CPU seconds of all processes, peak bytes of the largest, exit code; what it printed is in `said`."""
    result, log = folder / "result.json", folder / "log.txt"
    with log.open("w") as out:
        subprocess.run(
            [sys.executable, "-I", "-S", __file__, str(result), *command],
            stdout=out,
            stderr=out,
            env=environment,
            check=True,
        )
    values: dict[str, Any] = json.loads(result.read_text())
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return values | {"said": said[-1][:200] if said else f"exit code {values['exit_code']}"}


def main() -> None:
    start = time.perf_counter()
    code = subprocess.run(sys.argv[2:]).returncode
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds, peak_bytes = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
    found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes, "exit_code": code}
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
