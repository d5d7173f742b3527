"""What the fields of a config owe one another: the rules that no type can say, each refused in one line."""

from __future__ import annotations

import math
from typing import Any

from tandem.trainer.config.sections import (
    AlibiScalingConfig,
    BTLMConfig,
    HybridLRConfig,
    PhaseConfig,
    StableLMConfig,
    TrainConfig,
    UserError,
)

RANK_WAIT_TIMEOUT_SECONDS = 600.0
"""How long ranks wait for one that does not arrive, before all fail."""
MIN_GUARD_WINDOW_STEPS = 8


def check_config(config: TrainConfig) -> None:
    """Raises UserError for the first rule between fields that the config breaks."""
    model, schedule = config.model, config.schedule
    _check_model(model)
    if config.mup is not None:
        _check_positive(config.mup, "mup", "base_hidden_size", "embedding_multiplier", "output_multiplier")
    if not schedule.phases:
        raise UserError("schedule.phases: is empty; a run has at least one phase; add one")
    for index, phase in enumerate(schedule.phases):
        _check_phase(config, f"schedule.phases[{index}]", phase)
    names = [phase.name for phase in schedule.phases]
    if len(set(names)) != len(names):
        raise UserError(f"schedule.phases: names {names}; each phase has its own name; rename one")
    _check_learning_rate(config)
    _check_positive(config.optim, "optim", "eps")
    for name in ("beta1", "beta2"):
        value = getattr(config.optim, name)
        if not 0 <= value < 1:
            raise UserError(f"optim.{name}: {value}; must be at least 0 and below 1; the recipes use 0.9 and 0.95")
    for section, name in (
        (config.optim, "weight_decay"), (config.optim, "max_grad_norm"), (config.evaluate, "every_steps"),
        (config.checkpoint, "every_steps"), (config.checkpoint, "keep_last"), (config.data, "prefetch_steps"),
        (config.data, "num_workers"), (config.data, "shuffle_block_tokens"), (config.run, "max_repeat_failures"),
        (config.guard, "spike_sigmas"), (config.guard, "max_skips"), (config.guard, "max_rollbacks"),
        (config.watchdog, "start_timeout_seconds"), (config.debug, "compare_replicas_every_steps"),
    ):  # fmt: skip
        if not 0 <= getattr(section, name) < math.inf:
            section_name, rule = (
                type(section).__name__.removesuffix("Config").lower(),
                "must not be negative nor infinite",
            )
            raise UserError(f"{section_name}.{name}: {getattr(section, name)}; {rule}; 0 turns it off")
    _check_positive(config.data, "data", "shuffle_window_tokens")
    _check_positive(config.data.cache, "data.cache", "max_size_gib", "max_attempts", "timeout_seconds")
    cache = config.data.cache
    total_pause_seconds = sum(map(cache.retry_delay_seconds, range(1, cache.max_attempts)))
    max_fetch_seconds = cache.max_attempts * cache.timeout_seconds + total_pause_seconds
    if max_fetch_seconds > RANK_WAIT_TIMEOUT_SECONDS:
        raise UserError(
            f"data.cache.max_attempts: {cache.max_attempts} tries of timeout_seconds {cache.timeout_seconds:g} may take "
            f"{max_fetch_seconds:g} s; ranks wait {RANK_WAIT_TIMEOUT_SECONDS:g} s for one another; lower one of them"
        )
    for name, max_epochs in config.data.max_epochs.items():
        if name not in config.data.sources or not 0 < max_epochs < math.inf:
            raise UserError(
                f"data.max_epochs.{name}: {max_epochs}; must be a positive finite number for a name in "
                f"data.sources; correct it, "
                "or leave it out for no limit"
            )
    _check_positive(config.parallel, "parallel", "tp_size", "bucket_elements")
    if config.guard.window_steps < MIN_GUARD_WINDOW_STEPS:
        raise UserError(
            f"guard.window_steps: {config.guard.window_steps}; must be at least {MIN_GUARD_WINDOW_STEPS}, for a spread to mean "
            "something; raise it"
        )
    step_seconds = config.watchdog.step_timeout_seconds
    if step_seconds is not None and not 0 <= step_seconds < math.inf:
        raise UserError(
            f"watchdog.step_timeout_seconds: {step_seconds}; must not be negative nor infinite; 0 turns it off"
        )
    _check_positive(config.log, "log", "every_steps")
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


