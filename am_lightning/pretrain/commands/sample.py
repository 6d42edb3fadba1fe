"""`sample`: text that a run's model writes behind a prompt."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from am_lightning.pretrain.commands.arguments import add_run
from am_lightning.pretrain.runtime.errors import require

if TYPE_CHECKING:
    from am_lightning.pretrain.commands.trained_run import TrainedRun

_LONGEST = 256  # tokens, where a row has room for more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sample`."""
    parser.description = "Let the model of a run continue a prompt. The options are those of transformers' generate."
    add_run(parser)
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument(
        "--max_new_tokens", type=int, help=f"default: as many as a row has room for, at most {_LONGEST}"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token; default: 1")
    parser.add_argument(
        "--top_k", type=int, default=50, help="choose among so many of the likeliest; 0: all; default: 50"
    )
    parser.add_argument("--top_p", type=float, default=1.0, help="and among those of this share; default: 1")
    parser.add_argument("--num_samples", type=int, default=1, help="how many texts; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers; default: 0")


def run(args: argparse.Namespace) -> int:
    """Print the texts, prompt and all.

    Raises:
        RecipeError: an option is out of range, or see open_run.
    """
    _check(args)
    from am_lightning.pretrain.commands.trained_run import open_run

    found = open_run(args.name, args.tokenizer)
    print(f"checkpoint {found.checkpoint}", file=sys.stderr)
    for number, text in enumerate(_texts(found, args)):
        if args.num_samples > 1:
            print(f"--- {number + 1} of {args.num_samples}")
        # What a terminal would obey, a young model may write; and its encoding may not have all letters.
        shown = "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
        encoding = sys.stdout.encoding or "utf-8"
        print(shown.encode(encoding, "replace").decode(encoding))
    return 0


def _check(args: argparse.Namespace) -> None:
    require(args.prompt != "", "--prompt", args.prompt, "a text of one letter or more")
    new = args.max_new_tokens
    require(new is None or new >= 1, "--max_new_tokens", new, "a whole number >= 1")
    require(0 <= args.temperature < math.inf, "--temperature", args.temperature, "0 <= value")
    require(args.top_k >= 0, "--top_k", args.top_k, "a whole number >= 0")
    require(0 < args.top_p <= 1, "--top_p", args.top_p, "0 < value <= 1")
    require(args.num_samples >= 1, "--num_samples", args.num_samples, "a whole number >= 1")
    require(0 <= args.seed < 2**63, "--seed", args.seed, "0 <= whole number < 2**63")


def _texts(found: TrainedRun, args: argparse.Namespace) -> list[str]:
    import torch

    prompt = found.tokenizer(args.prompt, return_tensors="pt")
    room = found.shape.seq_len - prompt["input_ids"].shape[1]
    if args.max_new_tokens is None:
        require(
            room >= 1, "--prompt", args.prompt, f"fewer than {found.shape.seq_len} tokens, or give --max_new_tokens"
        )
    elif args.max_new_tokens > room:
        print(f"note: the model was trained on rows of {found.shape.seq_len} tokens", file=sys.stderr)
    options: dict[str, Any] = {"do_sample": args.temperature > 0}
    if args.temperature > 0:
        options |= {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model: Any = found.model()
    torch.manual_seed(args.seed)
    written = model.to(device).generate(
        **prompt.to(device),
        **options,
        max_new_tokens=args.max_new_tokens or min(room, _LONGEST),
        num_return_sequences=args.num_samples,
    )
    texts: list[str] = found.tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts
