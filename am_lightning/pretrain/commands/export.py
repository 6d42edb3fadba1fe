"""`export`: write a run's model as a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

from am_lightning.pretrain.commands.arguments import add_run
from am_lightning.pretrain.runtime.atomic_files import renaming, sync_folder
from am_lightning.pretrain.runtime.errors import RecipeError

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_HINT = "Free some space, or choose another DIR."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    parser.description = "Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load."
    add_run(parser)
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder to write; it must not exist yet, or be empty")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="dtype of the weights; auto: the checkpoint's")


def run(args: argparse.Namespace) -> int:
    """Write the folder as a whole or not at all, and print what it holds."""
    folder = args.folder.expanduser().absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RecipeError(f"DIR is {str(args.folder)!r}, which exists already; allowed: a new folder, or an empty one")
    import torch

    from am_lightning.pretrain.checkpoints.manifest import sync_files
    from am_lightning.pretrain.commands.trained_run import open_run

    found = open_run(args.path, args.tokenizer)
    model = found.model()
    if args.dtype != "auto":
        model = model.to(getattr(torch, args.dtype))
    with renaming(folder, _HINT, "DIR") as part, redirect_stdout(sys.stderr):  # transformers imports DeepSpeed
        part.mkdir()
        model.save_pretrained(part)
        found.tokenizer.save_pretrained(part)
        for file in part.iterdir():
            file.chmod((part / "config.json").stat().st_mode)  # safetensors makes files that only their owner can read
        sync_files(part)
        sync_folder(part)
    parameters = f"{sum(param.numel() for param in model.parameters()):,}".replace(",", " ")
    print(f"  checkpoint  {found.checkpoint}")
    print(f"  model       {parameters} parameters, {str(model.dtype).removeprefix('torch.')}")
    print(f"  tokenizer   {len(found.tokenizer)} tokens")
    print(f'  folder      {folder}: AutoModelForCausalLM.from_pretrained("{folder}")')
    return 0
