"""The steps of a plan, made one after the other, and the figures of one JSON line.

Whole steps are timed first, undisturbed, with the clock of the training loop; then come a few instrumented ones. The figures of
a step are the median's of the timed ones. Nothing is extrapolated but what stands under `derived`.
"""

import logging
import platform
import resource
from collections.abc import Iterable, Iterator
from dataclasses import replace
from statistics import median, quantiles
from typing import Any

import torch

from tandem.trainer.config import Phase, flops
from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.coordination import Agreement
from tandem.trainer.distributed.mesh import Mesh, gather_to_all
from tandem.trainer.metrics.console import short
from tandem.trainer.metrics.records import StepRecord
from tandem.trainer.metrics.throughput import Throughput, throughput
from tandem.trainer.run_folder import environment
from tandem.trainer.run_state import Stepper
from tandem.trainer.tools.bench.part_timing import instrumented
from tandem.trainer.tools.bench.plan import INSTRUMENTED_STEPS, Plan
from tandem.trainer.tools.bench.step_profile import profiled
from tandem.trainer.tools.bench.synthetic_batch import drawn
from tandem.trainer.train import timed_step

log = logging.getLogger(__name__)


def measure(stepper: Stepper, plan: Plan, matmul_flops: float, agreement: Agreement) -> dict[str, Any]:
    """The plan's steps are made; returns their line."""
    phase, first = plan.span.phase, plan.span.first_step
    steps = range(first, first + plan.total_steps)
    # Drawn before the clock starts: a run reads ahead in the background.
    batches = unless_stopped([drawn(stepper.config, phase, step, stepper.mesh) for step in steps], agreement)
    numbers = iter(steps)
    forget_memory(stepper.mesh)
    say_what(stepper, plan)
    for _ in range(plan.warmup_steps):
        made(stepper, batches, next(numbers), "warm-up")
    records = [made(stepper, batches, next(numbers), "timed") for _ in range(plan.timed_steps)]
    memory = peak_memory(stepper.mesh)
    watched = [instrumented(stepper, batches, next(numbers)) for _ in range(INSTRUMENTED_STEPS)]
    kinds = None
    if plan.profile is not None:
        kinds = profiled(lambda: timed_step(stepper, batches, next(numbers)), plan.profile, stepper.mesh)
    watched_seconds, parts = sorted(watched, key=lambda one: one[0])[INSTRUMENTED_STEPS // 2]
    return {
        **setting(stepper, plan),
        **speed(stepper, phase, records, matmul_flops),
        **memory,
        "part_seconds": parts,
        "instrumented_steps": INSTRUMENTED_STEPS,
        "instrumented_step_seconds": watched_seconds,
        "kind_seconds": kinds,
        "derived": at_full_batch(stepper, plan, records, parts),
        "first_loss": records[0].loss,
        "last_loss": records[-1].loss,
        **machine(stepper.mesh),
    }


def unless_stopped(batches: Iterable[Batch], agreement: Agreement) -> Iterator[Batch]:
    """The batches, until a rank is told to stop."""
    for batch in batches:
        agreement.any_rank(False)
        yield batch


def made(stepper: Stepper, batches: Iterator[Batch], step: int, kind: str) -> StepRecord:
    """The record of update number `step`, which is shown."""
    done = timed_step(stepper, batches, step)
    assert done, "synthetic rows do not end"
    record = done.record
    log.info(
        "%s, %s step %d: loss %.4f, %.3f s, %s tokens/s, mfu %.1f%%",
        record.phase, kind, record.step, record.loss, record.step_seconds, short(record.tokens_per_second), 100 * record.mfu,
    )  # fmt: skip
    return record


def say_what(stepper: Stepper, plan: Plan) -> None:
    mesh, phase, model = stepper.mesh, plan.span.phase, stepper.config.model
    log.info(
        "%s, %d of %d layers, %s parameters, phase %s: %d rows of %d tokens a step, tp %d x dp %d on %s",
        stepper.config.run.name, model.depth, plan.recipe_depth, short(flops.parameters(model)), phase.name, phase.rows,
        phase.seq_len, mesh.tp_size, mesh.dp_size, device_name(mesh),
    )  # fmt: skip


def setting(stepper: Stepper, plan: Plan) -> dict[str, Any]:
    """What was trained, and how."""
    config, mesh, phase = stepper.config, stepper.mesh, plan.span.phase
    return {
        "config": config.run.name,
        "overrides": plan.overrides,
        "family": config.model.family,
        "depth": config.model.depth,
        "recipe_depth": plan.recipe_depth,
        "parameters": flops.parameters(config.model),
        "phase": phase.name,
        "seq_len": phase.seq_len,
        "rows": phase.rows,
        "micro_rows": phase.micro_rows,
        "micro_batches": phase.rows // (mesh.dp_size * phase.micro_rows),
        "document_masking": config.model.document_masking,
        "tp_size": mesh.tp_size,
        "dp_size": mesh.dp_size,
        "zero_stage": config.parallel.zero_stage,
        "precision": config.run.precision,
        "recompute": config.parallel.recompute,
        "deterministic": config.debug.deterministic,
        "immediate_gradients": config.debug.immediate_gradients,
        "warmup_steps": plan.warmup_steps,
        "steps": plan.timed_steps,
    }


def speed(stepper: Stepper, phase: Phase, records: list[StepRecord], matmul_flops: float) -> dict[str, Any]:
    """Of all devices together where the name does not say otherwise; percentiles over the timed steps."""
    seconds = [record.step_seconds for record in records]
    low, _, _, high = quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 4
    middle = median(seconds)
    devices = stepper.mesh.world_size
    peak = rate(stepper, phase, middle, stepper.peak_flops)
    matmul = rate(stepper, phase, middle, matmul_flops)
    hardware = stepper.config.hardware
    return {
        "step_tokens": phase.batch_tokens,
        "step_seconds": middle,
        "step_seconds_p20": low,
        "step_seconds_p80": high,
        "tokens_per_second": peak.tokens_per_second,
        "tokens_per_second_p20": phase.batch_tokens / high,
        "tokens_per_second_p80": phase.batch_tokens / low,
        "tokens_per_second_per_device": peak.tokens_per_second / devices,
        "model_tflops_per_second_per_device": peak.mfu * stepper.peak_flops / 1e12,
        "causal_model_tflops_per_second_per_device": peak.mfu_causal * stepper.peak_flops / 1e12,
        "hardware": hardware.name if hardware else None,
        "peak_flops": stepper.peak_flops,
        "mfu": peak.mfu,
        "mfu_causal": peak.mfu_causal,
        "matmul_flops": matmul_flops,
        "share_of_matmul": matmul.mfu,
        "share_of_matmul_causal": matmul.mfu_causal,
    }


def rate(stepper: Stepper, phase: Phase, step_seconds: float, peak_flops: float) -> Throughput:
    """Throughput of a step of the phase that takes so long, counted as the training loop counts it."""
    model = stepper.config.model
    return throughput(
        phase.batch_tokens, step_seconds,
        flops_per_token=flops.flops_per_token(model, phase.seq_len, causal=False),
        causal_flops_per_token=flops.flops_per_token(model, phase.seq_len, causal=True),
        devices=stepper.mesh.world_size, peak_flops=peak_flops,
    )  # fmt: skip


def at_full_batch(stepper: Stepper, plan: Plan, records: list[StepRecord], parts: dict[str, float]) -> dict[str, Any]:
    """What a step of the recipe's own rows would take on these ranks: computed, not measured.

    Accumulation grows with the rows, the update does not; its share is that of the instrumented step.
    """
    phase = plan.span.phase
    whole = replace(phase, rows=plan.recipe_rows)
    step_seconds = median([record.step_seconds for record in records])
    update_seconds = parts["update"] + parts["other"]
    accumulation_seconds = step_seconds - update_seconds
    seconds = plan.recipe_rows / phase.rows * accumulation_seconds + update_seconds
    found = rate(stepper, whole, seconds, stepper.peak_flops)
    return {
        "rows_at_full_batch": plan.recipe_rows,
        "accumulation_seconds": accumulation_seconds,
        "update_seconds": update_seconds,
        "step_seconds_at_full_batch": seconds,
        "tokens_per_second_at_full_batch": found.tokens_per_second,
        "mfu_at_full_batch": found.mfu,
        "mfu_causal_at_full_batch": found.mfu_causal,
    }


def forget_memory(mesh: Mesh) -> None:
    """The next peaks are of what comes."""
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(mesh.device)


def peak_memory(mesh: Mesh) -> dict[str, float | None]:
    """Largest of any rank: on a device since `forget_memory`, on a CPU since the process began."""
    if mesh.device.type == "cuda":
        mine = [torch.cuda.max_memory_allocated(mesh.device), torch.cuda.max_memory_reserved(mesh.device)]
        allocated, reserved = (max(column) / 2**30 for column in zip(*gather_to_all(mine), strict=True))
        return {"peak_allocated_gib": allocated, "peak_reserved_gib": reserved, "peak_resident_gib": None}
    kib = max(gather_to_all(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    return {"peak_allocated_gib": None, "peak_reserved_gib": None, "peak_resident_gib": kib / 2**20}


def machine(mesh: Mesh) -> dict[str, Any]:
    """What it ran on, and which code."""
    found = environment()
    packages = {name: found["packages"][name] for name in ("torch", "triton", "deepspeed")}
    return {
        "device": device_name(mesh),
        **packages,
        "commit": found["commit"],
        "uncommitted": bool(found["uncommitted"]),
    }


def device_name(mesh: Mesh) -> str:
    return torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else f"{platform.machine()} CPU"