def check_world_size(config: TrainConfig, world_size: int) -> None:
    """Raises UserError where model or phases do not divide over `world_size` ranks."""
    tp_size, model = config.parallel.tp_size, config.model
    if world_size % tp_size:
        raise UserError(
            f"parallel.tp_size: {tp_size} does not divide the {world_size} ranks of this launch; "
            "start a multiple of tp_size ranks or change tp_size"
        )
    dp_size = world_size // tp_size
    for name, value in (("num_heads", model.num_heads), ("num_kv_heads", model.num_kv_heads)):
        if value % tp_size:
            raise UserError(f"model.{name}: {value} is not divisible by parallel.tp_size {tp_size}; lower tp_size")
    for index, phase in enumerate(config.schedule.phases):
        if phase.global_batch_size % (dp_size * phase.micro_batch_size):
            raise UserError(
                f"schedule.phases[{index}].global_batch_size: {phase.global_batch_size} is not divisible by "
                f"data-parallel size {dp_size} "
                f"({world_size} ranks / tp_size {tp_size}) times micro_batch_size {phase.micro_batch_size}; "
                "change the number of ranks or micro_batch_size"
            )


def check_alibi_scaling(scaling: AlibiScalingConfig, key_path: str) -> None:
    """Raises UserError unless exactly one of the two numbers is given and lies above 1; `key_path` is the section's path."""
    factor, train_seq_len = scaling.factor, scaling.train_seq_len
    if (factor is None) == (train_seq_len is None):
        raise UserError(
            f"{key_path}: factor {factor}, train_seq_len {train_seq_len}; exactly one of them is given; write factor to "
            "interpolate by a fixed number, train_seq_len to interpolate rows longer than that"
        )
    if factor is not None and not 1 < factor < math.inf:
        raise UserError(f"{key_path}.factor: {factor}; must be a number above 1; for none set {key_path} to null")
    if train_seq_len is not None and train_seq_len <= 1:
        raise UserError(
            f"{key_path}.train_seq_len: {train_seq_len}; must be above 1; give the length of the rows the model was trained on"
        )


def _check_model(model: StableLMConfig | BTLMConfig) -> None:
    _check_positive(
        model,
        "model",
        "hidden_size",
        "num_layers",
        "num_heads",
        "ffn_hidden_size",
        "vocab_size",
        "norm_eps",
        "init_std",
    )
    if model.hidden_size % model.num_heads:
        raise UserError(
            f"model.hidden_size: {model.hidden_size} is not divisible by model.num_heads {model.num_heads}; "
            "head_dim is width / heads; change one of them"
        )
    if model.init_truncation_sigmas and not 0.1 <= model.init_truncation_sigmas < math.inf:
        raise UserError(
            f"model.init_truncation_sigmas: {model.init_truncation_sigmas}; must be 0, which does not cut, or at least 0.1: "
            "values are drawn until they lie within"
        )
    if isinstance(model, BTLMConfig):
        if model.alibi_scaling is not None:
            check_alibi_scaling(model.alibi_scaling, "model.alibi_scaling")
        return
    _check_positive(model, "model", "num_kv_heads", "rotary_base")
    if model.num_heads % model.num_kv_heads:
        raise UserError(
            f"model.num_kv_heads: {model.num_kv_heads} does not divide model.num_heads {model.num_heads}; "
            "each key head serves the same number of query heads; change one of them"
        )
    rotary_dim = model.partial_rotary_factor * model.head_dim
    if not 0 < model.partial_rotary_factor <= 1 or rotary_dim != int(rotary_dim) or int(rotary_dim) % 2:
        raise UserError(
            f"model.partial_rotary_factor: {model.partial_rotary_factor} of head_dim {model.head_dim} is {rotary_dim:g}; "
            "must be an even whole number of dimensions; change the fraction"
        )


