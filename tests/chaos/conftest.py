"""The corpus of the promises, for runs that are killed."""

from tests.promises.conftest import corpus

__all__ = ["corpus"]
