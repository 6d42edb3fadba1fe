"""`fit`: train a recipe in this process, or on several GPUs and machines with torchrun."""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError, require
from am_lightning.pretrain.runtime.main import import_training
from am_lightning.pretrain.runtime.paths import find_config, recipes_folder
from am_lightning.pretrain.runtime.settings import check_names, read_recipe

_USAGE = "fit NAME [--gpus N] [--nodes M] [--KEY VALUE ...]"
# What a user sets most; base.yaml says what each is.
_USUAL = [
    "ckpt_path",
    "compare",
    "model.optimizer.init_args.lr",
    "model.optimizer.init_args.betas",
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
]


def main(words: Sequence[str]) -> int:
    """Train; the exit status. With --gpus or --nodes this process becomes the launcher.

    Args:
        words: what stands behind `fit`.

    Raises:
        RecipeError: a setting or a recipe that is not there, or a number of processes that cannot be.
    """
    if "-h" in words or "--help" in words:
        if "all" not in words:
            print(_short_help())
            return 0
        words = [word for word in words if word != "all"]
    else:
        options, rest = _parser().parse_known_args(list(words))
        _recipe_of(rest)  # raises where there is none
        check_names(rest)
        if options.gpus is not None or options.nodes is not None:
            return _launch(options, rest, words)
        if options.master_addr is not None or options.master_port is not None:
            raise RecipeError("--master-addr and --master-port are for several machines: give --nodes M")
    import_training()
    from am_lightning.pretrain.runtime.cli import PretrainCLI

    PretrainCLI(["fit", *words])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fit", usage=_USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="processes on each machine; CPU processes where it has no GPU"
    )
    parser.add_argument("--nodes", type=int, metavar="M", help="machines; the command for the others is printed")
    parser.add_argument(
        "--master-addr", metavar="HOST", help="the first machine, as the others see it; default: this one"
    )
    parser.add_argument("--master-port", type=int, metavar="PORT", help="a free port there; default: 29500")
    return parser


def _launch(options: argparse.Namespace, rest: Sequence[str], words: Sequence[str]) -> int:
    """Become launch/torchrun.sh, which knows interfaces, restarts and what torch and NCCL are to be told."""
    name, settings = _recipe_of(rest)
    found = _gpus_here()
    gpus = options.gpus if options.gpus is not None else max(1, found)
    nodes = options.nodes if options.nodes is not None else 1
    allowed = f"1 to {found}, the GPUs of this machine" if found else "a whole number >= 1"
    require(1 <= gpus <= (found or gpus), "--gpus", gpus, allowed)
    require(nodes >= 1, "--nodes", nodes, "a whole number >= 1")
    port = options.master_port
    require(port is None or 1 <= port <= 65535, "--master-port", port, "1 to 65535")
    for key, option in (("trainer.devices", "--gpus"), ("trainer.num_nodes", "--nodes")):
        given = _last(key, settings)
        require(given is None, f"--{key}", given, f"nothing beside --gpus or --nodes: {option}")
    config = find_config(name).absolute()
    folder = _last("trainer.default_root_dir", settings)
    if folder is None:
        folder = read_recipe(config).get("trainer", {}).get("default_root_dir", "runs/pretrain")
    kind = "processes, each with a GPU" if found else "CPU processes: there is no GPU here"
    print(f"{nodes} x {gpus} {kind}", flush=True)
    restarts = {}
    if _last("ckpt_path", settings) is None:  # a new run: a process that ends must not begin yet another one
        settings, restarts = ["--ckpt_path", "null", *settings], {"MAX_RESTARTS": "0"}
    address = options.master_addr
    if nodes > 1 and address is None:
        address = os.environ.get("MASTER_ADDR") or socket.gethostname()
        others = ["am-lightning", "fit", *words, "--master-addr", address]
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
    """The recipe, `NAME` or the first `--config`, and the words without it."""
    words = list(rest)
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    for position, word in enumerate(words):
        if word.startswith("--config="):
            return word.partition("=")[2], words[:position] + words[position + 1 :]
        if word == "--config" and position + 1 < len(words):
            return words[position + 1], words[:position] + words[position + 2 :]
    raise RecipeError(f"fit needs the NAME of a recipe, or a YAML. Usage: {_USAGE}")


def _last(key: str, words: Sequence[str]) -> str | None:
    """The value of a setting on the command line; the last wins."""
    found = None
    for position, word in enumerate(words):
        if word == f"--{key}":
            found = words[position + 1] if position + 1 < len(words) else ""
        elif word.startswith(f"--{key}="):
            found = word.partition("=")[2]
    return found


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def _short_help() -> str:
    """The options, and the usual settings with what base.yaml says of them."""
    lines = []
    explained = _comments((recipes_folder() / "configs" / "base.yaml").read_text(encoding="utf-8"))
    for key in _USUAL:
        shown = key.replace("init_args.", "")
        lines.append(f"  --{shown:<34} {explained[key]}")
    options = _parser().format_help().partition("options:\n")[2]
    return "\n".join(
        [
            f"usage: {_USAGE}",
            "",
            "Train a recipe (`list` shows them) or a YAML: in this process, or in those that --gpus and --nodes start.",
            "With --ckpt_path last a run is resumed, and the processes are started again when one of them dies.",
            "",
            options.rstrip(),
            "",
            "usual settings: (type, default where no recipe sets it) what it is",
            *lines,
            "",
            "fit --help all shows every setting.",
        ]
    )


def _comments(text: str) -> dict[str, str]:
    """Setting -> its comment in a YAML whose nesting is two spaces."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in text.splitlines():
        code, mark, comment = line.partition("  # ")
        if not code.strip() or code.lstrip().startswith("#"):
            continue
        depth = (len(code) - len(code.lstrip())) // 2
        above = [*above[:depth], code.strip().partition(":")[0]]
        if mark:
            found[".".join(above)] = comment.strip()
    return found
