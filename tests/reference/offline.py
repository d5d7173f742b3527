"""transformers without a network, and without a trace in the home of whoever runs the tests."""

import tempfile
from collections.abc import Iterator

import pytest
from transformers import dynamic_module_utils
from transformers.utils import logging

MODULES_CACHE = tempfile.TemporaryDirectory(prefix="code-of-exports-")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", MODULES_CACHE.name)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
