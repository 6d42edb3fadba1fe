"""The page that a study writes: what was run on what, its tables and figures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

# Options that change no number of the page.
_SILENT = {"out", "workers", "stages", "data_dir", "try_steps", "begin_with"}


def command_of(program: str, parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The command that makes the same page: the program with the options that are not at their defaults."""
    words = [f"python -m recipes.studies.{program}"]
    for name, value in vars(options).items():
        if name not in _SILENT and value != parser.get_default(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return " ".join(words)


def write_page(path: Path, title: str, command: str, made: str, protocol: str, parts: Sequence[str]) -> str:
    """Write Markdown to `path`: a title, the command, where it ran, the protocol, then the parts.

    Args:
        path: of the page; its folder is made.
        title: of the page.
        command: that makes it.
        made: device, versions and date of the runs.
        protocol: what was run, seeds included.
        parts: tables and figures, with their headings.

    Returns:
        What was written.
    """
    text = "\n\n".join([f"# {title}", f"Made by `{command}`: {made}. {protocol}", *parts]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return text


def figure(name: str, says: str) -> str:
    """A picture that lies beside the page."""
    return f"![{says}]({name})"
