"""What the fields of a config owe one another: the rules that no type can say, each refused in one line."""

from __future__ import annotations

import math
from typing import Any

from tandem.trainer.config.sections import BTLM, AlibiScaling, Hybrid, Phase, RunConfig, StableLM, UserError

RANKS_WAIT_SECONDS = 600.0
"""How long ranks wait for one that does not arrive, before all fail."""
MIN_WINDOW_STEPS = 8


def check(config: RunConfig) -> None:
    """Raises UserError for the first rule between fields that the config breaks."""
    model, schedule = config.model, config.schedule
    _check_model(model)
    if config.mup is not None:
        _positive(config.mup, "mup", "base_width", "embedding_multiplier", "output_multiplier")
    if not schedule.phases:
        raise UserError("schedule.phases: is empty; a run has at least one phase; add one")
    for index, phase in enumerate(schedule.phases):
        _check_phase(config, f"schedule.phases[{index}]", phase)
    names = [phase.name for phase in schedule.phases]
    if len(set(names)) != len(names):
        raise UserError(f"schedule.phases: names {names}; each phase has its own name; rename one")
    _check_learning_rate(config)
    _positive(config.optim, "optim", "epsilon")
    for name in ("beta1", "beta2"):
        value = getattr(config.optim, name)
        if not 0 <= value < 1:
            raise UserError(f"optim.{name}: {value}; must be at least 0 and below 1; the recipes use 0.9 and 0.95")
    for section, name in (
        (config.optim, "weight_decay"), (config.optim, "clip_norm"), (config.evaluate, "every_steps"),
        (config.checkpoint, "every_steps"), (config.checkpoint, "keep"), (config.data, "prefetch_steps"),
        (config.data, "workers"), (config.data, "block_tokens"), (config.run, "max_failures"),
        (config.guard, "spike_sigmas"), (config.guard, "max_skips"), (config.guard, "max_rollbacks"),
        (config.watchdog, "start_seconds"), (config.debug, "compare_replicas_every_steps"),
    ):  # fmt: skip
        if not 0 <= getattr(section, name) < math.inf:
            where, rule = type(section).__name__.lower(), "must not be negative nor infinite"
            raise UserError(f"{where}.{name}: {getattr(section, name)}; {rule}; 0 turns it off")
    _positive(config.data, "data", "window_tokens")
    _positive(config.data.cache, "data.cache", "gib", "attempts", "timeout_seconds")
    cache = config.data.cache
    pauses_seconds = sum(map(cache.pause_seconds, range(1, cache.attempts)))
    patience_seconds = cache.attempts * cache.timeout_seconds + pauses_seconds
    if patience_seconds > RANKS_WAIT_SECONDS:
        raise UserError(
            f"data.cache.attempts: {cache.attempts} tries of timeout_seconds {cache.timeout_seconds:g} may take "
            f"{patience_seconds:g} s; ranks wait {RANKS_WAIT_SECONDS:g} s for one another; lower one of them"
        )
    for name, limit in config.data.max_epochs.items():
        if name not in config.data.sources or not 0 < limit < math.inf:
            raise UserError(
                f"data.max_epochs.{name}: {limit}; must be a positive finite number for a name in data.sources; correct it, "
                "or leave it out for no limit"
            )
    _positive(config.parallel, "parallel", "tp_size", "bucket_elements")
    if config.guard.window_steps < MIN_WINDOW_STEPS:
        raise UserError(
            f"guard.window_steps: {config.guard.window_steps}; must be at least {MIN_WINDOW_STEPS}, for a spread to mean "
            "something; raise it"
        )
    step_seconds = config.watchdog.step_seconds
    if step_seconds is not None and not 0 <= step_seconds < math.inf:
        raise UserError(f"watchdog.step_seconds: {step_seconds}; must not be negative nor infinite; 0 turns it off")
    _positive(config.log, "log", "every_steps")
    if config.parallel.zero_stage == 0 and config.run.precision == "bf16":
        # The gradients of a second micro-batch would be added in bf16.
        raise UserError(
            "parallel.zero_stage: 0 with run.precision bf16; gradients are accumulated in fp32, which DeepSpeed does "
            "from stage 1 on; set zero_stage to 1 or precision to fp32"
        )
    if "/" in config.run.name or config.run.name in ("", ".", ".."):
        raise UserError(f"run.name: {config.run.name!r}; is the name of one folder; leave out slashes")
    if config.run.stop_step is not None and config.run.stop_step < 1:
        raise UserError(f"run.stop_step: {config.run.stop_step}; must be at least 1; null runs the schedule to its end")


