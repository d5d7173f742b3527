"""One job: its tasks share the items of a stage.

All tasks see the same list of items and take every n-th, so they need not communicate. Finished items are skipped.
datatrove's record of finished tasks is not used: it counts tasks, so another number of tasks would skip documents.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.data_prep import output_folder, stages
from tandem.data_prep.input_files import InputFile
from tandem.data_prep.settings import PrepareSettings
from tandem.data_prep.stages import Preparation, Stage
from tandem.trainer.config import UserError
from tandem.trainer.disk import atomic_file

TRAIN_TOKENIZER = "train-tokenizer"
"""The first job, if no tokenizer was given."""
RETRY_HINT = "run the same command again"


@dataclass(frozen=True)
class PreparationRequest:
    """The arguments of a preparation, from which every task creates it."""

    output: Path
    settings: PrepareSettings
    inputs: list[InputFile]
    tokenizer_json: str | None
    vocab_size: int
    tokenizer_library: str

    @property
    def has_tokenizer(self) -> bool:
        work = self.output / output_folder.WORK_FOLDER
        return self.tokenizer_json is not None or stages.trained_tokenizer_path(work, self.inputs).exists()

    def create_preparation(self) -> Preparation:
        """Create the preparation. Train the tokenizer if that has not been done."""
        return stages.create_preparation(
            self.output, self.settings, self.inputs, self.tokenizer_json, vocab_size=self.vocab_size,
            tokenizer_library=self.tokenizer_library, start_progress=lambda description, total: lambda count: None,
        )  # fmt: skip


@dataclass(frozen=True)
class StageJob:
    """A stage, or the training of the tokenizer, in `num_tasks` tasks."""

    request: PreparationRequest
    name: str
    num_tasks: int
    items: list[Any] | None
    """The items that were unfinished at submission; None if they are known only after the previous stage."""

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
        task_items = [item for item in items[task_index::num_tasks] if not stage.is_finished(preparation, item)]
        if task_items:
            do = stage.make_item_function(preparation)
            for item in task_items:
                do(item, lambda count: None)

    def save(self, path: Path) -> None:
        """Write the job to a file for its tasks."""
        with atomic_file(path) as file:
            pickle.dump(self, file)


def load_job(path: Path) -> StageJob:
    """Load a job from its file."""
    with path.open("rb") as file:
        job: StageJob = pickle.load(file)
    return job


def plan_jobs(request: PreparationRequest, num_tasks: int) -> list[StageJob]:
    """Return the jobs that complete the corpus. Each must start after the previous one has succeeded."""
    jobs = [] if request.has_tokenizer else [StageJob(request, TRAIN_TOKENIZER, 1, None)]
    preparation = None if jobs else request.create_preparation()
    for stage in stages.active_stages(request.settings):
        items = stage.unfinished_items(preparation) if preparation and not jobs else None
        if items is None:
            jobs.append(StageJob(request, stage.name, 1 if stage.has_single_item else num_tasks, None))
        elif items:
            jobs.append(StageJob(request, stage.name, min(num_tasks, len(items)), items))
    return jobs


def _find_ready_stage(preparation: Preparation, name: str) -> Stage:
    """Return the stage of this name.  Raises: UserError if the previous stage is not finished."""
    previous_stage = None
    for stage in stages.active_stages(preparation.settings):
        if stage.name == name:
            break
        previous_stage = stage
    if previous_stage and (missing := len(previous_stage.unfinished_items(preparation))):
        total = len(previous_stage.items(preparation))
        raise UserError(f"{name}: {missing} of {total} items of {previous_stage.name} are missing; {RETRY_HINT}")
    return stage
