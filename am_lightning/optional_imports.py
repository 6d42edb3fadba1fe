"""Errors about packages that the extras bring. Imports nothing, so that every floor may use it."""

from __future__ import annotations


def cause_of(error: ImportError, *packages: str) -> ImportError | None:
    """Return the cause of the error that a package is missing, for ``raise ... from``.

    Args:
        error: what the import raised.
        packages: names of the top-level packages that were imported.

    Returns:
        None if one of ``packages`` is not installed, because the new error is complete. ``error`` if all are installed
        and one of them fails to import, because only its text has the reason.
    """
    return None if isinstance(error, ModuleNotFoundError) and error.name in packages else error
