"""The only door to DeepSpeed: gradient accumulation, data-parallel reduction, clipping, ZeRO-1 and the update.

The number of micro-batches changes with the phase, so the accumulation boundary is told to DeepSpeed, never counted by it,
and losses arrive here already divided. `optimizer_fragments` shows what of which named tensor this rank's optimizer owns;
checkpoints are made of that and of nothing of DeepSpeed's own.
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
from tandem.trainer.distributed.mesh import Mesh

log = logging.getLogger(__name__)
MOMENT_NAMES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A run of one tp-local parameter's elements whose optimizer state lives on this rank; tensors are views into it."""

    name: str
    start: int
    """Offset in the flattened tp-local parameter."""
    master: Tensor
    """fp32 weights, one dim."""
    moments: dict[str, Tensor]
    """AdamW's two moments, fp32, one dim; empty before the first update."""


def deepspeed_config(config: TrainConfig, dp_size: int, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration for the run on a rank that holds `num_parameters`."""
    bf16 = config.run.precision == "bf16"
    # DeepSpeed allocates whole buckets, however small the model.
    bucket_elements = min(config.parallel.bucket_elements, num_parameters)
    return {
        # Rows per step vary with the phase; DeepSpeed's own batch arithmetic is kept trivially true and unused.
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
        # DeepSpeed 0.19's own clock waits for the device twice a micro-batch, and nothing here reads it.
        "timers": {"throughput": {"enabled": False}},
    }


@torch.no_grad()
def accumulate_fp32_grad(
    optimizer: BF16_Optimizer, weight: Tensor, group: int, index: int, clear_lp_grads: bool = False
) -> None:
    """The weight's bf16 gradient is added to the step's fp32 sum.

    In place of `BF16_Optimizer._update_hp_grad` of DeepSpeed 0.19.8, which first makes an fp32 copy of the gradient: the sum is
    the same, bit for bit, since every bf16 number is an fp32 number.
    """
    if weight.grad is None:
        return
    fp32_grad = optimizer.fp32_groups_gradients[group][index]
    fp32_grad.add_(weight.grad.view(fp32_grad.shape))
    weight._hp_grad = fp32_grad  # type: ignore[attr-defined]  # where DeepSpeed's `safe_get_full_grad` looks
    optimizer.fp32_groups_has_gradients[group][index] = True
    if clear_lp_grads:
        weight.grad.zero_()


def global_grad_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all tensor-parallel ranks' gradients together, on the device, given those that this rank is to count.

    In place of `get_global_norm_of_tensors` of DeepSpeed 0.19.8, the same bits: that one copies a number to the device, and
    waits until it is there.
    """
    squares = torch.stack([gradient.norm(2.0) for gradient in gradients]).pow(2.0).sum()
    torch.distributed.all_reduce(squares, group=mpu.get_model_parallel_group())
    return squares.pow(0.5)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """What a gradient of this norm is multiplied by, if it is below 1; 1 if `max_norm` is 0, which never clips.

    In fp32, to the bit as on the device in `clip_tensors_by_global_norm` of DeepSpeed 0.19.8.
    """
    if not max_norm:
        return 1.0
    return float(np.float32(max_norm) * (np.float32(1.0) / (np.float32(norm) + np.float32(1e-6))))


class Engine:
    """A model and its optimizer, trained together."""

    def __init__(self, config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
        if (accelerator := deepspeed.accelerator.get_accelerator().device_name()) != mesh.device.type:
            raise UserError(
                f"DS_ACCELERATOR: DeepSpeed would train on the {accelerator} and this rank's device is {mesh.device}; unset it"
            )
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed 0.19 compiles a shared-memory all-reduce for CPUs at start-up, which only its inference engine calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.model, self._optimizer, self._mesh = model, optimizer, mesh
        self.num_updates = 0
        """Made to the weights; a step whose update was left out is none."""
        self._wait_before_update: Callable[[], object] = lambda: None
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        # Its BF16 optimizer prints memory figures whatever the log level.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self._deepspeed_engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=deepspeed_config(config, mesh.dp_size, num_parameters),
                mpu=mpu, dist_init_required=False,
            )  # fmt: skip
        log.debug("deepspeed: %s", printed.getvalue())
        deepspeed_optimizer = self._deepspeed_engine.optimizer
        if isinstance(deepspeed_optimizer, BF16_Optimizer) and deepspeed_optimizer.immediate_grad_update:
            deepspeed_optimizer._update_hp_grad = partial(accumulate_fp32_grad, deepspeed_optimizer)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """The loss's gradient is added to the step's; with the `is_last` one it is averaged over data-parallel ranks.

        The step's losses must be divided by their number already.
        """
        self._deepspeed_engine.set_gradient_accumulation_boundary(is_last)
        self._deepspeed_engine.backward(loss, scale_wrt_gas=False)
        if not is_last:
            self._deepspeed_engine.step()

    def grad_norm(self) -> Tensor:
        """Of the gradient that is ready for the update, over all ranks and before clipping; nan if it is not finite.

        One fp32 number on the device. In bf16 nothing here waits for it; DeepSpeed's fp32 optimizer does, to compute it.
        """
        deepspeed_optimizer = self._deepspeed_engine.optimizer
        if not self._deepspeed_engine.zero_optimization():
            norm = self._unsharded_grad_norm()
        elif isinstance(deepspeed_optimizer, BF16_Optimizer):
            norm = global_grad_norm(deepspeed_optimizer.get_grads_for_norm()[0])
        else:
            norm = deepspeed_optimizer.scaled_global_norm()
        return norm.masked_fill(~((norm >= 0) & (norm < math.inf)), math.nan)

    def update(self, lr: float, grad_norm: float | None = None) -> None:
        """The weights have moved by one AdamW update at learning rate `lr`; the gradient is used up.

        `grad_norm` is the gradient's, if it is known already: then the update in bf16 does not wait for the device.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._wait_before_update()
        if isinstance(self._deepspeed_engine.optimizer, BF16_Optimizer):
            self._update_bf16(float(self.grad_norm()) if grad_norm is None else grad_norm)
        else:
            self._deepspeed_engine.step()
        self.num_updates += 1

    def zero_grad(self) -> None:
        """The gradient is forgotten; weights and optimizer state are as they were."""
        deepspeed_optimizer = self._deepspeed_engine.optimizer
        if not self._deepspeed_engine.zero_optimization():
            self._deepspeed_engine.zero_grad()
            return
        deepspeed_optimizer.zero_grad()
        if not isinstance(deepspeed_optimizer, BF16_Optimizer):  # what its own step does with a gradient that overflows
            deepspeed_optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
            deepspeed_optimizer._release_preflattened_grad_buffers()
            for group in deepspeed_optimizer.averaged_gradients:
                deepspeed_optimizer.averaged_gradients[group] = deepspeed_optimizer.all_grad_tensors[group] = None

    def block_updates_until(self, wait: Callable[[], object]) -> None:
        """Weights and optimizer state stay as they are until `wait` returns: whatever changes them calls it first."""
        self._wait_before_update = wait

    def __call__(self, *arguments: Tensor) -> Tensor:
        return self._deepspeed_engine(*arguments)

    def optimizer_fragments(self) -> Iterator[Fragment]:
        """This rank's share of the optimizer state, parameter by parameter; ranks that own nothing of one skip it."""
        for name, parameter in self.model.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                address = mapping.hp_fragment_address
                flat = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
                start, offset, numel = mapping.lp_fragment_address.start, address.start, address.numel
            elif not self._deepspeed_engine.zero_optimization():
                flat, start, offset, numel = parameter, 0, 0, parameter.numel()
            else:
                continue
            state = self._optimizer.state.get(flat, {})
            yield Fragment(
                name, start, flat.data.view(-1).narrow(0, offset, numel),
                {key: state[key].view(-1).narrow(0, offset, numel) for key in MOMENT_NAMES if key in state},
            )  # fmt: skip

    def allocate_moments(self, num_updates: int) -> None:
        """Both moments exist, as if so many updates had been made; `optimizer_fragments` shows them for filling."""
        self._wait_before_update()
        self.num_updates = num_updates
        for group in self._optimizer.param_groups:
            for flat in group["params"]:
                state = self._optimizer.state[flat]
                step = torch.tensor(float(num_updates), device=flat.device if group["fused"] else "cpu")
                state.update(
                    {
                        "step": step,
                        **{key: state[key] if key in state else torch.zeros_like(flat) for key in MOMENT_NAMES},
                    }
                )

    def has_full_optimizer_state(self) -> bool:
        """Whether every data-parallel rank holds all optimizer state, so that one of them is enough to save it."""
        return not self._deepspeed_engine.zero_optimization()

    @torch.no_grad()
    def _update_bf16(self, grad_norm: float) -> None:
        """What `BF16_Optimizer.step` of DeepSpeed 0.19.8 does to weights and state, bit for bit, with a norm that is known.

        DeepSpeed computes the norm again, waits for the device twice to look at it, clips what other ranks own as well, and
        clears the gradient twice. Its counters of steps stay where they are; nothing here reads them.
        """
        assert math.isfinite(grad_norm), "the guard lets no such gradient through"
        deepspeed_optimizer = self._deepspeed_engine.optimizer
        coefficient = clip_coefficient(grad_norm, deepspeed_optimizer.clip_grad)
        for master, gradient in zip(
            deepspeed_optimizer.fp32_groups_flat_partition,
            deepspeed_optimizer.fp32_groups_gradient_flat_partition,
            strict=True,
        ):
            if coefficient < 1:
                gradient.mul_(coefficient)
            master.grad = gradient
        deepspeed_optimizer.optimizer.step()
        deepspeed_optimizer._lazy_init_hp_params_optimizer_state()
        deepspeed_optimizer.update_lp_params()
        deepspeed_optimizer.zero_grad()

    def _unsharded_grad_norm(self) -> Tensor:
        squares = torch.zeros((), device=self._mesh.device)
        for parameter in self.model.parameters():
            if parameter.grad is not None and (
                sharding_of(parameter).sharded_dim is not None or self._mesh.tp_rank == 0
            ):
                squares += parameter.grad.float().norm() ** 2
        torch.distributed.all_reduce(squares, group=mpu.get_model_parallel_group())
        return squares.sqrt()
