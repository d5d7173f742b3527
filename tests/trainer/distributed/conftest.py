"""The corpus of the promises, for tests that start `tandem train`."""

from tests.promises.conftest import corpus

__all__ = ["corpus"]