def _check_phase(config: TrainConfig, key_path: str, phase: PhaseConfig) -> None:
    _check_positive(phase, key_path, "tokens", "seq_len", "global_batch_size", "micro_batch_size")
    tokens_per_step = config.schedule.tokens_per_step
    if tokens_per_step is not None and phase.tokens_per_step != tokens_per_step:
        raise UserError(
            f"{key_path}.global_batch_size: {phase.global_batch_size} rows of {phase.seq_len} tokens are "
            f"{phase.tokens_per_step}; "
            f"schedule.tokens_per_step says {tokens_per_step} in every phase; change global_batch_size, or set "
            f"tokens_per_step to null"
        )
    if phase.tokens % phase.tokens_per_step:
        nearest_tokens = max(1, round(phase.tokens / phase.tokens_per_step)) * phase.tokens_per_step
        raise UserError(
            f"{key_path}.tokens: {phase.tokens} is not a multiple of global_batch_size * seq_len = {phase.tokens_per_step}; "
            f"a phase is a whole number of steps; the nearest is {nearest_tokens}"
        )
    if phase.global_batch_size % phase.micro_batch_size:
        raise UserError(
            f"{key_path}.micro_batch_size: {phase.micro_batch_size} does not divide global_batch_size "
            f"{phase.global_batch_size}; choose a divisor"
        )
    for name, share in phase.mixture.items():
        if name not in config.data.sources:
            known = ", ".join(config.data.sources) or "none"
            raise UserError(
                f"{key_path}.mixture: {name!r} is not a source; data.sources has {known}; add it or correct the name"
            )
        if not 0 <= share <= 1:
            raise UserError(
                f"{key_path}.mixture.{name}: {share}; a share lies between 0 and 1; leave the source out for none"
            )
    share_sum = sum(phase.mixture.values())
    if abs(share_sum - 1) > 1e-6:
        raise UserError(
            f"{key_path}.mixture: shares sum to {share_sum:g}; must sum to 1; for one source write {{name: 1.0}}"
        )
    if config.evaluate.every_steps and (config.evaluate.tokens < 1 or config.evaluate.tokens % phase.seq_len):
        raise UserError(
            f"evaluate.tokens: {config.evaluate.tokens} is not a multiple of {key_path}.seq_len {phase.seq_len}; "
            "validation rows are whole; change it"
        )


def _check_learning_rate(config: TrainConfig) -> None:
    lr, total_steps = config.schedule.lr, sum(phase.num_steps for phase in config.schedule.phases)
    _check_positive(lr, "schedule.lr", "peak")
    if not 0 <= lr.final <= lr.peak:
        raise UserError(f"schedule.lr.final: {lr.final}; must lie between 0 and peak {lr.peak}; change one of them")
    if not 0 <= lr.warmup_steps < total_steps:
        raise UserError(
            f"schedule.lr.warmup_steps: {lr.warmup_steps}; must be below the {total_steps} steps of the run; lower it"
        )
    if lr.decay_steps is not None and lr.decay_steps < 1:
        raise UserError(
            f"schedule.lr.decay_steps: {lr.decay_steps}; must be at least 1; null decays to the end of the run"
        )
    if not isinstance(lr, HybridLRConfig):
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


def _check_positive(section: Any, key_path: str, *names: str) -> None:
    for name in names:
        if not 0 < getattr(section, name) < math.inf:  # nan lies nowhere
            raise UserError(f"{key_path}.{name}: {getattr(section, name)}; must be positive and finite; change it")
