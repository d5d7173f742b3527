"""DeepSpeed's part of a step: gradient accumulation, data-parallel reduction, clipping, ZeRO-1 and the update.

The number of micro-batches changes with the phase, so the engine sets DeepSpeed's accumulation boundary, and callers divide
the losses. `optimizer_fragments` lists the ranges of named tensors that this rank's optimizer owns; checkpoints store
these, and nothing in DeepSpeed's own format.
"""

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import Tensor, nn

from tandem.trainer.config import TrainConfig, UserError
from tandem.trainer.distributed import mpu
from tandem.trainer.distributed.layers import sharding_of
from tandem.trainer.distributed.lazy_compile import compile_at_first_call
from tandem.trainer.distributed.mesh import Mesh

with compile_at_first_call():
    import deepspeed.runtime.zero.muon.original_muon  # `deepspeed.initialize` would import it later

log = logging.getLogger(__name__)
MOMENT_NAMES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A range of one tp-local parameter whose optimizer state is on this rank. The tensors are views."""

    name: str
    start: int
    """Offset in the flattened tp-local parameter."""
    master: Tensor
    """Flat fp32 weights."""
    moments: dict[str, Tensor]
    """AdamW's two moments, flat, fp32; empty before the first update."""


def deepspeed_config(config: TrainConfig, dp_size: int, num_parameters: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a rank with `num_parameters`."""
    bf16 = config.run.precision == "bf16"
    # DeepSpeed allocates full buckets even for a small model.
    bucket_elements = min(config.parallel.bucket_elements, num_parameters)
    return {
        # Unused, because the batch size changes with the phase. DeepSpeed only checks that these three numbers are consistent.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": dp_size,
        "bf16": {"enabled": bf16, "immediate_grad_update": config.debug.immediate_gradients},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": config.optim.max_grad_norm,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "reduce_bucket_size": bucket_elements,
            "allgather_bucket_size": bucket_elements,
            "overlap_comm": False,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
        # DeepSpeed 0.19's timer waits for the device twice per micro-batch, and we do not use it.
        "timers": {"throughput": {"enabled": False}},
    }


@torch.no_grad()
def accumulate_fp32_grad(
    optimizer: BF16_Optimizer, weight: Tensor, group: int, index: int, clear_lp_grads: bool = False
) -> None:
    """Add the weight's bf16 gradient to the step's fp32 sum.

    Replaces `BF16_Optimizer._update_hp_grad` of DeepSpeed 0.19.8, which first copies the gradient to fp32. The bits are the
    same, because every bf16 number is an fp32 number.
    """
    if weight.grad is None:
        return
    fp32_grad = optimizer.fp32_groups_gradients[group][index]
    fp32_grad.add_(weight.grad.view(fp32_grad.shape))
    weight._hp_grad = fp32_grad  # type: ignore[attr-defined]  # DeepSpeed's `safe_get_full_grad` reads it
    optimizer.fp32_groups_has_gradients[group][index] = True
    if clear_lp_grads:
        weight.grad.zero_()


def global_grad_norm(gradients: list[Tensor]) -> Tensor:
    """Compute the norm over all tensor-parallel ranks, on the device. `gradients` are those that this rank must count.

    Replaces `get_global_norm_of_tensors` of DeepSpeed 0.19.8, with the same bits. That function copies a number to the
    device and waits for the copy.
    """
    squares = torch.stack([gradient.norm(2.0) for gradient in gradients]).pow(2.0).sum()
    torch.distributed.all_reduce(squares, group=mpu.get_model_parallel_group())
    return squares.pow(0.5)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Return the factor that clips a gradient of this norm. Apply it only if it is below 1. If `max_norm` is 0, return 1.

    Computed in fp32, with the same bits as `clip_tensors_by_global_norm` of DeepSpeed 0.19.8 on the device.
    """
    if not max_norm:
        return 1.0
    return float(np.float32(max_norm) * (np.float32(1.0) / (np.float32(norm) + np.float32(1e-6))))


class Engine:
    """A model with its optimizer."""

    def __init__(self, config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
        if (accelerator := deepspeed.accelerator.get_accelerator().device_name()) != mesh.device.type:
            problem = f"DeepSpeed would use {accelerator}, but this rank's device is {mesh.device}"
            raise UserError(f"DS_ACCELERATOR: {problem}; unset the variable")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed 0.19 would compile a shared-memory all-reduce for CPUs at the start, which only its inference engine uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.model, self._optimizer, self._mesh = model, optimizer, mesh
        self.num_updates = 0
        """Number of updates. Steps whose update was skipped do not count."""
        self.wait_before_update: Callable[[], object] = lambda: None
        """Called before every change to weights or optimizer state. A save waits here until the state is copied."""
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        # DeepSpeed's BF16 optimizer prints memory statistics at every log level.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self._deepspeed_engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=deepspeed_config(config, mesh.dp_size, num_parameters),
                mpu=mpu, dist_init_required=False,
            )  # fmt: skip
        log.debug("deepspeed: %s", printed.getvalue())
        self._zero_optimizer = zero_optimizer = self._deepspeed_engine.optimizer
        if isinstance(zero_optimizer, BF16_Optimizer) and zero_optimizer.immediate_grad_update:
            zero_optimizer._update_hp_grad = partial(accumulate_fp32_grad, zero_optimizer)
        self.has_full_optimizer_state = not self._deepspeed_engine.zero_optimization()
        """Whether every data-parallel rank has the full optimizer state, so that only one needs to save it."""

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the loss's gradient to the step's. If `is_last`, average the sum over data-parallel ranks.

        The caller must divide each loss by the number of losses in the step.
        """
        self._deepspeed_engine.set_gradient_accumulation_boundary(is_last)
        self._deepspeed_engine.backward(loss, scale_wrt_gas=False)
        if not is_last:
            self._deepspeed_engine.step()

    def grad_norm(self) -> Tensor:
        """Compute the norm of the step's gradient over all ranks, before clipping; nan if it is not finite.

        Returns one fp32 number on the device. In bf16 this does not wait for the device; DeepSpeed's fp32 optimizer does.
        """
        if self.has_full_optimizer_state:
            norm = self._unsharded_grad_norm()
        elif isinstance(self._zero_optimizer, BF16_Optimizer):
            norm = global_grad_norm(self._zero_optimizer.get_grads_for_norm()[0])
        else:
            norm = self._zero_optimizer.scaled_global_norm()
        return norm.masked_fill(~((norm >= 0) & (norm < math.inf)), math.nan)

    def update(self, lr: float, grad_norm: float | None = None) -> None:
        """Make one AdamW update at learning rate `lr` and clear the gradient.

        Pass `grad_norm` if it is known, so that an update in bf16 does not wait for the device.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.wait_before_update()
        if isinstance(self._zero_optimizer, BF16_Optimizer):
            self._update_bf16(float(self.grad_norm()) if grad_norm is None else grad_norm)
        else:
            self._deepspeed_engine.step()
        self.num_updates += 1

    def zero_grad(self) -> None:
        """Drop the gradient without an update."""
        if self.has_full_optimizer_state:
            self._deepspeed_engine.zero_grad()
            return
        optimizer = self._zero_optimizer
        optimizer.zero_grad()
        if not isinstance(optimizer, BF16_Optimizer):  # as DeepSpeed's step does if a gradient overflows
            optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
            optimizer._release_preflattened_grad_buffers()
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None

    def __call__(self, *arguments: Tensor) -> Tensor:
        return self._deepspeed_engine(*arguments)

    def optimizer_fragments(self) -> Iterator[Fragment]:
        """Iterate over this rank's share of the optimizer state, at most one fragment per parameter."""
        for name, parameter in self.model.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                address = mapping.hp_fragment_address
                flat = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
                start, offset, numel = mapping.lp_fragment_address.start, address.start, address.numel
            elif self.has_full_optimizer_state:
                flat, start, offset, numel = parameter, 0, 0, parameter.numel()
            else:
                continue
            state = self._optimizer.state.get(flat, {})
            yield Fragment(
                name, start, flat.data.view(-1).narrow(0, offset, numel),
                {key: state[key].view(-1).narrow(0, offset, numel) for key in MOMENT_NAMES if key in state},
            )  # fmt: skip

    def allocate_moments(self, num_updates: int) -> None:
        """Create both moments, as if `num_updates` updates were made, so that `optimizer_fragments` contains them."""
        self.wait_before_update()
        self.num_updates = num_updates
        for group in self._optimizer.param_groups:
            for flat in group["params"]:
                state = self._optimizer.state[flat]
                step = torch.tensor(float(num_updates), device=flat.device if group["fused"] else "cpu")
                moments = {key: state[key] if key in state else torch.zeros_like(flat) for key in MOMENT_NAMES}
                state.update({"step": step, **moments})

    @torch.no_grad()
    def _update_bf16(self, grad_norm: float) -> None:
        """Do what `BF16_Optimizer.step` of DeepSpeed 0.19.8 does, with the same bits, but with a known norm.

        DeepSpeed would compute the norm again, wait for the device twice, also clip gradients that other ranks own, and clear
        the gradient twice. This does not advance DeepSpeed's step counters, which nothing here uses.
        """
        assert math.isfinite(grad_norm), "the guard must not pass such a gradient"
        optimizer = self._zero_optimizer
        coefficient = clip_coefficient(grad_norm, optimizer.clip_grad)
        masters, gradients = optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradient_flat_partition
        for master, gradient in zip(masters, gradients, strict=True):
            if coefficient < 1:
                gradient.mul_(coefficient)
            master.grad = gradient
        optimizer.optimizer.step()
        optimizer._lazy_init_hp_params_optimizer_state()
        optimizer.update_lp_params()
        optimizer.zero_grad()

    def _unsharded_grad_norm(self) -> Tensor:
        squares = torch.zeros((), device=self._mesh.device)
        for parameter in self.model.parameters():  # each counts once in the sum over tensor-parallel ranks
            is_counted = sharding_of(parameter).sharded_dim is not None or self._mesh.tp_rank == 0
            if is_counted and parameter.grad is not None:
                squares += parameter.grad.float().norm() ** 2
        torch.distributed.all_reduce(squares, group=mpu.get_model_parallel_group())
        return squares.sqrt()
