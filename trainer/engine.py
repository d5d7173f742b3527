"""The only door to DeepSpeed: gradient accumulation, data-parallel reduction, clipping, ZeRO-1 and the update.

The number of micro-batches changes with the phase, so the accumulation boundary is told to DeepSpeed, never counted by it,
and losses arrive here already divided. `fragments` shows what of which named tensor this rank's optimizer owns; checkpoints
are made of that and of nothing of DeepSpeed's own.
"""

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from trainer.config import RunConfig
from trainer.parallel import mpu
from trainer.parallel.layers import shard_of
from trainer.parallel.mesh import Mesh

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
        "bf16": {"enabled": bf16},
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
    }


class Engine:
    """A model and its optimizer, trained together."""

    def __init__(self, config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed 0.19 compiles a shared-memory all-reduce for CPUs at start-up, which only its inference engine calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.model, self._optimizer, self._mesh = model, optimizer, mesh
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        # Its BF16 optimizer prints memory figures whatever the log level.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self._inner, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config_dict(config, mesh.dp_size, num_parameters),
                mpu=mpu, dist_init_required=False,
            )  # fmt: skip
        log.debug("deepspeed: %s", printed.getvalue())

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """The loss's gradient is added to the step's; with the `last` one it is averaged over data-parallel ranks.

        The step's losses must be divided by their number already.
        """
        self._inner.set_gradient_accumulation_boundary(last)
        self._inner.backward(loss, scale_wrt_gas=False)
        if not last:
            self._inner.step()

    def update(self, lr: float) -> float:
        """The weights have moved by one AdamW update at learning rate `lr`; returns the gradient norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        norm = None if self._inner.zero_optimization() else self._plain_gradient_norm()
        self._inner.step()
        return float(self._inner.get_global_grad_norm() if norm is None else norm)

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

    def allocate_moments(self, step: int) -> None:
        """Both moments exist, zero, as if `step` updates had been made; `fragments` shows them for filling."""
        for group in self._optimizer.param_groups:
            for flat in group["params"]:
                self._optimizer.state[flat] = {
                    "step": torch.tensor(float(step), device=flat.device if group["fused"] else "cpu"),
                    **{key: torch.zeros_like(flat) for key in MOMENTS},
                }

    def owns_whole_replica(self) -> bool:
        """Whether every data-parallel rank holds all optimizer state, so that one of them is enough to save it."""
        return not self._inner.zero_optimization()

    def _plain_gradient_norm(self) -> Tensor:
        squares = torch.zeros((), device=self._mesh.device)
        for parameter in self.model.parameters():
            if parameter.grad is not None and (shard_of(parameter).dim is not None or self._mesh.tp_rank == 0):
                squares += parameter.grad.float().norm() ** 2
        torch.distributed.all_reduce(squares, group=mpu.get_model_parallel_group())
        return squares.sqrt()
