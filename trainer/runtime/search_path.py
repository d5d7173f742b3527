"""Keep files of the working folder, for example random.py or torch.py, from replacing modules of Python or of libraries.

This module imports only what Python has loaded before it runs any program.
"""

import os
import sys


def leave_out_working_folder(*, run_by_name: bool) -> None:
    """Remove the working folder from the search path if Python or PYTHONPATH put it there.

    `python -m` puts it first, which `run_by_name` states. In PYTHONPATH it is an empty entry, as in `:/more`, or `.`; child
    processes no longer see these entries. An entry with its full path stays.
    """
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [entry for entry in entries if os.path.normpath(entry) != "."]
    try:
        folder = os.getcwd()
    except FileNotFoundError:  # removed, so that Python could not put it there either
        return
    named = os.environ.get("PYTHONPATH", "") and len(kept) < len(entries) and folder not in kept
    for added in (run_by_name and not sys.flags.safe_path, named):
        if added and folder in sys.path:
            sys.path.remove(folder)
    if "PYTHONPATH" in os.environ:
        os.environ["PYTHONPATH"] = os.pathsep.join(kept)
