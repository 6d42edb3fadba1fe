"""The whole text of a recipe, whose YAML holds only what differs from its base, with the comments of both.

The programs do not need it: jsonargparse merges `--config BASE --config RECIPE` (see `paths.with_paths`).
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.paths import BASE, read_text, with_bases

_HEADLINE = re.compile(r"\A(?:#.*\n)+")  # the comment lines that a YAML begins with


class _Entry(NamedTuple):
    """A key with the comment lines above it, its own line, and the keys that are indented below it."""

    key: str
    above: list[str]
    line: str
    inside: list[_Entry]


def recipe_text(path: Path) -> str:
    """Return the text of the YAML at `path`, merged into its base if it names one.

    Raises:
        RecipeError: if the base does not exist, or a section that the base has is written in braces.
    """
    return functools.reduce(merge_texts, map(read_text, with_bases(path)))


def merge_texts(base: str, difference: str) -> str:
    """Return `base` with the headline and the values of `difference`, and with its comments if it has any."""
    entries = _merged(*(_parse(_HEADLINE.sub("", text).splitlines()) for text in (base, difference)))
    headline = "".join(_HEADLINE.findall(difference)).splitlines()
    return "\n".join([*(line for line in headline if not BASE.fullmatch(line)), *_lines(entries)]) + "\n"


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
    merged = [_over(entry, other.pop(entry.key)) if entry.key in other else entry for entry in base]
    return merged + list(other.values())


def _over(base: _Entry, entry: _Entry) -> _Entry:
    code, mark, comment = entry.line.partition("  # ")
    if base.inside and not entry.inside and "{" in code:
        raise RecipeError(f"{entry.key}: give each key that differs from the base a line of its own, without {{...}}")
    above = base.above
    if any(entry.above) or mark:
        own = itertools.takewhile(bool, reversed(above))  # what is above a blank line is not about this key
        above = [*above[: len(above) - len(list(own))], *filter(None, entry.above)]
    else:
        _, mark, comment = base.line.partition("  # ")
    column = 0 if entry.inside else base.line.find("  # ")
    line = f"{code.rstrip().ljust(column)}{mark}{comment}".rstrip()
    return _Entry(base.key, above, line, _merged(base.inside, entry.inside) if entry.inside else [])


def _lines(entries: list[_Entry]) -> Iterator[str]:
    for entry in entries:
        yield from [*entry.above, entry.line, *_lines(entry.inside)]
