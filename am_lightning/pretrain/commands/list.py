"""`list`: the recipes there are, one line each."""

from __future__ import annotations

import argparse
from typing import Any

from am_lightning.pretrain.model.shape import LlamaShape, count_parameters
from am_lightning.pretrain.runtime.paths import recipe_files
from am_lightning.pretrain.runtime.settings import read_recipe

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: `list` has no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the recipes, the smallest first."""
    files = recipe_files()
    recipes = {name: read_recipe(path) for name, path in files.items()}
    shapes = {name: LlamaShape.among(recipe["model"]) for name, recipe in recipes.items()}
    rows = [("NAME", "PARAMETERS", "TOKENS", "ROW", "STEPS", "STRATEGY", "")]
    for name in sorted(recipes, key=lambda name: count_parameters(shapes[name])):
        rows.append((name, *_columns(recipes[name], shapes[name]), _headline(files[name].read_text())))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]).rstrip())
    return 0


def _columns(recipe: dict[str, Any], shape: LlamaShape) -> tuple[str, str, str, str, str]:
    steps = recipe["trainer"]["max_steps"]
    return (
        short(count_parameters(shape)),
        short(steps * recipe["data"]["batch_size"] * shape.seq_len),
        str(shape.seq_len),
        str(steps),
        strategy_name(recipe["trainer"]["strategy"]),
    )


def short(number: float, gap: str = "") -> str:
    """Three digits and a unit, with a gap between: 58234880 -> "58.2M"."""
    for size, unit in _UNITS:
        if number >= size:
            return f"{number / size:.3g}{gap}{unit}"
    return f"{number:g}"


def strategy_name(strategy: Any) -> str:
    """ "auto", "ddp", or the class's name."""
    return str(strategy["class_path"] if isinstance(strategy, dict) else strategy).rpartition(".")[2]


def _headline(text: str) -> str:
    """The first sentence of the YAML's first comment."""
    first = text.splitlines()[0].removeprefix("#").strip() if text else ""
    return first.partition(". ")[0].rstrip(".:")
