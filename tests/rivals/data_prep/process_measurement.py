"""Measure a command: a small program that uses only the standard library starts it.

A process starts with the peak memory of its parent, so the parent must be small.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def measure_command(command: list[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Return seconds, CPU seconds of all processes, peak bytes of the largest, exit code and last line of output."""
    result, log = folder / "result.json", folder / "log.txt"
    starter = [sys.executable, "-I", "-S", __file__, str(result)]
    with log.open("w") as out:
        subprocess.run([*starter, *command], stdout=out, stderr=out, env=environment, check=True)
    values: dict[str, Any] = json.loads(result.read_text())
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return values | {"last_line": lines[-1][:200] if lines else f"exit code {values['exit_code']}"}


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
