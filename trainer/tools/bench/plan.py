"""What the command line asks for: the config whose steps are made, and which of them are timed. Nothing here knows of tensors.

A benched phase has other rows than the run's and as many steps, so each step keeps its number and its learning rate.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from tandem.trainer.config import PhaseConfig, TrainConfig, UserError, check_world_size
from tandem.trainer.config.schedule import PhaseSpan, Timeline

ALL_PHASES = "all"
DEFAULT_NUM_MICRO_BATCHES = 4
"""Forward passes on a replica in one step, where `--global-batch-size` does not say."""
NUM_INSTRUMENTED_STEPS = 3
"""Steps after the timed ones in which the device is waited for between the parts."""


@dataclass(frozen=True)
class PhasePlan:
    """The steps of one phase, from its first on: warm-up, timed, instrumented, and with a file one under the profiler."""

    span: PhaseSpan
    """Of the config that is trained."""
    recipe_num_layers: int
    recipe_global_batch_size: int
    """What the given config has."""
    num_warmup_steps: int
    num_timed_steps: int
    trace_path: Path | None
    overrides: tuple[str, ...] = ()
    """As they were given, and the rows if others than the recipe's were asked for."""

    @property
    def num_steps(self) -> int:
        return self.num_warmup_steps + self.num_timed_steps + NUM_INSTRUMENTED_STEPS + (self.trace_path is not None)


def build_plans(
    config: TrainConfig, arguments: argparse.Namespace, world_size: int
) -> tuple[TrainConfig, list[PhasePlan]]:
    """The given config with the layers and rows that were asked for, and a plan for each phase that was.

    Raises: UserError for what config, options and number of ranks do not allow together.
    """
    check_options(config, arguments)
    dp_size = max(1, world_size // config.parallel.tp_size)
    phases = config.schedule.phases
    phase_indices = [
        index for index, phase in enumerate(phases) if phase.name in select_phase_names(config, arguments.phase)
    ]
    resized = {index: resize_phase(phases[index], arguments, dp_size) for index in phase_indices}
    check_world_size(replace(config, schedule=replace(config.schedule, phases=list(resized.values()))), world_size)
    bench_config = replace(
        config,
        model=replace(config.model, num_layers=arguments.num_layers or config.model.num_layers),
        schedule=replace(
            config.schedule,
            tokens_per_step=None,
            phases=[resized.get(index, phase) for index, phase in enumerate(phases)],
        ),
    )
    spans = Timeline(bench_config.schedule).phase_spans
    resizes = {"--global-batch-size": arguments.global_batch_size, "--micro-batch-size": arguments.micro_batch_size}
    overrides = (*arguments.overrides, *(f"{option} {count}" for option, count in resizes.items() if count))
    plans = [
        PhasePlan(
            spans[index], config.model.num_layers, phases[index].global_batch_size, arguments.warmup_steps, arguments.steps,
            phase_trace_path(arguments.profile, phases[index].name if len(phase_indices) > 1 else None), overrides,
        )
        for index in phase_indices
    ]  # fmt: skip
    for plan in plans:
        if plan.num_steps > plan.span.phase.num_steps:
            raise UserError(
                f"--steps: {arguments.steps} makes {plan.num_steps} with warm-up and instrumented steps; phase "
                f"{plan.span.phase.name!r} has {plan.span.phase.num_steps}; ask for fewer"
            )
    return bench_config, plans


def check_options(config: TrainConfig, arguments: argparse.Namespace) -> None:
    """Raises UserError for an option that is wrong by itself."""
    for name, minimum in (
        ("num_layers", 1),
        ("global_batch_size", 1),
        ("micro_batch_size", 1),
        ("warmup_steps", 0),
        ("steps", 1),
    ):
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            raise UserError(f"--{name.replace('_', '-')}: {value}; must be at least {minimum}; change it")
    if arguments.num_layers and arguments.num_layers > config.model.num_layers:
        raise UserError(
            f"--num-layers: {arguments.num_layers}; the config has {config.model.num_layers} layers; ask for at most these"
        )
    if arguments.profile is None:
        return
    if arguments.profile.is_dir() or not arguments.profile.parent.is_dir():
        raise UserError(f"--profile: {arguments.profile}; is no file in a folder that exists; name another")


def select_phase_names(config: TrainConfig, requested: str | None) -> list[str]:
    """Names of the phases to time. Raises: UserError for a name that no phase has."""
    names = [phase.name for phase in config.schedule.phases]
    if requested is None:
        return names[:1]
    if requested not in (*names, ALL_PHASES):
        raise UserError(f"--phase: {requested!r}; the config has {', '.join(names)}; name one of them, or {ALL_PHASES}")
    return names if requested == ALL_PHASES else [requested]


def phase_trace_path(path: Path | None, phase: str | None) -> Path | None:
    """File of one phase's trace: the given one, with the phase's name before its suffixes if there are several phases."""
    if path is None or phase is None:
        return path
    stem, dot, suffixes = path.name.partition(".")
    return path.with_name(f"{stem}-{phase}{dot}{suffixes}")


def resize_phase(phase: PhaseConfig, arguments: argparse.Namespace, dp_size: int) -> PhaseConfig:
    """The phase with the rows asked for and its own number of steps. Raises: UserError where they do not divide."""
    micro_batch_size = arguments.micro_batch_size or phase.micro_batch_size
    rows_per_forward = dp_size * micro_batch_size
    global_batch_size = arguments.global_batch_size or rows_per_forward * max(
        1, min(DEFAULT_NUM_MICRO_BATCHES, phase.global_batch_size // rows_per_forward)
    )
    if global_batch_size % rows_per_forward:
        raise UserError(
            f"--global-batch-size: {global_batch_size}; phase {phase.name!r} reads {micro_batch_size} in one "
            f"forward pass on each of {dp_size} replicas; "
            f"choose a multiple of {rows_per_forward}, or other --micro-batch-size"
        )
    return replace(
        phase,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        tokens=phase.num_steps * global_batch_size * phase.seq_len,
    )
