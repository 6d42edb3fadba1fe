"""``am-lightning COMMAND``, or ``python -m am_lightning.recipes COMMAND``.

A command's module is imported when the command is given, and what a command itself imports when it is run, so that help
and refusals take no seconds.
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
# Command -> its module and what it does. A module has add_parser(subparsers), which sets the default `run`, a function
# of the arguments that returns the exit status; the modules of _OTHER_PARSERS have main(words).
_COMMANDS = {
    "list": (f"{_PACKAGE}.list", "the recipes: parameters, tokens of training, strategy"),
    "cp": (f"{_PACKAGE}.copy", "copy a recipe and the programs it runs with, to edit them"),
    "plan": (f"{_PACKAGE}.plan.command", "memory, traffic, time and disk of a recipe over a number of GPUs"),
    "validate": (f"{_PACKAGE}.validate", "check a recipe and its settings; nothing is trained"),
    "fit": (f"{_PACKAGE}.fit", "train a recipe, here or on several GPUs and machines"),
    "sample": (f"{_PACKAGE}.sample", "text that a run's model writes behind a prompt"),
    "export": (f"{_PACKAGE}.export", "write a run's model as a Hugging Face folder"),
    "report": (f"{_PACKAGE}.report.command", "compare runs in one HTML file and a PNG"),
    "bench": ("am_lightning.bench.__main__", "time an optimizer step on this machine, beside AdamW and others"),
}
_OTHER_PARSERS = ("fit", "bench")


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    args = sys.argv[1:] if args is None else list(args)
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
    with command_line(imports=False):
        module = importlib.import_module(_COMMANDS[name][0])
        if name in _OTHER_PARSERS:
            return int(module.main(args[1:]) or 0)
        parser = argparse.ArgumentParser(prog=program)
        module.add_parser(parser.add_subparsers())
        chosen = parser.parse_args(args)
        return int(chosen.run(chosen))


def program_name() -> str:
    """How this program was started, for usage lines."""
    return "python -m am_lightning.recipes" if Path(sys.argv[0]).name == "__main__.py" else "am-lightning"


def _usage(program: str) -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in _COMMANDS.items()]
    return "\n".join([f"usage: {program} COMMAND ...", "", *lines, "", f"{program} COMMAND --help says more."])


if __name__ == "__main__":
    sys.exit(main())
