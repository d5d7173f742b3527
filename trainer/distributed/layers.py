"""Megatron-core's tensor-parallel layers, built without initial values and marked so that everyone else can trust the marks.

Every parameter leaves here with three attributes: `shard` (where it lies in the global tensor), `role` (the row of the table
in `models.mup` that gives its initial values, learning rate and decay) and `tensor_model_parallel` (which DeepSpeed reads to
count a gradient once). megatron-core 0.16.1 leaves the last unset when it does not initialise: losses stay right while
gradient norms become wrong, so it is set here, in one place.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from megatron.core import ModelParallelConfig
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from tandem.kernels.layer_norm import layer_norm
from tandem.trainer.config.flops import padded
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.sharding import Shard


def mark(parameter: nn.Parameter, shard: Shard, role: str) -> nn.Parameter:
    """The parameter knows its place in the global tensor and its role."""
    parameter.shard, parameter.role = shard, role  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = shard.dim is not None  # type: ignore[attr-defined]
    return parameter


def shard_of(parameter: Tensor) -> Shard:
    """Where the parameter lies in the global tensor."""
    return parameter.shard  # type: ignore[attr-defined, no-any-return]  # set by `mark`


def role_of(parameter: Tensor) -> str:
    """The row of the table in `models.mup` that the parameter follows."""
    return parameter.role  # type: ignore[attr-defined, no-any-return]  # set by `mark`


class Embedding(VocabParallelEmbedding):
    """Token embedding with the vocabulary divided over ranks."""

    def __init__(self, vocab: int, width: int, mesh: Mesh, dtype: torch.dtype) -> None:
        size = padded(vocab, mesh.tp_size)
        super().__init__(size, width, init_method=_no_initial_values, config=_megatron(mesh, dtype))
        mark(self.weight, Shard((vocab, width), 0, size), "embedding")

    def forward(self, tokens: Int64[Tensor, "seq rows"]) -> Float[Tensor, "seq rows width"]:
        return super().forward(tokens)


class Column(ColumnParallelLinear):
    """Linear layer whose outputs are divided; its input must have passed `to_columns`, so that several share one all-reduce.

    `shape` is the true global shape of the weight, inputs last; `dim` the one that is divided, `size` its padded size.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dim: int,
        size: int,
        mesh: Mesh,
        dtype: torch.dtype,
        *,
        bias: bool,
        role: str = "hidden",
    ) -> None:
        outputs = size
        for axis in shape[:dim]:
            outputs *= axis
        super().__init__(
            shape[-1], outputs, config=_megatron(mesh, dtype), init_method=_no_initial_values, bias=bias,
            disable_grad_reduce=True,
        )  # fmt: skip
        mark(self.weight, Shard(shape, dim, size), role)
        if bias:
            mark(self.bias, Shard(shape[:-1], dim, size), "bias")

    def forward(self, stream: Float[Tensor, "seq rows width"]) -> Float[Tensor, "seq rows outputs_local"]:
        return super().forward(stream)[0]


class Row(RowParallelLinear):
    """Linear layer whose inputs are divided; returns this rank's *partial* sum, to be added to others before `from_rows`."""

    def __init__(self, shape: tuple[int, int], size: int, mesh: Mesh, dtype: torch.dtype, *, bias: bool) -> None:
        super().__init__(
            size, shape[0], config=_megatron(mesh, dtype), init_method=_no_initial_values, bias=bias,
            input_is_parallel=True, skip_bias_add=True,
        )  # fmt: skip
        # megatron-core's own switch for "the caller reduces"; it has no other name for it in 0.16.
        self.explicit_expert_comm = True
        mark(self.weight, Shard(shape, 1, size), "residual_output")
        if bias:
            mark(self.bias, Shard(shape[:1]), "bias")

    def forward(self, stream: Float[Tensor, "seq rows inputs_local"]) -> Float[Tensor, "seq rows width"]:
        return super().forward(stream)[0]


class LayerNorm(nn.Module):
    """LayerNorm over the last dim; replicated on every rank."""

    def __init__(self, width: int, epsilon: float, dtype: torch.dtype, *, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = replicated((width,), dtype, "norm")
        self.bias = replicated((width,), dtype, "bias") if bias else None

    def forward(self, stream: Float[Tensor, "seq rows width"]) -> Float[Tensor, "seq rows width"]:
        return layer_norm(stream, self.weight, self.bias, self.epsilon)


def replicated(shape: tuple[int, ...], dtype: torch.dtype, role: str) -> nn.Parameter:
    """A parameter that every rank holds whole."""
    return mark(nn.Parameter(torch.empty(shape, dtype=dtype)), Shard(shape), role)


def divided(shape: tuple[int, ...], mesh: Mesh, dtype: torch.dtype, role: str) -> nn.Parameter:
    """A parameter whose first dim is divided over ranks (it must divide evenly)."""
    assert shape[0] % mesh.tp_size == 0
    local = (shape[0] // mesh.tp_size, *shape[1:])
    return mark(nn.Parameter(torch.empty(local, dtype=dtype)), Shard(shape, 0, shape[0]), role)


def to_columns(stream: Tensor) -> Tensor:
    """The same values; in backward the gradient is summed over tensor-parallel ranks, once for all columns that read it."""
    group = get_tensor_model_parallel_group()
    return stream if group.size() == 1 else _SumOfGradients.apply(stream, group)


def from_rows(partial: Tensor) -> Tensor:
    """The sum of all ranks' partial sums, in fp32 where there are several.

    Source: `fp32_allreduce` of Stability-AI/StableLM `configs/stablelm-2-12b.yml`; a sum in bf16 rounds again at every rank.
    """
    if get_tensor_model_parallel_group().size() == 1:
        return partial
    return reduce_from_tensor_model_parallel_region(partial.float())


class _SumOfGradients(torch.autograd.Function):
    """As megatron-core 0.16.1's `copy_to_tensor_model_parallel_region`, but the sum is in fp32."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        total = gradient.float().contiguous()
        # A copy where the gradient was fp32 already: others may hold it.
        total = total.clone() if total is gradient else total
        torch.distributed.all_reduce(total, group=ctx.group)
        return total.to(gradient.dtype), None


def gathered(logits: Float[Tensor, "*batch vocab_local"]) -> Float[Tensor, "*batch vocab_padded"]:
    """All ranks' columns side by side; carries no gradient."""
    # Not megatron-core 0.16.1's own: it allocates the result on the GPU even where the logits, and all else, are on the CPU.
    group = get_tensor_model_parallel_group()
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    torch.distributed.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def _megatron(mesh: Mesh, dtype: torch.dtype) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=mesh.tp_size,
        params_dtype=dtype,
        # Initial values are ours (models.init); the flag also lets layers be built on meta and without CUDA.
        perform_initialization=False,
        use_cpu_initialization=True,
        deterministic_mode=True,
    )


def _no_initial_values(weight: Tensor) -> Tensor:
    raise AssertionError("layers are built without initial values; models.init fills them")
