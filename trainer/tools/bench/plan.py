"""Turn the options of `tandem bench` into a config to train and a plan of steps for each phase. Needs no torch.

A phase keeps its number of steps if its rows change, so every step keeps its number and its learning rate.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from tandem.trainer.config import PhaseConfig, TrainConfig, UserError, check_world_size
from tandem.trainer.config.schedule import PhaseSpan, Timeline

ALL_PHASES = "all"
DEFAULT_NUM_MICRO_BATCHES = 4
"""Micro-batches of a replica in one step, unless `--global-batch-size` is given."""
NUM_INSTRUMENTED_STEPS = 3
"""Steps after the timed ones that synchronize with the device between their parts."""


@dataclass(frozen=True)
class PhasePlan:
    """The first steps of a phase: warm-up steps, timed steps, instrumented steps and perhaps one under the profiler."""

    span: PhaseSpan
    """The phase of the config that is trained."""
    recipe_num_layers: int
    recipe_global_batch_size: int
    """Number of layers and global batch size in the given config."""
    num_warmup_steps: int
    num_timed_steps: int
    trace_path: Path | None
    overrides: tuple[str, ...] = ()
    """The overrides on the command line, and the options that change the rows."""

    @property
    def num_steps(self) -> int:
        return self.num_warmup_steps + self.num_timed_steps + NUM_INSTRUMENTED_STEPS + (self.trace_path is not None)


def build_plans(
    config: TrainConfig, arguments: argparse.Namespace, world_size: int
) -> tuple[TrainConfig, list[PhasePlan]]:
    """Return the config with the requested layers and rows, and a plan for each requested phase.

    Raises: UserError if config, options and number of ranks do not fit together.
    """
    check_options(config, arguments)
    dp_size = max(1, world_size // config.parallel.tp_size)
    phases, names = config.schedule.phases, select_phase_names(config, arguments.phase)
    resized = {phase.name: resize_phase(phase, arguments, dp_size) for phase in phases if phase.name in names}
    check_world_size(replace(config, schedule=replace(config.schedule, phases=list(resized.values()))), world_size)
    all_phases = [resized.get(phase.name, phase) for phase in phases]
    schedule = replace(config.schedule, tokens_per_step=None, phases=all_phases)
    model = replace(config.model, num_layers=arguments.num_layers or config.model.num_layers)
    resizes = {"--global-batch-size": arguments.global_batch_size, "--micro-batch-size": arguments.micro_batch_size}
    overrides = (*arguments.overrides, *(f"{option} {count}" for option, count in resizes.items() if count))
    plans = [
        PhasePlan(
            span, config.model.num_layers, phase.global_batch_size, arguments.warmup_steps, arguments.steps,
            phase_trace_path(arguments.profile, phase.name if len(names) > 1 else None), overrides,
        )
        for phase, span in zip(phases, Timeline(schedule).phase_spans, strict=True) if phase.name in names
    ]  # fmt: skip
    for plan in plans:
        if plan.num_steps > plan.span.phase.num_steps:
            raise UserError(
                f"--steps: {arguments.steps} timed steps make {plan.num_steps} with the warm-up and instrumented steps, "
                f"but phase {plan.span.phase.name!r} has only {plan.span.phase.num_steps}; use fewer"
            )
    return replace(config, model=model, schedule=schedule), plans


def check_options(config: TrainConfig, arguments: argparse.Namespace) -> None:
    """Raise UserError if an option is invalid on its own."""
    positive = dict.fromkeys(("num_layers", "global_batch_size", "micro_batch_size", "steps"), 1)
    check_minimums(arguments, positive | {"warmup_steps": 0})
    if arguments.num_layers and arguments.num_layers > config.model.num_layers:
        raise UserError(
            f"--num-layers: {arguments.num_layers} is more than the config's {config.model.num_layers}; use at most that many"
        )
    if arguments.profile and (arguments.profile.is_dir() or not arguments.profile.parent.is_dir()):
        raise UserError(
            f"--profile: {arguments.profile} is a folder, or its folder does not exist; name another file, or make the folder"
        )


def check_minimums(arguments: argparse.Namespace, minimums: dict[str, int]) -> None:
    """Raise UserError if a given option is less than its minimum."""
    for name, minimum in minimums.items():
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            raise UserError(f"--{name.replace('_', '-')}: {value} is less than {minimum}; use {minimum} or more")


def select_phase_names(config: TrainConfig, requested: str | None) -> list[str]:
    """Return the names of the phases to measure. Raises: UserError if no phase has the requested name."""
    names = [phase.name for phase in config.schedule.phases]
    if requested is None:
        return names[:1]
    if requested not in (*names, ALL_PHASES):
        raise UserError(f"--phase: {requested!r} is not a phase of the config; use {', '.join(names)}, or {ALL_PHASES}")
    return names if requested == ALL_PHASES else [requested]


def phase_trace_path(path: Path | None, phase: str | None) -> Path | None:
    """Return the trace file of a phase: `path`, with the phase's name, if any, inserted before its suffixes."""
    if path is None or phase is None:
        return path
    stem, dot, suffixes = path.name.partition(".")
    return path.with_name(f"{stem}-{phase}{dot}{suffixes}")


def resize_phase(phase: PhaseConfig, arguments: argparse.Namespace, dp_size: int) -> PhaseConfig:
    """Give the phase the requested rows and keep its number of steps. Raises: UserError if the rows do not divide."""
    micro_batch_size = arguments.micro_batch_size or phase.micro_batch_size
    rows_per_forward = dp_size * micro_batch_size
    num_micro_batches = max(1, min(DEFAULT_NUM_MICRO_BATCHES, phase.global_batch_size // rows_per_forward))
    rows = arguments.global_batch_size or rows_per_forward * num_micro_batches
    if rows % rows_per_forward:
        raise UserError(
            f"--global-batch-size: {rows} rows do not divide into micro-batches of {micro_batch_size} on every "
            f"replica (replicas: {dp_size}) in phase {phase.name!r}; use a multiple of {rows_per_forward} or change "
            "--micro-batch-size"
        )
    tokens = phase.num_steps * rows * phase.seq_len
    return replace(phase, global_batch_size=rows, micro_batch_size=micro_batch_size, tokens=tokens)
