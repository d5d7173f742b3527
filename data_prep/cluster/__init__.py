"""Run the stages of a preparation as Slurm jobs or Ray tasks, for a corpus that is too large for one machine.

Only the files of the stages record which items are finished. A task needs only its stage and its share of the items. It may
be killed and restarted on any machine, and the number of tasks does not affect the result. `stage_job` and `submissions` need
only the standard library; `slurm` and `ray` import the library of their scheduler.
"""

from importlib import import_module
from types import ModuleType

from tandem.trainer.config import UserError

REQUIRED_LIBRARIES = {"slurm": "datatrove", "ray": "ray"}


def executor_module(executor: str) -> ModuleType:
    """Import the module of this executor.  Raises: UserError if its library is not installed."""
    try:
        return import_module(f"tandem.data_prep.cluster.{executor}")
    except ModuleNotFoundError as error:
        library = REQUIRED_LIBRARIES[executor]
        if (error.name or "").split(".")[0] != library:
            raise
        raise UserError(
            f"--executor: {executor} needs {library}, which is not installed; run pip install 'tandem[{executor}]'"
        ) from None
