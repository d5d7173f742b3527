"""Megatron-core's tensor-parallel layers, created without initial values. Every parameter gets three attributes:

* `sharding`: its position in the global tensor,
* `role`: the row of the table in `models.mup` that determines its initial values, learning rate and decay,
* `tensor_model_parallel`: DeepSpeed uses it to count each gradient once in the norm.

megatron-core 0.16.1 sets the last one only if it initializes weights. Without it, losses are right, but gradient norms are not.
"""

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tandem.kernels.layer_norm import layer_norm
from tandem.trainer.config.padding import padded_size
from tandem.trainer.distributed.megatron import ModelParallelConfig, parallel_state, tensor_parallel
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.sharding import TensorSharding


def annotate_parameter(parameter: nn.Parameter, sharding: TensorSharding, role: str) -> nn.Parameter:
    """Set the three attributes and return the parameter."""
    parameter.sharding, parameter.role = sharding, role  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = sharding.sharded_dim is not None  # type: ignore[attr-defined]
    return parameter


def sharding_of(parameter: Tensor) -> TensorSharding:
    return parameter.sharding  # type: ignore[attr-defined, no-any-return]  # set by `annotate_parameter`


def role_of(parameter: Tensor) -> str:
    return parameter.role  # type: ignore[attr-defined, no-any-return]  # set by `annotate_parameter`


class VocabParallel(tensor_parallel.VocabParallelEmbedding):
    """Token embedding, sharded over the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int, mesh: Mesh, dtype: torch.dtype) -> None:
        padded_vocab_size = padded_size(vocab_size, mesh.tp_size)
        super().__init__(padded_vocab_size, hidden_size, init_method=None, config=_megatron_config(mesh, dtype))
        annotate_parameter(self.weight, TensorSharding((vocab_size, hidden_size), 0, padded_vocab_size), "embedding")

    def forward(self, tokens: Int64[Tensor, "seq rows"]) -> Float[Tensor, "seq rows hidden_size"]:
        return super().forward(tokens)


class ColumnParallel(tensor_parallel.ColumnParallelLinear):
    """Linear layer with sharded outputs. Pass its input through `copy_to_tp` first; several layers then share one all-reduce.

    `sharding` is that of the weight, whose last dim is the inputs.
    """

    def __init__(
        self, sharding: TensorSharding, mesh: Mesh, dtype: torch.dtype, *, bias: bool, role: str = "hidden"
    ) -> None:
        *output_dims, num_inputs = sharding.global_shape
        num_outputs = sharding.padded_size * math.prod(output_dims[: sharding.sharded_dim])
        super().__init__(
            num_inputs, num_outputs, config=_megatron_config(mesh, dtype), init_method=None, bias=bias,
            disable_grad_reduce=True,
        )  # fmt: skip
        annotate_parameter(self.weight, sharding, role)
        if bias:
            annotate_parameter(self.bias, dataclasses.replace(sharding, global_shape=tuple(output_dims)), "bias")

    def forward(self, hidden_states: Float[Tensor, "seq rows hidden_size"]) -> Float[Tensor, "seq rows outputs_local"]:
        return super().forward(hidden_states)[0]


class RowParallel(tensor_parallel.RowParallelLinear):
    """Linear layer with sharded inputs. Returns this rank's *partial* sum; partial sums of several layers may be added before
    `reduce_from_tp`."""

    def __init__(
        self, global_shape: tuple[int, int], padded_size: int, mesh: Mesh, dtype: torch.dtype, *, bias: bool
    ) -> None:
        super().__init__(
            padded_size, global_shape[0], config=_megatron_config(mesh, dtype), init_method=None, bias=bias,
            input_is_parallel=True, skip_bias_add=True,
        )  # fmt: skip
        # This is the only switch in megatron-core 0.16 that leaves the reduction to the caller.
        self.explicit_expert_comm = True
        annotate_parameter(self.weight, TensorSharding(global_shape, 1, padded_size), "residual_output")
        if bias:
            annotate_parameter(self.bias, TensorSharding(global_shape[:1]), "bias")

    def forward(self, hidden_states: Float[Tensor, "seq rows inputs_local"]) -> Float[Tensor, "seq rows hidden_size"]:
        return super().forward(hidden_states)[0]


class LayerNorm(nn.Module):
    """LayerNorm over the last dim, replicated on every rank."""

    def __init__(self, hidden_size: int, eps: float, dtype: torch.dtype, *, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = replicated_parameter((hidden_size,), dtype, "norm")
        self.bias = replicated_parameter((hidden_size,), dtype, "bias") if bias else None

    def forward(self, hidden_states: Float[Tensor, "seq rows hidden_size"]) -> Float[Tensor, "seq rows hidden_size"]:
        return layer_norm(hidden_states, self.weight, self.bias, self.eps)


def replicated_parameter(shape: tuple[int, ...], dtype: torch.dtype, role: str) -> nn.Parameter:
    """Create a parameter that every rank holds completely."""
    return annotate_parameter(nn.Parameter(torch.empty(shape, dtype=dtype)), TensorSharding(shape), role)


def sharded_parameter(global_shape: tuple[int, ...], mesh: Mesh, dtype: torch.dtype, role: str) -> nn.Parameter:
    """Create a parameter whose first dim is sharded; tp_size must divide it."""
    assert global_shape[0] % mesh.tp_size == 0
    sharding = TensorSharding(global_shape, 0, global_shape[0])
    parameter = nn.Parameter(torch.empty(sharding.local_shape(mesh.tp_size), dtype=dtype))
    return annotate_parameter(parameter, sharding, role)


def copy_to_tp(hidden_states: Tensor) -> Tensor:
    """Return the same values; backward sums the gradient over tensor-parallel ranks, once for all layers that read it."""
    group = parallel_state.get_tensor_model_parallel_group()
    return hidden_states if group.size() == 1 else _CopyToTP.apply(hidden_states, group)


def reduce_from_tp(partial_sum: Tensor) -> Tensor:
    """Sum the partial sums of all ranks, in fp32 if there are several. A bf16 sum would round again at every rank.

    Source: `fp32_allreduce` in Stability-AI/StableLM `configs/stablelm-2-12b.yml`.
    """
    if parallel_state.get_tensor_model_parallel_group().size() == 1:
        return partial_sum
    return tensor_parallel.reduce_from_tensor_model_parallel_region(partial_sum.float())


class _CopyToTP(torch.autograd.Function):
    """megatron-core 0.16.1's `copy_to_tensor_model_parallel_region`, but with the sum in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        total = gradient.float().contiguous()
        # Copy a gradient that is fp32 already: other layers may use it.
        total = total.clone() if total is gradient else total
        torch.distributed.all_reduce(total, group=ctx.group)
        return total.to(gradient.dtype), None


def gather_from_tp(logits: Float[Tensor, "*batch vocab_local"]) -> Float[Tensor, "*batch vocab_padded"]:
    """Concatenate the columns of all ranks, without gradient."""
    # megatron-core 0.16.1's function allocates the result on the GPU, even if the logits are on the CPU.
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    torch.distributed.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def _megatron_config(mesh: Mesh, dtype: torch.dtype) -> ModelParallelConfig:
    # models.init sets initial values. The two flags also allow building layers on meta and without CUDA.
    no_init = {"perform_initialization": False, "use_cpu_initialization": True}
    return ModelParallelConfig(
        tensor_model_parallel_size=mesh.tp_size, params_dtype=dtype, deterministic_mode=True, **no_init
    )
