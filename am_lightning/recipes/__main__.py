"""``am-lightning COMMAND``, or ``python -m am_lightning.recipes COMMAND``.

A command's module is imported when the command is given, and torch and Lightning when it runs, so that help and
refusals are immediate.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from am_lightning.pretrain.runtime.main import command_line
from am_lightning.pretrain.runtime.suggestions import meant

_PACKAGE = "am_lightning.pretrain.commands"
# Command -> its module and what it does. A module has add_arguments(parser) and run(arguments), which returns the exit
# status or raises RecipeError; the modules in _OTHER_PARSERS have main(words) instead.
_COMMANDS = {
    "list": (f"{_PACKAGE}.list", "show the recipes: parameters, tokens of training, strategy"),
    "cp": (f"{_PACKAGE}.copy", "copy a recipe and the programs it runs with, to edit them"),
    "plan": (f"{_PACKAGE}.plan.command", "estimate memory, traffic, time and disk of a recipe on a number of GPUs"),
    "validate": (f"{_PACKAGE}.validate", "check a recipe and its settings without training"),
    "fit": (f"{_PACKAGE}.fit", "train a recipe on this machine, or on several machines"),
    "sample": (f"{_PACKAGE}.sample", "let a run's model continue a prompt"),
    "export": (f"{_PACKAGE}.export", "write a run's model as a Hugging Face folder"),
    "report": (f"{_PACKAGE}.report.command", "compare runs in one HTML file and a PNG"),
    "bench": ("am_lightning.bench.__main__", "time an optimizer step on this machine beside AdamW and others"),
}
_OTHER_PARSERS = ("fit", "bench")


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    with command_line(imports=False):
        return _run(sys.argv[1:] if args is None else list(args))


def _run(args: list[str]) -> int:
    program = program_name()
    name = args[0] if args else "--help"
    if name in ("-h", "--help", "help"):
        print(_usage(program))
        return 0
    if name == "--version":
        from am_lightning import __version__

        print(f"am-lightning {__version__}")
        return 0
    if name not in _COMMANDS:
        print(f"error: there is no command {name}{meant(name, _COMMANDS)}\n\n{_usage(program)}", file=sys.stderr)
        return 2
    path, text = _COMMANDS[name]
    module = importlib.import_module(path)
    if name in _OTHER_PARSERS:
        return int(module.main(args[1:]) or 0)
    parser = argparse.ArgumentParser(f"{program} {name}", description=f"{text[0].upper()}{text[1:]}.")
    module.add_arguments(parser)
    arguments, unknown = parser.parse_known_args(args[1:])
    if unknown and "settings" not in arguments:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.settings = unknown
    return int(module.run(arguments))


def program_name() -> str:
    """Return how this program was started, for usage lines."""
    return "python -m am_lightning.recipes" if Path(sys.argv[0]).name == "__main__.py" else "am-lightning"


def _usage(program: str) -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in _COMMANDS.items()]
    more = f"{program} COMMAND --help shows the arguments of a command."
    return "\n".join([f"usage: {program} COMMAND ...", "", *lines, "", more])


if __name__ == "__main__":
    sys.exit(main())
