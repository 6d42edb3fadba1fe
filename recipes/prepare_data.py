"""Make the token shards of a recipe before training: python prepare_data.py --config 60m --workers 16

It takes the YAMLs and the settings of pretrain.py (`pretrain.py fit --help`), which makes missing shards itself. A call
that was killed resumes where it stopped, and one that finds all shards does nothing. The shards do not depend on the
number of workers.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from am_lightning.pretrain.runtime.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from am_lightning.pretrain.data.shards import Index
    from am_lightning.pretrain.data.text_data import TextData


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` (default: sys.argv's); end the process with a message after a RecipeError."""
    try:
        prepare(sys.argv[1:] if args is None else args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except RecipeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes from here")


def prepare(args: list[str]) -> None:
    """Make or check the shards that the command line names, and print a summary.

    Raises:
        RecipeError: see TextData. UsageError: after an unknown key or a wrong type.
        SystemExit: after --help.
    """
    from am_lightning.pretrain.runtime.run_config import read_data

    parser = argparse.ArgumentParser(prog="prepare_data.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workers", type=int, metavar="N", help="number of processes, as --data.prepare_workers")
    parser.add_argument("--root", metavar="DIR", help="the run's folder, as --trainer.default_root_dir")
    parser.add_argument("--check", action="store_true", help="also read all shards and compare their checksums")
    options, settings = parser.parse_known_args(args)
    for key, value in (("data.prepare_workers", options.workers), ("trainer.default_root_dir", options.root)):
        settings += [f"--{key}={value}"] if value is not None else []
    data = read_data(settings)
    there = data.storage.is_complete()
    index = data.prepare(check_all=options.check)
    state = "complete, nothing to do" if there else "made"
    print(f"\n  {data.storage.folder()}: {state}{', all checksums are right' if options.check else ''}\n")
    for name, text in _summary(data, index):
        print(f"  {name:<10} {text}")
    print(flush=True)


def _summary(data: TextData, index: Index) -> list[tuple[str, str]]:
    def number(value: int) -> str:
        return f"{value:,}".replace(",", " ")

    train, val = (sum(shard.tokens for shard in shards) for shards in (index.train, index.val))
    lines = [
        ("documents", f"{number(index.documents['train'])} to train on, {number(index.documents['val'])} held out"),
        ("", f"of {index.source}"),
        ("tokens", f"{number(train)} to train on, {number(val)} held out"),
        ("tokenizer", f"{index.tokenizer}, {number(index.vocab_size)} tokens, {index.dtype}"),
        ("shards", f"{len(index.shards)} files, {index.bytes / 1e6:.1f} MB"),
    ]
    if data.mode == "shards":
        rows = train // data.seq_len
        steps = f"{number(rows // data.batch_size)} steps of {data.batch_size} rows in one pass"
        lines.append(("rows", f"{number(rows)} of {data.seq_len} tokens: {steps}"))
    return lines


if __name__ == "__main__":
    main()
