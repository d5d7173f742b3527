"""The two model families. Their code looks like single-device code; the layers they use divide the weights over ranks."""

import torch

from tandem.trainer.config import AnyModelConfig, MupConfig
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.models.btlm import BTLMDecoder
from tandem.trainer.models.decoder import Decoder, RecomputeMode
from tandem.trainer.models.mup import forward_scales
from tandem.trainer.models.stablelm import StableLMDecoder

FAMILIES: dict[str, type[Decoder]] = {"stablelm": StableLMDecoder, "btlm": BTLMDecoder}


def build_model(
    config: AnyModelConfig, mup: MupConfig | None, mesh: Mesh, *, dtype: torch.dtype, recompute: RecomputeMode = "none"
) -> Decoder:
    """Build this rank's share of the model with uninitialized weights, on the default device."""
    return FAMILIES[config.family](config, forward_scales(config, mup), mesh, dtype, recompute)
