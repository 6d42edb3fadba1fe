"""Make the token shards of a recipe before training: python prepare_data.py --config 60m --workers 16

--config takes a recipe's name or the path of a YAML, and a later --data.KEY VALUE wins, as in pretrain.py, which makes
missing shards itself. A call that was killed resumes where it stopped, and one that finds all shards does nothing.
--check reads every shard and compares its checksum. The shards do not depend on the number of workers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from am_lightning.pretrain.runtime.errors import RecipeError

if TYPE_CHECKING:
    from am_lightning.pretrain.data.shards import Index
    from am_lightning.pretrain.data.text_data import TextData


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` (default: sys.argv's); end the process with a message after a RecipeError."""
    try:
        prepare(sys.argv[1:] if args is None else args)
    except RecipeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes from here")


def prepare(args: list[str]) -> None:
    """Make or check the shards that the command line names, and print a summary.

    Raises:
        RecipeError: see TextData.
        SystemExit: after an unknown key, a wrong type, or --help.
    """
    from am_lightning.pretrain.data.text_data import TextData
    from am_lightning.pretrain.runtime.paths import with_paths

    words = [_section(word) if word.startswith("--config=") else word for word in with_paths(args)]
    options = _parser(TextData).parse_args(words)
    data = TextData(**options.data.as_dict())
    data.default_root_dir = options.root
    data.prepare_workers = options.workers or data.prepare_workers
    there = data.is_prepared()
    index = data.prepare(check_all=options.check)
    state = "complete, nothing to do" if there else "made"
    print(f"\n  {data.folder()}: {state}{', all checksums are right' if options.check else ''}\n")
    for name, text in _summary(data, index):
        print(f"  {name:<10} {text}")
    print(flush=True)


def _parser(data: type) -> Any:
    import jsonargparse

    parser: Any = jsonargparse.ArgumentParser(
        prog="prepare_data.py", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="a recipe's name, or the path of its YAML")
    parser.add_argument(
        "--workers", type=jsonargparse.typing.PositiveInt, default=None, help="processes; default: data.prepare_workers"
    )
    parser.add_argument("--check", action="store_true", help="also read all shards and compare their checksums")
    parser.add_argument("--root", type=str, default=".", help="the run's folder; default: the recipe's")
    parser.add_class_arguments(data, "data")
    parser.print_usage = lambda *_: None  # keeps errors short; --help shows the keys
    return parser


def _section(option: str) -> str:
    """Return the option --config=PATH with the recipe replaced by its settings of the data, as JSON."""
    from am_lightning.pretrain.runtime.settings import read_recipe

    path = Path(option.removeprefix("--config="))
    recipe = read_recipe(path)
    data, model, trainer = (recipe.get(name) or {} for name in ("data", "model", "trainer"))
    if not all(isinstance(section, dict) for section in (data, model, trainer)):
        raise RecipeError(f"{path} is not a recipe: data, model and trainer are sections")
    linked = {key: model[key] for key in ("seq_len", "vocab_size") if key in model}
    root = trainer.get("default_root_dir")
    return "--config=" + json.dumps({"data": {**linked, **data}, **({"root": root} if root else {})})


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
