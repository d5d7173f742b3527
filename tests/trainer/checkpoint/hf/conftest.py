"""Every test here runs offline."""

from tests.reference.offline import offline

__all__ = ["offline"]
