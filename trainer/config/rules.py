"""Rules between the values of a config that types cannot express. A broken rule is a UserError of one line."""

from __future__ import annotations

import math
import re

from tandem.trainer.config import sections

RANK_WAIT_TIMEOUT_SECONDS = 600.0
"""How long the ranks wait for a missing one before they all fail."""


def check_config(config: sections.TrainConfig) -> None:
    """Raises: UserError for the first broken rule."""
    schedule, data, run = config.schedule, config.data, config.run
    _check_model(config.model)
    _require(bool(schedule.phases), "schedule.phases: the list is empty; add at least one phase")
    for index, phase in enumerate(schedule.phases):
        _check_phase(config, f"schedule.phases[{index}]", phase)
    names = [phase.name for phase in schedule.phases]
    _require(len(set(names)) == len(names), f"schedule.phases: the names {names} are not unique; rename a phase")
    _check_learning_rate(config)
    for name in ("beta1", "beta2"):
        value = getattr(config.optim, name)
        rule = "use a value of at least 0 and below 1; the recipes use 0.9 and 0.95"
        _require(0 <= value < 1, f"optim.{name}: {value} is out of range; {rule}")
    cache = data.cache
    total_pause_seconds = sum(map(cache.retry_delay_seconds, range(1, cache.max_attempts)))
    max_fetch_seconds = cache.max_attempts * cache.timeout_seconds + total_pause_seconds
    _require(
        max_fetch_seconds <= RANK_WAIT_TIMEOUT_SECONDS,
        f"data.cache.max_attempts: {cache.max_attempts} attempts with timeout_seconds {cache.timeout_seconds:g} can take "
        f"{max_fetch_seconds:g} s, but ranks wait only {RANK_WAIT_TIMEOUT_SECONDS:g} s for one another; lower max_attempts or "
        "timeout_seconds",
    )
    sources = ", ".join(data.sources) or "none"
    for name in data.max_epochs:
        _require(
            name in data.sources,
            f"data.max_epochs.{name}: is not in data.sources, which contains {sources}; correct the name",
        )
    for name, address in data.sources.items():
        _check_path(f"data.sources.{name}", address)
    for key_path, path in (
        ("run.root", f"{run.root}/{run.name}"),
        ("run.init_from", run.init_from),
        ("data.tokenizer", data.tokenizer),
    ):
        _check_path(key_path, path or "")
    # At stage 0 in bf16, DeepSpeed would add the gradients of the second micro-batch in bf16.
    _require(
        config.parallel.zero_stage != 0 or run.precision != "bf16",
        "parallel.zero_stage: 0 does not work with run.precision bf16, because DeepSpeed accumulates gradients in fp32 only "
        "from stage 1 on; set zero_stage to 1 or precision to fp32",
    )
    is_folder_name = "/" not in run.name and run.name[0] not in ".- " and run.name[-1] != " "
    _require(
        is_folder_name,
        f"run.name: {run.name!r} is not the name of a single folder; use a name without slashes, without spaces at "
        "its ends, and with another first character than a dot or dash",
    )


def check_world_size(config: sections.TrainConfig, world_size: int) -> None:
    """Raises: UserError if the model or a phase cannot be divided over `world_size` ranks."""
    tp_size, model = config.parallel.tp_size, config.model
    _require(
        world_size % tp_size == 0,
        f"parallel.tp_size: {tp_size} does not divide {world_size}, the number of ranks of this launch; start a multiple of "
        "tp_size ranks, or change tp_size",
    )
    dp_size = world_size // tp_size
    for name in ("num_heads", "num_kv_heads"):
        value = getattr(model, name)
        rule = f"is not divisible by parallel.tp_size {tp_size}; lower tp_size"
        _require(value % tp_size == 0, f"model.{name}: {value} {rule}")
    for index, phase in enumerate(config.schedule.phases):
        _require(
            phase.global_batch_size % (dp_size * phase.micro_batch_size) == 0,
            f"schedule.phases[{index}].global_batch_size: {phase.global_batch_size} is not divisible by the data-parallel size "
            f"{dp_size} ({world_size} ranks / tp_size {tp_size}) times micro_batch_size {phase.micro_batch_size}; change the "
            "number of ranks or micro_batch_size",
        )


def check_alibi_scaling(scaling: sections.AlibiScalingConfig, key_path: str) -> None:
    """Raises: UserError unless exactly one of the two numbers is set and is above 1. `key_path` names the section."""
    factor, train_seq_len = scaling.factor, scaling.train_seq_len
    _require(
        (factor is None) != (train_seq_len is None),
        f"{key_path}: factor is {factor} and train_seq_len is {train_seq_len}; set exactly one of them: factor to interpolate "
        "all rows, or train_seq_len to interpolate only rows longer than train_seq_len",
    )
    off = "none" if key_path.startswith("--") else "null"
    _require(
        factor is None or 1 < factor < math.inf,
        f"{key_path}.factor: {factor} is not a finite number above 1; use one that is, or set {key_path} to {off} for no "
        "interpolation",
    )
    _require(
        train_seq_len is None or train_seq_len > 1,
        f"{key_path}.train_seq_len: {train_seq_len} is not above 1; use the length of the rows that the model was trained on",
    )


