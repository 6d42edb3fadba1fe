"""A key that no setting has, in words: where it stands, and which one was probably meant."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_OPTION = re.compile(r"does not accept option '(?P<key>[\w.]+)'|unrecognized arguments: --(?P<word>[\w.]+)")
_ARGUMENT = re.compile(r'Parser key "(?P<key>[\w.]+)".*Option \'(?P<name>\w+)\' is not accepted', re.DOTALL)
_CLASS = re.compile(r"class_path='([\w.]+)'")
_SYNONYMS = {"learning_rate": "lr", "beta1": "betas", "beta2": "betas", "wd": "weight_decay", "epsilon": "eps"}


def explain(message: str, options: Iterable[str], args: Sequence[str]) -> str:
    """An error of the parser about a key that it does not know, as a line; any other as it is.

    Args:
        message: the parser's.
        options: all options there are, without dashes.
        args: the command line, its YAMLs as ``--config=PATH``.
    """
    if found := _OPTION.search(message):
        return unknown_setting(found["key"] or found["word"], options, args)
    if found := _ARGUMENT.search(message):
        path = _CLASS.search(message)
        names = _arguments(path[1]) if path else []
        name = found["name"]
        near = [_SYNONYMS[name]] if _SYNONYMS.get(name) in names else difflib.get_close_matches(name, names, n=1)
        of = path[1].rpartition(".")[2] if path else found["key"]
        return f"{found['key']}.init_args.{name}: {of} has no argument of that name{_meant(near)}{_place(name, args)}"
    return message


def unknown_setting(key: str, options: Iterable[str], args: Sequence[str]) -> str:
    """The error's text. The arguments are as in `explain`; `args` may have no YAML, then no place is named."""
    return f"there is no setting {key}{meant(key, options)}{_place(key, args)}"


def meant(name: str, names: Iterable[str]) -> str:
    """A question that ends an error: which of `names` was meant, one of the same last part first; or nothing."""
    names, last = list(names), name.rpartition(".")[2]
    same = [other for other in names if other.rpartition(".")[2] == _SYNONYMS.get(last, last)]
    return _meant(same[:1] or difflib.get_close_matches(name, names, n=1, cutoff=0.75))


def _meant(near: Sequence[str]) -> str:
    return f". Did you mean {near[0]}?" if near else ""


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []


def _place(key: str, args: Sequence[str]) -> str:
    """The file and line of a key in brackets, where a YAML of the command line has it; the last, which wins."""
    line = re.compile(rf"^\s*(- )?{re.escape(key.rpartition('.')[2])}\s*:")
    first = re.compile(rf"^\s*(- )?{re.escape(key.partition('.')[0])}\s*:")
    for path in (arg.removeprefix("--config=") for arg in reversed(args) if arg.startswith("--config=")):
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        begin = next((number for number, text in enumerate(lines) if first.match(text)), 0)
        for number, text in enumerate(lines[begin:], begin + 1):
            if line.match(text):
                return f" ({path}, line {number})"
    return ""
