"""The device of kernel tests: a GPU, or the CPU with Triton's interpreter."""

import pytest
import torch

import tests.triton_interpreter  # noqa: F401


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
