"""The two families as single-device-looking code; what is divided over ranks is decided by the layers they are built from."""

import torch

from tandem.trainer.config import BTLM, Mup, StableLM
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.models import btlm, stablelm
from tandem.trainer.models.decoder import Decoder, Recompute
from tandem.trainer.models.mup import forward_scales


def build(
    section: StableLM | BTLM, mup: Mup | None, mesh: Mesh, *, dtype: torch.dtype, recompute: Recompute = "none"
) -> Decoder:
    """The family's model with uninitialised weights, this rank's share, on the default device."""
    family = stablelm if isinstance(section, StableLM) else btlm
    return family.build(section, forward_scales(section, mup), mesh, dtype, recompute)
