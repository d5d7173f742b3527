"""Where the kernels of a test run: on the GPU, or on the CPU in Triton's interpreter."""

import pytest
import torch

import tests.triton_interpreter  # noqa: F401


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
