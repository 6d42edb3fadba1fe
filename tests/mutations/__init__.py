"""Planted faults: small changes of the package that a named test must detect. ``python -m tests.mutations``."""
