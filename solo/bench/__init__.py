"""Measurements of this library beside others, in one process and in turn: ``python -m solo.bench``."""
