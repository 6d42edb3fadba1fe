"""The whole text of a recipe, whose YAML holds only what differs from its base, with the comments of both.

The programs do not need it: jsonargparse merges `--config BASE --config RECIPE` (see `paths.with_paths`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.paths import BASE, read_text, with_bases


class _Entry(NamedTuple):
    """A key with the comment lines above it, its own line, and the keys that are indented below it."""

    key: str
    above: list[str]
    line: str
    inside: list[_Entry]

    @property
    def has_comment(self) -> bool:
        return any(self.above) or "  # " in self.line


def recipe_text(path: Path) -> str:
    """Return the text of the YAML at `path`, merged into its base if it names one.

    Raises:
        RecipeError: if the base does not exist, or a section that the base has is written in braces.
    """
    return functools.reduce(merge_texts, map(read_text, with_bases(path)))


def merge_texts(base: str, difference: str) -> str:
    """Return `base` with the headline and the values of `difference`, and with its comments if it has any."""
    (_, lines), (headline, body) = _headline_and_body(base), _headline_and_body(difference)
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    while first and lines[first - 1]:
        first -= 1
    entries = _merged(_parse(lines[first:]), _parse(body))
    shown = [line for line in headline if not BASE.fullmatch(line)]
    return "\n".join([*shown, "", *lines[:first], *_lines(entries)]) + "\n"


def _headline_and_body(text: str) -> tuple[list[str], list[str]]:
    """Return the comment lines that a YAML begins with, and the lines after them without the blank one between."""
    lines = text.splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:end], lines[end + (lines[end : end + 1] == [""]) :]


def _parse(lines: Sequence[str]) -> list[_Entry]:
    top: list[_Entry] = []
    open_entries: list[tuple[int, list[_Entry]]] = [(-1, top)]
    above: list[str] = []
    for line in lines:
        code = line.strip()
        if not code or code.startswith("#"):
            above.append(line)
            continue
        indent = len(line) - len(line.lstrip())
        while open_entries[-1][0] >= indent:
            open_entries.pop()
        key = code.partition("  # ")[0] if code.startswith("- ") else code.partition(":")[0]
        entry = _Entry(key, above, line.rstrip(), [])
        open_entries[-1][1].append(entry)
        open_entries.append((indent, entry.inside))
        above = []
    return top


def _merged(base: list[_Entry], difference: list[_Entry]) -> list[_Entry]:
    if any(entry.key.startswith("- ") for entry in difference):  # a list is replaced as a whole
        return difference
    other = {entry.key: entry for entry in difference}
    return [_over(entry, other.pop(entry.key, entry)) for entry in base] + list(other.values())


def _over(base: _Entry, entry: _Entry) -> _Entry:
    code, mark, comment = entry.line.partition("  # ")
    if base.inside and not entry.inside and "{" in code:
        raise RecipeError(f"{entry.key}: give each key that differs from the base a line of its own, without {{...}}")
    above = base.above
    if entry.has_comment:
        above = [*itertools.takewhile(lambda line: not line, above), *filter(None, entry.above)]
    else:
        _, mark, comment = base.line.partition("  # ")
    column = 0 if entry.inside else base.line.find("  # ")
    line = f"{code.rstrip().ljust(column)}{mark}{comment}".rstrip()
    return _Entry(base.key, above, line, _merged(base.inside, entry.inside) if entry.inside else [])


def _lines(entries: list[_Entry]) -> Iterator[str]:
    for entry in entries:
        yield from [*entry.above, entry.line, *_lines(entry.inside)]
