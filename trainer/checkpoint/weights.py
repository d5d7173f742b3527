"""Open the weights that `weight_source` describes, and load them into a model."""

from dataclasses import dataclass, replace

import torch

from tandem.trainer import models
from tandem.trainer.checkpoint.hf import convert
from tandem.trainer.checkpoint.hf.tensor_conversion import TensorReader
from tandem.trainer.checkpoint.read import load_weights, open_checkpoint
from tandem.trainer.checkpoint.weight_source import WeightSource, describe_checkpoint, override_alibi_scaling
from tandem.trainer.distributed.mesh import Mesh


@dataclass(frozen=True)
class OpenWeights:
    source: WeightSource
    read_tensor: TensorReader
    """Maps a parameter's name to its unpadded global tensor."""


def open_weights(source: WeightSource) -> OpenWeights:
    """Open described weights without reading them. The files of a checkpoint are hashed.

    If the newest checkpoint of a run is damaged, an older one is opened and described.
    Raises: UserError if there is no undamaged one, or the files of a Hugging Face folder do not fit its config.json.
    """
    if source.is_hugging_face:
        model, _, read_tensor = convert.open_folder(source.path)
        described = override_alibi_scaling(replace(source, model=model), source.alibi_scaling)
        return OpenWeights(described, read_tensor)
    checkpoint = open_checkpoint(source.path)
    described = override_alibi_scaling(describe_checkpoint(source.path, checkpoint), source.alibi_scaling)
    return OpenWeights(described, checkpoint.read_weight)


def load_model(opened: OpenWeights, mesh: Mesh, dtype: torch.dtype | None = None) -> models.Decoder:
    """Build the model and load its weights. The default dtype is fp32 on a CPU and bf16 on a GPU."""
    dtype = dtype or (torch.bfloat16 if mesh.device.type == "cuda" else torch.float32)
    with mesh.device:
        model = models.build_model(opened.source.model, opened.source.mup, mesh, dtype=dtype)
    load_weights(model, opened.read_tensor, mesh)
    return model.eval()
