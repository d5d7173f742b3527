"""The two families as single-device-looking code; what is divided over ranks is decided by the layers they are built from."""

import torch

from tandem.trainer.config import BTLMConfig, MupConfig, StableLMConfig
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.models import btlm, stablelm
from tandem.trainer.models.decoder import Decoder, RecomputeMode
from tandem.trainer.models.mup import forward_scales


def build_model(
    config: StableLMConfig | BTLMConfig,
    mup: MupConfig | None,
    mesh: Mesh,
    *,
    dtype: torch.dtype,
    recompute: RecomputeMode = "none",
) -> Decoder:
    """The family's model with uninitialised weights, this rank's share, on the default device."""
    family = stablelm if isinstance(config, StableLMConfig) else btlm
    return family.build(config, forward_scales(config, mup), mesh, dtype, recompute)
