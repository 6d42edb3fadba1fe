"""Errors whose text is shown to the user without a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from am_lightning.optional_imports import cause_of

RESUME = "--ckpt_path last resumes from the newest checkpoint"


class RecipeError(Exception):
    """An error that the user can mend: its text names the file or the setting and tells what to do."""


class UsageError(RecipeError):
    """An error of the command line or a YAML, such as a misspelt setting. The exit status is 2, like argparse's."""


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise a RecipeError that names the setting, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise RecipeError(f"{name} is {value!r}; allowed: {allowed}")


def require_counts(section: str, lowest: int = 1, **values: int | None) -> None:
    """Raise a RecipeError unless every setting of a section is at least `lowest`, or None (null).

    jsonargparse's PositiveInt would pass on objects of its own class, which checkpoints would pickle.
    """
    for name, value in values.items():
        require(value is None or value >= lowest, f"{section}.{name}", value, f"a whole number >= {lowest}")


def require_encodable(name: str, text: str) -> None:
    """Raise a RecipeError that names the setting if no file or file name could hold its text, as in a C locale."""
    try:
        text.encode()
        os.fsencode(text)
    except UnicodeEncodeError:
        raise RecipeError(f"{name} {text!a}: this locale has no such letters; set LC_ALL=C.UTF-8") from None


def first_line(error: BaseException) -> str:
    """Return the type of another library's error and the first line of its text."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


@contextmanager
def needs(package: str, text: str) -> Iterator[None]:
    """Raise a RecipeError of ``text`` if an import in the block fails, with its reason if the package is there."""
    try:
        yield
    except ImportError as error:
        cause = cause_of(error, package)
        raise RecipeError(text if cause is None else f"{text} ({first_line(error)})") from cause
