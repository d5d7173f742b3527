"""The only door to DeepSpeed: gradient accumulation, data-parallel reduction, clipping, ZeRO-1 and the update.

The number of micro-batches changes with the phase, so the accumulation boundary is told to DeepSpeed, never counted by it,
and losses arrive here already divided. `fragments` shows what of which named tensor this rank's optimizer owns; checkpoints
are made of that and of nothing of DeepSpeed's own.
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

from tandem.trainer.config import RunConfig, UserError
from tandem.trainer.distributed import mpu
from tandem.trainer.distributed.layers import shard_of
from tandem.trainer.distributed.mesh import Mesh

log = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")


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


def config_dict(config: RunConfig, dp_size: int, num_parameters: int) -> dict[str, Any]:
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
        "gradient_clipping": config.optim.clip_norm,
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
def add_gradient(inner: BF16_Optimizer, weight: Tensor, group: int, index: int, clear_lp_grads: bool = False) -> None:
    """The weight's bf16 gradient is added to the step's fp32 sum.

    In place of `BF16_Optimizer._update_hp_grad` of DeepSpeed 0.19.8, which first makes an fp32 copy of the gradient: the sum is
    the same, bit for bit, since every bf16 number is an fp32 number.
    """
    if weight.grad is None:
        return
    total = inner.fp32_groups_gradients[group][index]
    total.add_(weight.grad.view(total.shape))
    weight._hp_grad = total  # type: ignore[attr-defined]  # where DeepSpeed's `safe_get_full_grad` looks
    inner.fp32_groups_has_gradients[group][index] = True
    if clear_lp_grads:
        weight.grad.zero_()


def norm_over_ranks(gradients: list[Tensor]) -> Tensor:
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

    def __init__(self, config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
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
        self._wait: Callable[[], object] = lambda: None
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        # Its BF16 optimizer prints memory figures whatever the log level.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self._inner, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config_dict(config, mesh.dp_size, num_parameters),
                mpu=mpu, dist_init_required=False,
            )  # fmt: skip
        log.debug("deepspeed: %s", printed.getvalue())
        inner = self._inner.optimizer
        if isinstance(inner, BF16_Optimizer) and inner.immediate_grad_update:
            inner._update_hp_grad = partial(add_gradient, inner)

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """The loss's gradient is added to the step's; with the `last` one it is averaged over data-parallel ranks.

        The step's losses must be divided by their number already.
        """
        self._inner.set_gradient_accumulation_boundary(last)
        self._inner.backward(loss, scale_wrt_gas=False)
        if not last:
            self._inner.step()

    def gradient_norm(self) -> Tensor:
        """Of the gradient that is ready for the update, over all ranks and before clipping; nan if it is not finite.

        One fp32 number on the device. In bf16 nothing here waits for it; DeepSpeed's fp32 optimizer does, to compute it.
        """
        inner = self._inner.optimizer
        if not self._inner.zero_optimization():
            norm = self._plain_gradient_norm()
        elif isinstance(inner, BF16_Optimizer):
            norm = norm_over_ranks(inner.get_grads_for_norm()[0])
        else:
            norm = inner.scaled_global_norm()
        return norm.masked_fill(~((norm >= 0) & (norm < math.inf)), math.nan)

    def update(self, lr: float, norm: float | None = None) -> None:
        """The weights have moved by one AdamW update at learning rate `lr`; the gradient is used up.

        `norm` is the gradient's, if it is known already: then the update in bf16 does not wait for the device.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._wait()
        if isinstance(self._inner.optimizer, BF16_Optimizer):
            self._update_bf16(float(self.gradient_norm()) if norm is None else norm)
        else:
            self._inner.step()
        self.num_updates += 1

    def drop_gradient(self) -> None:
        """The gradient is forgotten; weights and optimizer state are as they were."""
        inner = self._inner.optimizer
        if not self._inner.zero_optimization():
            self._inner.zero_grad()
            return
        inner.zero_grad()
        if not isinstance(inner, BF16_Optimizer):  # what its own step does with a gradient that overflows
            inner.micro_step_id = INITIAL_MICRO_STEP_ID
            inner._release_preflattened_grad_buffers()
            for group in inner.averaged_gradients:
                inner.averaged_gradients[group] = inner.all_grad_tensors[group] = None

    def hold(self, wait: Callable[[], object]) -> None:
        """Weights and optimizer state stay as they are until `wait` returns: whatever changes them calls it first."""
        self._wait = wait

    def __call__(self, *arguments: Tensor) -> Tensor:
        return self._inner(*arguments)

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of the optimizer state, parameter by parameter; ranks that own nothing of one skip it."""
        for name, parameter in self.model.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                address = mapping.hp_fragment_address
                flat = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
                start, offset, numel = mapping.lp_fragment_address.start, address.start, address.numel
            elif not self._inner.zero_optimization():
                flat, start, offset, numel = parameter, 0, 0, parameter.numel()
            else:
                continue
            state = self._optimizer.state.get(flat, {})
            yield Fragment(
                name, start, flat.data.view(-1).narrow(0, offset, numel),
                {key: state[key].view(-1).narrow(0, offset, numel) for key in MOMENTS if key in state},
            )  # fmt: skip

    def allocate_moments(self, num_updates: int) -> None:
        """Both moments exist, as if so many updates had been made; `fragments` shows them for filling."""
        self._wait()
        self.num_updates = num_updates
        for group in self._optimizer.param_groups:
            for flat in group["params"]:
                state = self._optimizer.state[flat]
                step = torch.tensor(float(num_updates), device=flat.device if group["fused"] else "cpu")
                state.update(
                    {"step": step, **{key: state[key] if key in state else torch.zeros_like(flat) for key in MOMENTS}}
                )

    def owns_whole_replica(self) -> bool:
        """Whether every data-parallel rank holds all optimizer state, so that one of them is enough to save it."""
        return not self._inner.zero_optimization()

    @torch.no_grad()
    def _update_bf16(self, norm: float) -> None:
        """What `BF16_Optimizer.step` of DeepSpeed 0.19.8 does to weights and state, bit for bit, with a norm that is known.

        DeepSpeed computes the norm again, waits for the device twice to look at it, clips what other ranks own as well, and
        clears the gradient twice. Its counters of steps stay where they are; nothing here reads them.
        """
        assert math.isfinite(norm), "the guard lets no such gradient through"
        inner = self._inner.optimizer
        clipping = clip_coefficient(norm, inner.clip_grad)
        for master, gradient in zip(
            inner.fp32_groups_flat_partition, inner.fp32_groups_gradient_flat_partition, strict=True
        ):
            if clipping < 1:
                gradient.mul_(clipping)
            master.grad = gradient
        inner.optimizer.step()
        inner._lazy_init_hp_params_optimizer_state()
        inner.update_lp_params()
        inner.zero_grad()

    def _plain_gradient_norm(self) -> Tensor:
        squares = torch.zeros((), device=self._mesh.device)
        for parameter in self.model.parameters():
            if parameter.grad is not None and (shard_of(parameter).dim is not None or self._mesh.tp_rank == 0):
                squares += parameter.grad.float().norm() ** 2
        torch.distributed.all_reduce(squares, group=mpu.get_model_parallel_group())
        return squares.sqrt()
