"""Pages of the studies in Markdown, and the options and the start that all studies have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError

# Options that change no number of the page.
_SILENT = {"out", "workers", "stages", "data_dir", "try_steps", "begin_with", "write"}


def study_parser(description: str | None, out: Path | None) -> argparse.ArgumentParser:
    """Return a parser with ``--out``, whose default is `out`, and ``--workers``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "runs/studies/NAME OF THE TASK" if out is None else "%(default)s"
    parser.add_argument("--out", type=Path, default=out, help=f"folder of results; default: {default}")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one CPU thread each")
    return parser


def add_begin_with(parser: argparse.ArgumentParser) -> None:
    """Add ``--begin-with``, which `Ledger.begun_with` takes."""
    parser.add_argument("--begin-with", type=Path, metavar="JSONL.GZ", help="earlier runs, if --out has none yet")


def run_study(program: str, parser: argparse.ArgumentParser, study: Callable[[argparse.Namespace, str], str]) -> None:
    """Parse the command line and print the page that ``study(options, command)`` returns. RecipeErrors end the program.

    Args:
        program: module of the study below recipes.studies.
        parser: parser of its command line.
        study: function that runs the study; ``command`` makes the same page again.
    """
    options = parser.parse_args()
    try:
        print(study(options, command_of(program, parser, options)))
    except RecipeError as error:
        sys.exit(f"error: {error}")


def command_of(program: str, parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """Return the command that makes the same page: the program with the options that differ from their defaults."""
    words = [f"python -m recipes.studies.{program}"]
    for name, value in vars(options).items():
        if name not in _SILENT and value != parser.get_default(name):
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def write_page(path: Path, title: str, command: str, made: str, protocol: str, parts: Sequence[str]) -> str:
    """Write a page, and return its text.

    Args:
        path: file of the page. Its folder is created.
        title: title of the page.
        command: command that makes the page.
        made: device, versions and date of the runs.
        protocol: description of the runs, seeds included.
        parts: tables and figures, with their headings.
    """
    text = "\n\n".join([f"# {title}", f"Made by `{command}`: {made}. {protocol}", *parts]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return text


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned in the source.

    Raises:
        ValueError: if a row has another number of cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"row {list(row)} has {len(row)} cells, the header {len(header)}")
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
