"""Load an exported folder with transformers, as its users do. No other module runs transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import nn


def load_pretrained(folder: Path) -> nn.Module:
    """Load a folder's model in fp32. BTLM uses the code in the folder. Nothing is downloaded."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


def load_pretrained_tokenizer(folder: Path) -> Any:
    """Load a folder's tokenizer. It needs no code of the folder, and none is run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
