"""`list`: all recipes, one line each."""

from __future__ import annotations

import argparse
from typing import Any

from am_lightning.pretrain.model.shape import LlamaShape, count_parameters
from am_lightning.pretrain.runtime.paths import recipe_files
from am_lightning.pretrain.runtime.settings import read_recipe

_UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3, "": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: `list` has no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the recipes, the smallest first."""
    rows = []
    for name, path in recipe_files().items():
        recipe = read_recipe(path)
        shape, trainer = LlamaShape.among(recipe["model"]), recipe["trainer"]
        parameters, steps = count_parameters(shape), trainer["max_steps"]
        tokens = short(steps * recipe["data"]["batch_size"] * shape.seq_len)
        columns = (name, short(parameters), tokens, str(shape.seq_len), str(steps), strategy_name(trainer["strategy"]))
        rows.append((parameters, columns, _headline(path.read_text())))
    heads = ("NAME", "PARAMETERS", "TOKENS", "ROW", "STEPS", "STRATEGY")
    table = [(heads, ""), *((columns, headline) for _, columns, headline in sorted(rows))]
    widths = [max(map(len, column)) for column in zip(*(columns for columns, _ in table), strict=True)]
    for columns, headline in table:
        cells = [cell.ljust(width) for cell, width in zip(columns, widths, strict=True)]
        print("  ".join([*cells, headline]).rstrip())
    return 0


def short(number: float, gap: str = "") -> str:
    """Return three digits and a unit, with a gap between them: "58.2M" for 58234880."""
    return scaled(number, _UNITS, gap)


def scaled(value: float, units: dict[str, float], gap: str = " ") -> str:
    """Return three digits and the first unit, from the largest on, that the value reaches, or else the last one."""
    unit = next((unit for unit, size in units.items() if value >= size), list(units)[-1])
    return f"{value / units[unit]:.3g}{gap}{unit}".rstrip()


def strategy_name(strategy: Any) -> str:
    """Return the name of a strategy or of its class, such as "auto", "ddp" or "FSDPStrategy"."""
    return str(strategy["class_path"] if isinstance(strategy, dict) else strategy).rpartition(".")[2]


def _headline(text: str) -> str:
    """Return the first sentence of the YAML's first comment."""
    first = text.splitlines()[0].removeprefix("#").strip() if text else ""
    return first.partition(". ")[0].rstrip(".:")
