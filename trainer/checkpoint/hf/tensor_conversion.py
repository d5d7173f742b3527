"""Convert tensors between our form and that of a Hugging Face folder.

Export (`to_hf_tensor`) and import (`from_hf_tensors`) use the same table of `tensor_mapping` and therefore cannot disagree.
"""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor, promote_types

from tandem.kernels.attention import alibi_slopes
from tandem.trainer.checkpoint.hf.tensor_mapping import HFTensor, TensorMapping
from tandem.trainer.config import AnyModelConfig, BTLMConfig

TensorReader = Callable[[str], Tensor]
"""Maps our name of a tensor to the whole tensor, without padding, on the CPU."""


def default_tensors(model: AnyModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the tensors of a folder that are not parameters of the model.

    BTLM: the ALiBi slopes, always in fp32. Stable LM: zero biases of the block and final norms, which the class always has.
    """
    if isinstance(model, BTLMConfig):
        return {"transformer.relative_pe.slopes": alibi_slopes(model.num_heads).unsqueeze(-1)}
    norms = ["input_layernorm"] if model.parallel_residual else ["input_layernorm", "post_attention_layernorm"]
    names = [f"model.layers.{index}.{norm}.bias" for index in range(model.num_layers) for norm in norms]
    return {name: torch.zeros(model.hidden_size, dtype=dtype) for name in [*names, "model.norm.bias"]}


def to_hf_tensor(mapping: TensorMapping, hf_tensor: HFTensor, tensor: Tensor) -> Tensor:
    """Make one tensor of the folder from our whole tensor."""
    part = tensor.view(mapping.view)[hf_tensor.index]
    if hf_tensor.permutation:
        part = part.permute(hf_tensor.permutation)
    return part.reshape(hf_tensor.shape[::-1]).t() if hf_tensor.is_transposed else part.reshape(hf_tensor.shape)


def from_hf_tensors(mapping: TensorMapping, read_hf_tensor: TensorReader) -> Tensor:
    """Make our whole tensor from the folder's tensors, in a dtype that rounds none of them."""
    parts = [read_hf_tensor(piece.hf_name) for piece in mapping.hf_tensors]
    tensor = parts[0].new_empty(mapping.view, dtype=reduce(promote_types, (part.dtype for part in parts)))
    for piece, part in zip(mapping.hf_tensors, parts, strict=True):
        target = tensor[piece.index]
        if piece.permutation:
            target = target.permute(piece.permutation)
        target.copy_((part.t() if piece.is_transposed else part).reshape(target.shape))
    return tensor.view(mapping.shape)
