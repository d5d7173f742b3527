"""Run the steps of a plan and build its JSON line.

The timed steps run undisturbed, under the training loop's own clock; instrumented steps follow. Speed and MFU are those of the
median timed step. Only the fields in `derived` are extrapolated.
"""

import logging
import platform
import resource
from collections.abc import Iterable, Iterator
from dataclasses import replace
from statistics import median, quantiles
from typing import Any

import torch

from tandem.trainer.config import PhaseConfig, flops
from tandem.trainer.config.numbers import format_count
from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.coordination import Coordinator
from tandem.trainer.distributed.mesh import Mesh, all_gather_values
from tandem.trainer.metrics.records import StepRecord
from tandem.trainer.run_folder import describe_environment
from tandem.trainer.run_state import StepContext, step_throughput
from tandem.trainer.tools.bench.part_timing import run_instrumented_step
from tandem.trainer.tools.bench.plan import NUM_INSTRUMENTED_STEPS, PhasePlan
from tandem.trainer.tools.bench.step_profile import profile_step
from tandem.trainer.tools.bench.synthetic_batch import draw_batch
from tandem.trainer.train import timed_train_step

log = logging.getLogger(__name__)


Fields = dict[str, Any]
"""A part of the JSON line."""


def measure_phase(context: StepContext, plan: PhasePlan, matmul_flops: float, coordinator: Coordinator) -> Fields:
    """Run the plan's steps and return its JSON line."""
    config, mesh, phase = context.config, context.mesh, plan.span.phase
    steps = range(plan.span.first_step, plan.span.first_step + plan.num_steps)
    # Drawn before the clock starts, because a real run prefetches its batches in the background.
    batches = stop_on_signal([draw_batch(config, phase, step, mesh) for step in steps], coordinator)
    numbers = iter(steps)
    reset_peak_memory(mesh)
    log.info(
        f"{config.run.name}, {config.model.num_layers} of {plan.recipe_num_layers} layers, "
        f"{format_count(flops.num_parameters(config.model))} parameters, phase {phase.name}: {phase.global_batch_size} rows "
        f"of {phase.seq_len} tokens a step, tp {mesh.tp_size} x dp {mesh.dp_size} on {device_name(mesh)}"
    )
    for _ in range(plan.num_warmup_steps):
        run_step(context, batches, next(numbers), "warm-up")
    records = [run_step(context, batches, next(numbers), "timed") for _ in range(plan.num_timed_steps)]
    memory = peak_memory(mesh)
    instrumented_steps = [run_instrumented_step(context, batches, next(numbers)) for _ in range(NUM_INSTRUMENTED_STEPS)]
    kinds = None
    if plan.trace_path is not None:
        kinds = profile_step(lambda: timed_train_step(context, batches, next(numbers)), plan.trace_path, mesh)
    instrumented_seconds, part_seconds = sorted(instrumented_steps, key=lambda one: one[0])[NUM_INSTRUMENTED_STEPS // 2]
    step_seconds, environment = [record.step_seconds for record in records], describe_environment()
    return {
        **config_fields(context, plan),
        **throughput_fields(context, phase, step_seconds, matmul_flops),
        **memory,
        "part_seconds": part_seconds, "num_instrumented_steps": NUM_INSTRUMENTED_STEPS,
        "instrumented_step_seconds": instrumented_seconds, "kind_seconds": kinds,
        "derived": full_batch_fields(context, plan, median(step_seconds), part_seconds),
        "first_loss": records[0].loss, "last_loss": records[-1].loss, "device": device_name(mesh),
        **{name: environment["packages"][name] for name in ("torch", "triton", "deepspeed")},
        "commit": environment["commit"], "uncommitted": bool(environment["uncommitted"]),
    }  # fmt: skip


def stop_on_signal(batches: Iterable[Batch], coordinator: Coordinator) -> Iterator[Batch]:
    """Yield the batches until any rank receives a stop signal."""
    for batch in batches:
        coordinator.any_rank(False)
        yield batch


def run_step(context: StepContext, batches: Iterator[Batch], step: int, label: str) -> StepRecord:
    """Run update number `step`, log it and return its record."""
    result = timed_train_step(context, batches, step)
    assert result, "synthetic rows do not end"
    record = result.record
    log.info(
        f"{record.phase}, {label} step {record.step}: loss {record.loss:.4f}, {record.step_seconds:.3f} s, "
        f"{format_count(record.tokens_per_second)} tokens/s, mfu {100 * record.mfu:.1f}%"
    )
    return record


def config_fields(context: StepContext, plan: PhasePlan) -> Fields:
    """Describe the model, the rows, the layout and the steps."""
    config, mesh, phase = context.config, context.mesh, plan.span.phase
    model, micro_batches = config.model, mesh.dp_size * phase.micro_batch_size
    return {
        "config": config.run.name, "overrides": plan.overrides, "family": model.family,
        "num_layers": model.num_layers, "recipe_num_layers": plan.recipe_num_layers,
        "num_parameters": flops.num_parameters(model),
        "phase": phase.name, "seq_len": phase.seq_len, "global_batch_size": phase.global_batch_size,
        "micro_batch_size": phase.micro_batch_size, "num_micro_batches": phase.global_batch_size // micro_batches,
        "document_masking": model.document_masking,
        "tp_size": mesh.tp_size, "dp_size": mesh.dp_size, "zero_stage": config.parallel.zero_stage,
        "precision": config.run.precision, "recompute": config.parallel.recompute,
        "deterministic": config.debug.deterministic, "immediate_gradients": config.debug.immediate_gradients,
        "num_warmup_steps": plan.num_warmup_steps, "num_timed_steps": plan.num_timed_steps,
    }  # fmt: skip


def throughput_fields(context: StepContext, phase: PhaseConfig, seconds: list[float], matmul_flops: float) -> Fields:
    """Return the throughput of all devices together, or of one device if a name ends in `_per_device`.

    Percentiles are over the timed steps.
    """
    p20_seconds, _, _, p80_seconds = quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 4
    speed, hardware = step_throughput(context, phase, median(seconds)), context.config.hardware
    flops_per_second, causal_flops_per_second = speed.mfu * context.peak_flops, speed.mfu_causal * context.peak_flops
    return {
        "tokens_per_step": phase.tokens_per_step,
        "step_seconds": median(seconds), "step_seconds_p20": p20_seconds, "step_seconds_p80": p80_seconds,
        "tokens_per_second": speed.tokens_per_second,
        "tokens_per_second_p20": phase.tokens_per_step / p80_seconds,
        "tokens_per_second_p80": phase.tokens_per_step / p20_seconds,
        "tokens_per_second_per_device": speed.tokens_per_second / context.mesh.world_size,
        "model_tflops_per_second_per_device": flops_per_second / 1e12,
        "causal_model_tflops_per_second_per_device": causal_flops_per_second / 1e12,
        "hardware": hardware.name if hardware else None, "peak_flops": context.peak_flops,
        "mfu": speed.mfu, "mfu_causal": speed.mfu_causal,
        "matmul_flops": matmul_flops,
        "share_of_matmul": flops_per_second / matmul_flops,
        "share_of_matmul_causal": causal_flops_per_second / matmul_flops,
    }  # fmt: skip


def full_batch_fields(context: StepContext, plan: PhasePlan, step_seconds: float, parts: dict[str, float]) -> Fields:
    """Extrapolate a step to the recipe's global batch on these ranks.

    The time to accumulate gradients grows with the number of rows. The time of the update, which is that of the instrumented
    step, does not.
    """
    phase, full_rows = plan.span.phase, plan.recipe_global_batch_size
    update_seconds = parts["update"] + parts["other"]
    accumulation_seconds = step_seconds - update_seconds
    seconds = full_rows / phase.global_batch_size * accumulation_seconds + update_seconds
    speed = step_throughput(context, replace(phase, global_batch_size=full_rows), seconds)
    return {
        "full_global_batch_size": full_rows,
        "accumulation_seconds": accumulation_seconds, "update_seconds": update_seconds,
        "step_seconds_at_full_batch": seconds, "tokens_per_second_at_full_batch": speed.tokens_per_second,
        "mfu_at_full_batch": speed.mfu, "mfu_causal_at_full_batch": speed.mfu_causal,
    }  # fmt: skip


def reset_peak_memory(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(mesh.device)


def peak_memory(mesh: Mesh) -> dict[str, float | None]:
    """Return the largest peak of all ranks: on a GPU since `reset_peak_memory`, on a CPU since the start of the process."""
    if mesh.device.type == "cuda":
        local_bytes = [torch.cuda.max_memory_allocated(mesh.device), torch.cuda.max_memory_reserved(mesh.device)]
        allocated, reserved = (max(column) / 2**30 for column in zip(*all_gather_values(local_bytes), strict=True))
        return {"peak_allocated_gib": allocated, "peak_reserved_gib": reserved, "peak_resident_gib": None}
    kib = max(all_gather_values(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    return {"peak_allocated_gib": None, "peak_reserved_gib": None, "peak_resident_gib": kib / 2**20}


def device_name(mesh: Mesh) -> str:
    return torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else f"{platform.machine()} CPU"
