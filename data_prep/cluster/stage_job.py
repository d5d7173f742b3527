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
from tandem.data_prep.executor import Advance
from tandem.data_prep.input_files import Input
from tandem.data_prep.settings import Settings
from tandem.data_prep.stages import Preparation, Stage
from tandem.trainer.config import UserError
from tandem.trainer.disk import whole_file

TRAIN = "train"
"""The job before all stages, where no tokenizer was given: it is as long as the text it is trained on."""
AGAIN = "run the same command again"


@dataclass(frozen=True)
class Request:
    """A preparation as it was asked for: it begins anew in every task."""

    output: Path
    settings: Settings
    inputs: list[Input]
    given: str | None
    vocab: int
    library: str

    @property
    def has_tokenizer(self) -> bool:
        work = self.output / output_folder.WORK
        return self.given is not None or stages.tokenizer_path(work, self.inputs).exists()

    def begin(self) -> Preparation:
        """The preparation; trains the tokenizer if that is still to do."""
        return stages.begin(
            self.output, self.settings, self.inputs, self.given, vocab=self.vocab, library=self.library, shown=_unseen
        )


@dataclass(frozen=True)
class Job:
    """A stage, or the training before them, in so many tasks."""

    request: Request
    name: str
    tasks: int
    items: list[Any] | None
    """Those that were left when it was submitted; None where only the stage before says which there are."""

    def work(self, rank: int, tasks: int) -> None:
        """The items of this task are finished.

        Raises: UserError where an item does, or where the stage before is not finished.
        """
        if output_folder.is_closed(self.request.output):  # a job that Slurm has begun again, and which had ended
            return
        if self.name == TRAIN:
            self.request.begin()
            return
        if not self.request.has_tokenizer:
            raise UserError(f"{self.name}: the tokenizer is not trained; {AGAIN}")
        preparation = self.request.begin()
        stage = _finished_before(preparation, self.name)
        items = self.items if self.items is not None else stage.items(preparation)
        mine = [item for item in items[rank::tasks] if not stage.is_finished(preparation, item)]
        if mine:
            do = stage.start(preparation)
            for item in mine:
                do(item, lambda count: None)

    def write(self, path: Path) -> None:
        """The job can be read from this file by every task."""
        with whole_file(path) as file:
            pickle.dump(self, file)


def read(path: Path) -> Job:
    """The job that was written there."""
    with path.open("rb") as file:
        job: Job = pickle.load(file)
    return job


def left(request: Request, tasks: int) -> list[Job]:
    """The jobs that make a corpus of what is there now, each to begin when the one before has ended well."""
    jobs = [] if request.has_tokenizer else [Job(request, TRAIN, 1, None)]
    preparation = None if jobs else request.begin()
    for stage in stages.stages(request.settings):
        items = stage.left(preparation) if preparation and not jobs else None
        if items is None:
            jobs.append(Job(request, stage.name, 1 if stage.is_single else tasks, None))
        elif items:
            jobs.append(Job(request, stage.name, min(tasks, len(items)), items))
    return jobs


def _finished_before(preparation: Preparation, name: str) -> Stage:
    """The stage of this name; those before it are finished."""
    before = None
    for stage in stages.stages(preparation.settings):
        if stage.name == name:
            break
        before = stage
    if before and (missing := len(before.left(preparation))):
        raise UserError(f"{name}: {missing} of {len(before.items(preparation))} items of {before.name} miss; {AGAIN}")
    return stage


def _unseen(description: str, total: int) -> Advance:
    return lambda count: None
