"""What the command line asks for: the config whose steps are made, and which of them are timed. Nothing here knows of tensors.

A benched phase has other rows than the run's and as many steps, so each step keeps its number and its learning rate.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from tandem.trainer.config import Phase, RunConfig, UserError, check_world
from tandem.trainer.config.schedule import PhaseSpan, Timeline

EVERY_PHASE = "all"
MICRO_BATCHES = 4
"""Forward passes on a replica in one step, where `--rows` does not say."""
INSTRUMENTED_STEPS = 3
"""Steps after the timed ones in which the device is waited for between the parts."""


@dataclass(frozen=True)
class Plan:
    """The steps of one phase, from its first on: warm-up, timed, instrumented, and with a file one under the profiler."""

    span: PhaseSpan
    """Of the config that is trained."""
    recipe_depth: int
    recipe_rows: int
    """What the given config has."""
    warmup_steps: int
    timed_steps: int
    profile: Path | None
    overrides: tuple[str, ...] = ()
    """As they were given, and the rows if others than the recipe's were asked for."""

    @property
    def total_steps(self) -> int:
        return self.warmup_steps + self.timed_steps + INSTRUMENTED_STEPS + (self.profile is not None)


def planned(config: RunConfig, arguments: argparse.Namespace, world_size: int) -> tuple[RunConfig, list[Plan]]:
    """The given config with the layers and rows that were asked for, and a plan for each phase that was.

    Raises: UserError for what config, options and number of ranks do not allow together.
    """
    check_options(config, arguments)
    replicas = max(1, world_size // config.parallel.tp_size)
    phases = config.schedule.phases
    chosen = [index for index, phase in enumerate(phases) if phase.name in chosen_names(config, arguments.phase)]
    resized = {index: resize(phases[index], arguments, replicas) for index in chosen}
    check_world(replace(config, schedule=replace(config.schedule, phases=list(resized.values()))), world_size)
    benched = replace(
        config,
        model=replace(config.model, depth=arguments.depth or config.model.depth),
        schedule=replace(
            config.schedule,
            batch_tokens=None,
            phases=[resized.get(index, phase) for index, phase in enumerate(phases)],
        ),
    )
    spans = Timeline(benched.schedule).spans
    resizes = {"--rows": arguments.rows, "--micro-rows": arguments.micro_rows}
    overrides = (*arguments.overrides, *(f"{option} {count}" for option, count in resizes.items() if count))
    plans = [
        Plan(
            spans[index], config.model.depth, phases[index].rows, arguments.warmup_steps, arguments.steps,
            profile_file(arguments.profile, phases[index].name if len(chosen) > 1 else None), overrides,
        )
        for index in chosen
    ]  # fmt: skip
    for plan in plans:
        if plan.total_steps > plan.span.phase.steps:
            raise UserError(
                f"--steps: {arguments.steps} makes {plan.total_steps} with warm-up and instrumented steps; phase "
                f"{plan.span.phase.name!r} has {plan.span.phase.steps}; ask for fewer"
            )
    return benched, plans


def check_options(config: RunConfig, arguments: argparse.Namespace) -> None:
    """Raises UserError for an option that is wrong by itself."""
    for name, least in (("depth", 1), ("rows", 1), ("micro_rows", 1), ("warmup_steps", 0), ("steps", 1)):
        given = getattr(arguments, name)
        if given is not None and given < least:
            raise UserError(f"--{name.replace('_', '-')}: {given}; must be at least {least}; change it")
    if arguments.depth and arguments.depth > config.model.depth:
        raise UserError(
            f"--depth: {arguments.depth}; the config has {config.model.depth} layers; ask for at most these"
        )
    if arguments.profile is None:
        return
    if arguments.profile.is_dir() or not arguments.profile.parent.is_dir():
        raise UserError(f"--profile: {arguments.profile}; is no file in a folder that exists; name another")


def chosen_names(config: RunConfig, asked: str | None) -> list[str]:
    """Names of the phases to time. Raises: UserError for a name that no phase has."""
    names = [phase.name for phase in config.schedule.phases]
    if asked is None:
        return names[:1]
    if asked not in (*names, EVERY_PHASE):
        raise UserError(f"--phase: {asked!r}; the config has {', '.join(names)}; name one of them, or {EVERY_PHASE}")
    return names if asked == EVERY_PHASE else [asked]


def profile_file(given: Path | None, phase: str | None) -> Path | None:
    """File of one phase's trace: the given one, with the phase's name before its suffixes if there are several phases."""
    if given is None or phase is None:
        return given
    stem, dot, suffixes = given.name.partition(".")
    return given.with_name(f"{stem}-{phase}{dot}{suffixes}")


def resize(phase: Phase, arguments: argparse.Namespace, replicas: int) -> Phase:
    """The phase with the rows asked for and its own number of steps. Raises: UserError where they do not divide."""
    micro_rows = arguments.micro_rows or phase.micro_rows
    together = replicas * micro_rows
    rows = arguments.rows or together * max(1, min(MICRO_BATCHES, phase.rows // together))
    if rows % together:
        raise UserError(
            f"--rows: {rows}; phase {phase.name!r} reads {micro_rows} in one forward pass on each of {replicas} replicas; "
            f"choose a multiple of {together}, or other --micro-rows"
        )
    return replace(phase, rows=rows, micro_rows=micro_rows, tokens=phase.steps * rows * phase.seq_len)
