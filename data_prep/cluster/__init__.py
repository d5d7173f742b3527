"""A corpus larger than a machine: the stages of a preparation as jobs of Slurm or tasks of Ray.

The one idea: what is finished is told by the files of the stages alone. So a task only needs to know which share of which
stage is its own, may be killed and started again anywhere, and how many tasks there are cannot show in the result.
`stage_job` and `submissions` are the standard library's; each scheduler's library has one door, named after it.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from tandem.trainer.config import UserError

REQUIRED_LIBRARIES = {"slurm": "datatrove", "ray": "ray"}


def executor_module(executor: str) -> ModuleType:
    """The module of this executor.

    Raises: UserError where the library that it stands on is not installed.
    """
    try:
        return import_module(f"tandem.data_prep.cluster.{executor}")
    except ModuleNotFoundError as error:
        library = REQUIRED_LIBRARIES[executor]
        if (error.name or "").split(".")[0] != library:
            raise
        raise UserError(
            f"--executor: {executor}; needs {library}, which is not installed; pip install 'tandem[{executor}]'"
        ) from None