def check_world(config: RunConfig, world_size: int) -> None:
    """Raises UserError where model or phases do not divide over `world_size` ranks."""
    tp_size, model = config.parallel.tp_size, config.model
    if world_size % tp_size:
        raise UserError(
            f"parallel.tp_size: {tp_size} does not divide the {world_size} ranks of this launch; "
            "start a multiple of tp_size ranks or change tp_size"
        )
    dp_size = world_size // tp_size
    for name, value in (("heads", model.heads), ("kv_heads", model.kv_heads)):
        if value % tp_size:
            raise UserError(f"model.{name}: {value} is not divisible by parallel.tp_size {tp_size}; lower tp_size")
    for index, phase in enumerate(config.schedule.phases):
        if phase.rows % (dp_size * phase.micro_rows):
            raise UserError(
                f"schedule.phases[{index}].rows: {phase.rows} is not divisible by data-parallel size {dp_size} "
                f"({world_size} ranks / tp_size {tp_size}) times micro_rows {phase.micro_rows}; "
                "change the number of ranks or micro_rows"
            )


def check_alibi_scaling(scaling: AlibiScaling, where: str) -> None:
    """Raises UserError unless exactly one of the two numbers is given and lies above 1; `where` is the section's path."""
    factor, train_seq_len = scaling.factor, scaling.train_seq_len
    if (factor is None) == (train_seq_len is None):
        raise UserError(
            f"{where}: factor {factor}, train_seq_len {train_seq_len}; exactly one of them is given; write factor to "
            "interpolate by a fixed number, train_seq_len to interpolate rows longer than that"
        )
    if factor is not None and not 1 < factor < math.inf:
        raise UserError(f"{where}.factor: {factor}; must be a number above 1; for none set {where} to null")
    if train_seq_len is not None and train_seq_len <= 1:
        raise UserError(
            f"{where}.train_seq_len: {train_seq_len}; must be above 1; give the length of the rows the model was trained on"
        )


def _check_model(model: StableLM | BTLM) -> None:
    _positive(model, "model", "width", "depth", "heads", "ffn_width", "vocab", "norm_epsilon", "init_std")
    if model.width % model.heads:
        raise UserError(
            f"model.width: {model.width} is not divisible by model.heads {model.heads}; "
            "head_dim is width / heads; change one of them"
        )
    if model.init_truncation_sigmas and not 0.1 <= model.init_truncation_sigmas < math.inf:
        raise UserError(
            f"model.init_truncation_sigmas: {model.init_truncation_sigmas}; must be 0, which does not cut, or at least 0.1: "
            "values are drawn until they lie within"
        )
    if isinstance(model, BTLM):
        if model.alibi_scaling is not None:
            check_alibi_scaling(model.alibi_scaling, "model.alibi_scaling")
        return
    _positive(model, "model", "kv_heads", "rotary_base")
    if model.heads % model.kv_heads:
        raise UserError(
            f"model.kv_heads: {model.kv_heads} does not divide model.heads {model.heads}; "
            "each key head serves the same number of query heads; change one of them"
        )
    rotated = model.rotary_fraction * model.head_dim
    if not 0 < model.rotary_fraction <= 1 or rotated != int(rotated) or int(rotated) % 2:
        raise UserError(
            f"model.rotary_fraction: {model.rotary_fraction} of head_dim {model.head_dim} is {rotated:g}; "
            "must be an even whole number of dimensions; change the fraction"
        )


