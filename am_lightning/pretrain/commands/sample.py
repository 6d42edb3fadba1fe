"""`sample`: let a run's model continue a prompt."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from am_lightning.pretrain.commands.arguments import add_run
from am_lightning.pretrain.runtime.errors import require

if TYPE_CHECKING:
    from am_lightning.pretrain.commands.trained_run import TrainedRun

_LONGEST = 256  # tokens, if a row has room for more
_COLDEST = 1e-6  # logits that are divided by a lower temperature may leave the range of float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sample`."""
    parser.description = "Let the model of a run continue a prompt. The options are those of transformers' generate."
    add_run(parser)
    parser.add_argument("--prompt", required=True, help="text to continue")
    new = f"length of the new text; default: what a row of training has room for, at most {_LONGEST}"
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help=new)
    temperature = "0 always takes the most likely token; default: %(default)s"
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help=temperature)
    top_k = "choose among the K most likely tokens, 0: among all; default: %(default)s"
    parser.add_argument("--top_k", type=int, default=50, metavar="K", help=top_k)
    top_p = "choose among the most likely tokens that together have probability P; default: %(default)s"
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help=top_p)
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="number of texts; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers; default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Print the texts, including the prompt."""
    _check(args)
    from am_lightning.pretrain.commands.trained_run import open_run

    found = open_run(args.path, args.tokenizer)
    print(f"checkpoint {found.checkpoint}", file=sys.stderr)
    for number, text in enumerate(_texts(found, args)):
        if args.num_samples > 1:
            print(f"--- {number + 1} of {args.num_samples}")
        # A young model may write control characters, and the terminal's encoding may lack letters.
        shown = "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
        encoding = sys.stdout.encoding or "utf-8"
        print(shown.encode(encoding, "replace").decode(encoding))
    return 0


def _check(args: argparse.Namespace) -> None:
    require(args.prompt != "", "--prompt", args.prompt, "a text that is not empty")
    new = args.max_new_tokens
    require(new is None or new >= 1, "--max_new_tokens", new, "a whole number >= 1")
    fits = args.temperature == 0 or _COLDEST <= args.temperature < math.inf
    require(fits, "--temperature", args.temperature, f"0, or value >= {_COLDEST:g}")
    require(args.top_k >= 0, "--top_k", args.top_k, "a whole number >= 0")
    require(0 < args.top_p <= 1, "--top_p", args.top_p, "0 < value <= 1")
    require(args.num_samples >= 1, "--num_samples", args.num_samples, "a whole number >= 1")
    allowed = "1 with --temperature 0, which always gives the same text"
    require(args.num_samples == 1 or args.temperature > 0, "--num_samples", args.num_samples, allowed)
    require(0 <= args.seed < 2**63, "--seed", args.seed, "0 <= whole number < 2**63")


def _texts(found: TrainedRun, args: argparse.Namespace) -> list[str]:
    import torch

    prompt = found.tokenizer(args.prompt, return_tensors="pt")
    room = found.shape.seq_len - prompt["input_ids"].shape[1]
    if args.max_new_tokens is None:
        allowed = f"fewer than {found.shape.seq_len} tokens, or give --max_new_tokens"
        require(room >= 1, "--prompt", args.prompt, allowed)
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
