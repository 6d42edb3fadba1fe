"""The error whose text is for the person at the keyboard."""

from __future__ import annotations

from am_lightning.optional_imports import cause_of

RESUME = "--ckpt_path last goes on from the newest checkpoint"


class RecipeError(Exception):
    """Something the user can put right: the text names the file or setting and says what to do. Shown bare."""


class UsageError(RecipeError):
    """There is no setting of that name: the exit status is 2, as argparse's."""


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise a RecipeError that names the setting, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise RecipeError(f"{name} is {value!r}; allowed: {allowed}")


def require_counts(section: str, lowest: int = 1, **values: int | None) -> None:
    """Raise a RecipeError unless every setting of a section is at least `lowest`, or None (null)."""
    for name, value in values.items():
        require(value is None or value >= lowest, f"{section}.{name}", value, f"a whole number >= {lowest}")


def first_line(error: BaseException) -> str:
    """Another library's error in a few words: its kind and the first line of its text."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def needs_package(text: str, error: ImportError, *packages: str) -> RecipeError:
    """RecipeError of ``text``, and of the import's own reason where ``packages`` are installed and one is broken."""
    return RecipeError(text if cause_of(error, *packages) is None else f"{text} ({first_line(error)})")