def _check_phase(config: RunConfig, where: str, phase: Phase) -> None:
    _positive(phase, where, "tokens", "seq_len", "rows", "micro_rows")
    declared = config.schedule.batch_tokens
    if declared is not None and phase.batch_tokens != declared:
        raise UserError(
            f"{where}.rows: {phase.rows} rows of {phase.seq_len} tokens are {phase.batch_tokens}; "
            f"schedule.batch_tokens says {declared} in every phase; change rows, or set batch_tokens to null"
        )
    if phase.tokens % phase.batch_tokens:
        nearest = max(1, round(phase.tokens / phase.batch_tokens)) * phase.batch_tokens
        raise UserError(
            f"{where}.tokens: {phase.tokens} is not a multiple of rows * seq_len = {phase.batch_tokens}; "
            f"a phase is a whole number of steps; the nearest is {nearest}"
        )
    if phase.rows % phase.micro_rows:
        raise UserError(f"{where}.micro_rows: {phase.micro_rows} does not divide rows {phase.rows}; choose a divisor")
    for name, share in phase.mixture.items():
        if name not in config.data.sources:
            known = ", ".join(config.data.sources) or "none"
            raise UserError(
                f"{where}.mixture: {name!r} is not a source; data.sources has {known}; add it or correct the name"
            )
        if not 0 <= share <= 1:
            raise UserError(
                f"{where}.mixture.{name}: {share}; a share lies between 0 and 1; leave the source out for none"
            )
    total = sum(phase.mixture.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"{where}.mixture: shares sum to {total:g}; must sum to 1; for one source write {{name: 1.0}}")
    if config.evaluate.every_steps and (config.evaluate.tokens < 1 or config.evaluate.tokens % phase.seq_len):
        raise UserError(
            f"evaluate.tokens: {config.evaluate.tokens} is not a multiple of {where}.seq_len {phase.seq_len}; "
            "validation rows are whole; change it"
        )


def _check_learning_rate(config: RunConfig) -> None:
    lr, total = config.schedule.lr, sum(phase.steps for phase in config.schedule.phases)
    _positive(lr, "schedule.lr", "peak")
    if not 0 <= lr.final <= lr.peak:
        raise UserError(f"schedule.lr.final: {lr.final}; must lie between 0 and peak {lr.peak}; change one of them")
    if not 0 <= lr.warmup_steps < total:
        raise UserError(
            f"schedule.lr.warmup_steps: {lr.warmup_steps}; must be below the {total} steps of the run; lower it"
        )
    if lr.decay_steps is not None and lr.decay_steps < 1:
        raise UserError(
            f"schedule.lr.decay_steps: {lr.decay_steps}; must be at least 1; null decays to the end of the run"
        )
    if not isinstance(lr, Hybrid):
        return
    if not 0 < lr.switch_fraction < 0.5:
        raise UserError(
            f"schedule.lr.switch_fraction: {lr.switch_fraction}; must lie between 0 and 0.5, where the cosine falls; "
            "Stable LM 2 uses 0.25"
        )
    if lr.offset_steps < 0 or lr.offset_steps > lr.warmup_steps:
        raise UserError(
            f"schedule.lr.offset_steps: {lr.offset_steps}; must lie between 0 and warmup_steps {lr.warmup_steps}; change it"
        )
    if lr.cooldown_start_step is not None and (lr.cooldown_steps < 1 or lr.cooldown_start_step < lr.warmup_steps):
        raise UserError(
            f"schedule.lr.cooldown_steps: {lr.cooldown_steps} from step {lr.cooldown_start_step}; a cooldown follows the "
            "warm-up and has at least 1 step; change them, or set cooldown_start_step to null"
        )


def _positive(section: Any, where: str, *names: str) -> None:
    for name in names:
        if not 0 < getattr(section, name) < math.inf:  # nan lies nowhere
            raise UserError(f"{where}.{name}: {getattr(section, name)}; must be positive and finite; change it")
