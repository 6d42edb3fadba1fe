"""Errors about packages that the extras bring. Imports nothing, so that every floor may use it."""

from __future__ import annotations


def cause_of(error: ImportError, *packages: str) -> ImportError | None:
    """What to raise the error "this needs a package" from.

    Args:
        error: what the import raised.
        packages: names of the top-level packages that were imported.

    Returns:
        None where one of ``packages`` is not installed: the new error says everything. ``error`` where they are
        installed and one of them fails to import: only its own text says why.
    """
    return None if isinstance(error, ModuleNotFoundError) and error.name in packages else error
