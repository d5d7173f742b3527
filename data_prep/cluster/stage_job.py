"""What one job does: its tasks share the items of a stage among themselves.

The items are the same list to all tasks, and a task takes every n-th of it, so no task needs to hear of the others; items
that are finished are passed over. Datatrove's own marks of finished tasks are not used: they count tasks, and with
another number of tasks documents would be left out.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.data_prep import output_folder, stages
from tandem.data_prep.executor import ProgressCallback
from tandem.data_prep.input_files import InputFile
from tandem.data_prep.settings import PrepareSettings
from tandem.data_prep.stages import Preparation, Stage
from tandem.trainer.config import UserError
from tandem.trainer.disk import atomic_file

TRAIN_TOKENIZER = "train-tokenizer"
"""The job before all stages, where no tokenizer was given: it is as long as the text it is trained on."""
RETRY_HINT = "run the same command again"


@dataclass(frozen=True)
class PreparationRequest:
    """A preparation as it was asked for: it begins anew in every task."""

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
        """The preparation; trains the tokenizer if that is still to do."""
        return stages.create_preparation(
            self.output,
            self.settings,
            self.inputs,
            self.tokenizer_json,
            vocab_size=self.vocab_size,
            tokenizer_library=self.tokenizer_library,
            start_progress=_no_progress,
        )


@dataclass(frozen=True)
class StageJob:
    """A stage, or the training before them, in so many tasks."""

    request: PreparationRequest
    name: str
    num_tasks: int
    items: list[Any] | None
    """Those that were left when it was submitted; None where only the stage before says which there are."""

    def run_task(self, task_index: int, num_tasks: int) -> None:
        """The items of this task are finished.

        Raises: UserError where an item does, or where the stage before is not finished.
        """
        if output_folder.clear_if_finished(
            self.request.output
        ):  # a job that Slurm has begun again, and which had ended
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
        """The job can be read from this file by every task."""
        with atomic_file(path) as file:
            pickle.dump(self, file)


def load_job(path: Path) -> StageJob:
    """The job that was written there."""
    with path.open("rb") as file:
        job: StageJob = pickle.load(file)
    return job


def plan_jobs(request: PreparationRequest, num_tasks: int) -> list[StageJob]:
    """The jobs that make a corpus of what is there now, each to begin when the one before has ended well."""
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
    """The stage of this name; those before it are finished."""
    previous_stage = None
    for stage in stages.active_stages(preparation.settings):
        if stage.name == name:
            break
        previous_stage = stage
    if previous_stage and (missing := len(previous_stage.unfinished_items(preparation))):
        raise UserError(
            f"{name}: {missing} of {len(previous_stage.items(preparation))} items of {previous_stage.name} miss; {RETRY_HINT}"
        )
    return stage


def _no_progress(description: str, total: int) -> ProgressCallback:
    return lambda count: None
