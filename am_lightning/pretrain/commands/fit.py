"""`fit`: train a recipe in this process, or with torchrun on several GPUs and machines."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError, UsageError, require
from am_lightning.pretrain.runtime.main import import_training
from am_lightning.pretrain.runtime.paths import find_config, recipes_folder
from am_lightning.pretrain.runtime.settings import check_settings, read_recipe

_USAGE = "fit NAME [--gpus N] [--nodes M] [--KEY VALUE ...]"
# The settings in the short help, which base.yaml describes.
_USUAL = (
    "ckpt_path",
    "compare",
    "model.optimizer.lr",
    "model.optimizer.betas",
    "model.warmup_fraction",
    "data.source",
    "data.tokenizer",
    "data.batch_size",
    "trainer.default_root_dir",
    "trainer.max_steps",
    "trainer.strategy",
    "trainer.precision",
    "trainer.accumulate_grad_batches",
    "checkpoint.every_n_train_steps",
)


def main(args: Sequence[str]) -> int:
    """Train, and return the exit status. With --gpus or --nodes this process becomes the launcher.

    Args:
        args: the arguments after `fit`.

    Raises:
        RecipeError: if there is no such recipe or setting, or the number of processes is impossible.
    """
    if "-h" in args or "--help" in args:
        if "all" not in args:
            print(_short_help())
            return 0
        args = [word for word in args if word != "all"]
    else:
        options, rest = _parser().parse_known_args(list(args))
        name, settings = _recipe_of(rest)
        if rest[0] == name and settings and not settings[0].startswith("-"):
            raise UsageError(f"unrecognized argument {settings[0]!r} after {name}. Usage: {_USAGE}")
        check_settings(rest)
        if options.gpus is not None or options.nodes is not None:
            return _launch(options, name, settings, args)
        if options.master_addr is not None or options.master_port is not None:
            raise RecipeError("--master-addr and --master-port are for several machines: give --nodes M")
    import_training()
    from am_lightning.pretrain.runtime.cli import PretrainCLI

    PretrainCLI(["fit", *args])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fit", usage=_USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, metavar="N", help="processes on each machine, one per GPU if it has GPUs")
    parser.add_argument("--nodes", type=int, metavar="M", help="machines; the command for the other ones is printed")
    parser.add_argument("--master-addr", metavar="HOST", help="address of the first machine; default: this machine")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="a free port of HOST; default: 29500")
    return parser


def _launch(options: argparse.Namespace, name: str, settings: list[str], args: Sequence[str]) -> int:
    """Replace this process by torchrun.sh, which picks interfaces, restarts processes and configures torch and NCCL."""
    for option, count in (("--gpus", options.gpus), ("--nodes", options.nodes)):
        require(count is None or count >= 1, option, count, "a whole number >= 1")
    port = options.master_port
    require(port is None or 1 <= port <= 65535, "--master-port", port, "1 to 65535")
    import torch

    found = torch.cuda.device_count()
    gpus = options.gpus if options.gpus is not None else max(1, found)
    nodes = options.nodes if options.nodes is not None else 1
    require(gpus <= (found or gpus), "--gpus", gpus, f"1 to {found}, the GPUs of this machine")
    parser = argparse.ArgumentParser(prog="fit", usage=_USAGE, add_help=False, allow_abbrev=False)
    for key in ("trainer.devices", "trainer.num_nodes", "trainer.default_root_dir", "ckpt_path"):
        parser.add_argument(f"--{key}")
    given = vars(parser.parse_known_args(settings)[0])
    for key, option in (("trainer.devices", "--gpus"), ("trainer.num_nodes", "--nodes")):
        require(given[key] is None, f"--{key}", given[key], f"no value beside --gpus or --nodes: give {option}")
    config = find_config(name).absolute()
    recipe = read_recipe(config)
    folder = given["trainer.default_root_dir"]
    if folder is None:
        folder = recipe.get("trainer", {}).get("default_root_dir", "runs/pretrain")
    kind = "processes, each with a GPU" if found else "CPU processes: there is no GPU here"
    print(f"{nodes} x {gpus} {kind}", flush=True)
    ckpt_path = given["ckpt_path"] or str(recipe.get("ckpt_path") or "null")
    settings = ["--ckpt_path", ckpt_path, *settings]  # worker.sh has "last" before it
    restarts = {} if ckpt_path == "last" else {"MAX_RESTARTS": "0"}  # a process that ends must not begin another run
    address = options.master_addr
    if nodes > 1 and address is None:
        address = os.environ.get("MASTER_ADDR") or socket.gethostname()
        others = ["am-lightning", "fit", *args, "--master-addr", address]
        print(f"On each of the other machines:\n  {shlex.join(others)}", flush=True)
    environment = {
        **os.environ,
        "CONFIG": str(config),
        "RUN_DIR": str(Path(folder).expanduser()),
        "GPUS_PER_NODE": str(gpus),
        "NODES": str(nodes),
        "MASTER_ADDR": address or "",
        "MASTER_PORT": str(port or ""),
        "PROGRAM": "",
        "PYTHON": sys.executable,
        **restarts,
    }
    launcher = recipes_folder() / "launch" / "torchrun.sh"
    sys.stdout.flush()
    os.execvpe("bash", ["bash", str(launcher), *settings], environment)


def _recipe_of(rest: Sequence[str]) -> tuple[str, list[str]]:
    """Return the recipe, `NAME` or the first `--config`, and the arguments without it."""
    words = list(rest)
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    for position, word in enumerate(words):
        if word.startswith("--config="):
            return word.partition("=")[2], words[:position] + words[position + 1 :]
        if word == "--config" and position + 1 < len(words):
            return words[position + 1], words[:position] + words[position + 2 :]
    raise RecipeError(f"fit needs the NAME of a recipe, or a YAML. Usage: {_USAGE}")


def _short_help() -> str:
    """Return the options, and the usual settings with their values and comments in base.yaml."""
    text = (recipes_folder() / "configs" / "base.yaml").read_text(encoding="utf-8")
    lines = []
    for key in _USUAL:
        # KEY: VALUE  # (type, default of the class) COMMENT
        found = re.search(rf"^ *{key.rpartition('.')[2]}: +(.*?) +# \(.*?\) (.*)$", text, re.MULTILINE)
        assert found is not None, key
        lines.append(f"  --{key + ' ' + found[1]:<41} {found[2]}")
    return "\n".join(
        [
            f"usage: {_USAGE}",
            "",
            "Train a recipe (`list` shows them) or a YAML file, in this process or in the ones that --gpus and --nodes",
            "start. With --ckpt_path last the run resumes, and its processes are started again if one of them dies.",
            "",
            _parser().format_help().partition("options:\n")[2].rstrip(),
            "",
            "Usual settings, each with its value in base.yaml, which holds unless the recipe or the command line",
            "sets another one:",
            *lines,
            "",
            "`cp NAME DIR` writes out all values of a recipe. fit --help all shows every setting there is.",
        ]
    )
