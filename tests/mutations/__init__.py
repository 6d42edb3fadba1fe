"""Planted faults: small changes of the package, each of which a named test must see. ``python -m tests.mutations``."""
