"""Errors about a setting that does not exist: where it stands, and which one was probably meant."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_ARGUMENT = re.compile(r'Parser key "(?P<key>[\w.]+)".*Option \'(?P<name>\w+)\' is not accepted', re.DOTALL)
_CLASS = re.compile(r"class_path[= ]'([\w.]+)'")
_SYNONYMS = {"learning_rate": "lr", "beta1": "betas", "beta2": "betas", "wd": "weight_decay", "epsilon": "eps"}


def explain(message: str, args: Sequence[str]) -> str:
    """Return the parser's error about an argument that a class does not have as one line, and any other unchanged.

    Args:
        message: the parser's error.
        args: the command line, with its YAMLs as ``--config=PATH``.
    """
    if found := _ARGUMENT.search(message):
        key, name, path = found["key"], found["name"], _CLASS.search(message)
        owner, names = (path[1].rpartition(".")[2], _arguments(path[1])) if path else (key, [])
        return f"{key}.init_args.{name}: {owner} has no argument of that name{meant(name, names)}{place(name, args)}"
    return message


def meant(name: str, names: Iterable[str], cutoff: float = 0.75) -> str:
    """Return the question that ends an error, or "": which of `names` was meant.

    A name with the same last part comes first, then the one that is at least `cutoff` (0 to 1) similar.
    """
    names, last = list(names), name.rpartition(".")[2]
    same = [other for other in names if other.rpartition(".")[2] == _SYNONYMS.get(last, last)]
    near = same or difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f". Did you mean {near[0]}?" if near else ""


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []


def place(key: str, args: Sequence[str]) -> str:
    """Return the file and the line of a key in parentheses, from the last YAML that has it, because that one wins."""
    line, first = (
        re.compile(rf"^\s*(- )?{re.escape(part)}\s*:") for part in (key.rpartition(".")[2], key.partition(".")[0])
    )
    for path in (arg.removeprefix("--config=") for arg in reversed(args) if arg.startswith("--config=")):
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        begin = next((number for number, text in enumerate(lines) if first.match(text)), 0)
        for number, text in enumerate(lines[begin:], begin + 1):
            if line.match(text):
                return f" ({path}, line {number})"
    return ""
