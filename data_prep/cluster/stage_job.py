"""A job, whose tasks share the items of a stage.

All n tasks list the same items, and each takes every n-th, so they need not communicate. Finished items are skipped.
datatrove's record of finished tasks is not used. It identifies tasks by number, so a change of their number would skip
documents.
"""

from dataclasses import dataclass
from typing import Any

from tandem.data_prep import output_folder, stages
from tandem.data_prep.stages import Preparation, PreparationRequest, Stage
from tandem.trainer.config import UserError

TRAIN_TOKENIZER = "train-tokenizer"
"""The first job, if no tokenizer was given."""
RETRY_HINT = "run the same command again"


@dataclass(frozen=True)
class StageJob:
    """A stage, or the training of the tokenizer, in `num_tasks` tasks."""

    request: PreparationRequest
    name: str
    num_tasks: int
    items: list[Any] | None
    """The items that were unfinished at submission, or None if the items depend on a stage that was unfinished then."""

    def run_task(self, task_index: int, num_tasks: int) -> None:
        """Finish the items of this task.

        Raises: UserError if an item raises it, or if the previous stage is not finished.
        """
        if output_folder.clear_if_finished(self.request.output):  # Slurm may restart a job that had ended
            return
        if self.name == TRAIN_TOKENIZER:
            self.request.create_preparation()
            return
        if not self.request.has_tokenizer:
            raise UserError(f"{self.name}: the tokenizer is not trained; {RETRY_HINT}")
        preparation = self.request.create_preparation()
        stage = _find_ready_stage(preparation, self.name)
        items = self.items if self.items is not None else stage.items(preparation)
        for item in items[task_index::num_tasks]:
            if not stage.is_finished(preparation, item):
                stage.run_item(preparation, item, lambda count: None)


def plan_jobs(request: PreparationRequest, num_tasks: int) -> list[StageJob]:
    """Return the jobs that complete the corpus. Each must start after the previous one has succeeded."""
    jobs = [] if request.has_tokenizer else [StageJob(request, TRAIN_TOKENIZER, 1, None)]
    preparation = None if jobs else request.create_preparation()
    for stage in stages.active_stages(request.settings):
        items = stage.unfinished_items(preparation) if preparation and not jobs else None
        if items != []:
            most_tasks = 1 if stage.has_single_item else num_tasks
            jobs.append(StageJob(request, stage.name, min(most_tasks, len(items)) if items else most_tasks, items))
    return jobs


def _find_ready_stage(preparation: Preparation, name: str) -> Stage:
    """Return the stage of this name.  Raises: UserError if the previous stage is not finished."""
    active = stages.active_stages(preparation.settings)
    index = [stage.name for stage in active].index(name)
    if index and (missing := len(active[index - 1].unfinished_items(preparation))):
        previous = active[index - 1]
        total = len(previous.items(preparation))
        raise UserError(f"{name}: {missing} of {total} items of {previous.name} are missing; {RETRY_HINT}")
    return active[index]