def _check_model(model: sections.AnyModelConfig) -> None:
    _require(
        model.hidden_size % model.num_heads == 0,
        f"model.hidden_size: {model.hidden_size} is not divisible by model.num_heads {model.num_heads}; head_dim is "
        "hidden_size / num_heads and must be a whole number; use a multiple of num_heads",
    )
    sigmas = model.init_truncation_sigmas
    _require(
        sigmas == 0 or 0.1 <= sigmas < math.inf,
        f"model.init_truncation_sigmas: {sigmas} is neither 0 (no truncation) nor a finite number of at least 0.1; use 0, or "
        "0.1 or more, because values are redrawn until they are within the bound, which takes too long below 0.1",
    )
    if isinstance(model, sections.BTLMConfig):
        if model.alibi_scaling is not None:
            check_alibi_scaling(model.alibi_scaling, "model.alibi_scaling")
        return
    _require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_kv_heads: {model.num_kv_heads} does not divide model.num_heads {model.num_heads}; each key head serves the "
        "same number of query heads; use a divisor of num_heads",
    )
    factor, rotary_dim = model.partial_rotary_factor, model.partial_rotary_factor * model.head_dim
    _require(
        0 < factor <= 1 and rotary_dim % 2 == 0,
        f"model.partial_rotary_factor: {factor} of head_dim {model.head_dim} is {rotary_dim:g} rotary dimensions; choose a "
        "factor that gives an even whole number from 2 to head_dim",
    )


def _check_phase(config: sections.TrainConfig, key_path: str, phase: sections.PhaseConfig) -> None:
    tokens_per_step = phase.tokens_per_step
    _require(
        config.schedule.tokens_per_step in (None, tokens_per_step),
        f"{key_path}.global_batch_size: {phase.global_batch_size} rows of {phase.seq_len} tokens are {tokens_per_step} tokens, "
        f"but schedule.tokens_per_step is {config.schedule.tokens_per_step}; change global_batch_size, or set "
        "tokens_per_step to null",
    )
    nearest_tokens = max(1, round(phase.tokens / tokens_per_step)) * tokens_per_step
    _require(
        phase.tokens % tokens_per_step == 0,
        f"{key_path}.tokens: {phase.tokens} is not a multiple of global_batch_size * seq_len = {tokens_per_step}; a phase must "
        f"be a whole number of steps; the nearest multiple is {nearest_tokens}",
    )
    _require(
        phase.global_batch_size % phase.micro_batch_size == 0,
        f"{key_path}.micro_batch_size: {phase.micro_batch_size} does not divide global_batch_size {phase.global_batch_size}; "
        "choose a divisor",
    )
    sources = ", ".join(config.data.sources) or "none"
    for name, share in phase.mixture.items():
        _require(
            name in config.data.sources,
            f"{key_path}.mixture: {name!r} is not in data.sources, which contains {sources}; add it or correct the name",
        )
        _require(
            0 <= share <= 1,
            f"{key_path}.mixture.{name}: {share} is not between 0 and 1; use a fraction, or leave the source out to read "
            "nothing from it",
        )
    share_sum = sum(phase.mixture.values())
    _require(
        abs(share_sum - 1) <= 1e-6,
        f"{key_path}.mixture: the shares sum to {share_sum:g} but must sum to 1; for one source write {{name: 1.0}}",
    )
    evaluate = config.evaluate
    _require(
        not evaluate.every_steps or (evaluate.tokens >= 1 and evaluate.tokens % phase.seq_len == 0),
        f"evaluate.tokens: {evaluate.tokens} is not a positive multiple of {key_path}.seq_len {phase.seq_len}, but "
        "validation reads whole rows; use a multiple of every phase's seq_len",
    )


def _check_learning_rate(config: sections.TrainConfig) -> None:
    lr, total_steps = config.schedule.lr, sum(phase.num_steps for phase in config.schedule.phases)
    _require(
        0 <= lr.final <= lr.peak,
        f"schedule.lr.final: {lr.final} is not between 0 and peak {lr.peak}; use a number in that range",
    )
    _require(
        0 <= lr.warmup_steps < total_steps,
        f"schedule.lr.warmup_steps: {lr.warmup_steps} is out of range; use at least 0 and less than {total_steps}, the number "
        "of steps of the run",
    )
    if not isinstance(lr, sections.HybridLRConfig):
        return
    _require(
        0 < lr.switch_fraction < 0.5,
        f"schedule.lr.switch_fraction: {lr.switch_fraction} is out of range; use a value above 0 and below 0.5, because the "
        "schedule must switch while the cosine falls; Stable LM 2 uses 0.25",
    )
    _require(
        0 <= lr.offset_steps <= lr.warmup_steps,
        f"schedule.lr.offset_steps: {lr.offset_steps} is not between 0 and warmup_steps {lr.warmup_steps}; use a number in "
        "that range",
    )
    start_step = lr.cooldown_start_step
    _require(
        start_step is None or (lr.cooldown_steps >= 1 and start_step >= lr.warmup_steps),
        f"schedule.lr.cooldown_steps: {lr.cooldown_steps} with cooldown_start_step {start_step} is not valid, because a "
        "cooldown has at least 1 step and starts after the warm-up; use cooldown_steps of 1 or more and cooldown_start_step of "
        f"{lr.warmup_steps} or more, or set cooldown_start_step to null",
    )


def _check_path(key_path: str, path: str) -> None:
    """Raises: UserError if no file can have this path, or if the user's part of an address would not be recognized."""
    if "://" in path:
        is_encoded = re.search(r'[\s"<>]', path) is None or not path.startswith("http")
        rule = "an address over http has a space, a quote or an angle bracket; write it in percent-encoding, for example %20"
        _require(is_encoded, f"{key_path}: {rule}")
        return
    names = path.encode(errors="surrogateescape").split(b"/")
    rule = "is longer than any file system permits; use a shorter path"
    _require(len(path) < 4096 and max(map(len, names)) <= 255, f"{key_path}: {path[:60]}... {rule}")


def _require(condition: bool, message: str) -> None:
    """Raises: UserError with the message unless the condition holds. A comparison with nan never holds."""
    if not condition:
        raise sections.UserError(message)
