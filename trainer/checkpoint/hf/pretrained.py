"""The one place that runs transformers: a folder loaded the way its users will load it."""

from pathlib import Path

import torch
from torch import nn


def load_pretrained(folder: Path) -> nn.Module:
    """The folder's model in fp32, by transformers and, for BTLM, the code shipped in the folder; nothing is downloaded."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, local_files_only=True
    )
    return model.eval()
