"""The smallest experiment that has everything a real one has, as plain config values."""

from solo.testing import tiny as values

__all__ = ["values"]
