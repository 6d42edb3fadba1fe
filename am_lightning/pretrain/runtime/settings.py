"""The settings of `fit`, without what takes seconds to import: their names, and a recipe's values.

    python -m am_lightning.pretrain.runtime.settings ARGUMENTS OF FIT    # exit status 2, and why, where a name is wrong

The parser of `fit` has the last word. It needs six seconds and, under a launcher, as many processes as there are GPUs.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from am_lightning.pretrain.runtime.errors import RecipeError, UsageError
from am_lightning.pretrain.runtime.paths import with_paths
from am_lightning.pretrain.runtime.recipe_text import recipe_text
from am_lightning.pretrain.runtime.suggestions import unknown_setting

_PRETRAIN = Path(__file__).resolve().parents[1]
# Section -> the file of its class and the class, whose arguments are the section's keys.
_SECTIONS = {
    "model": (_PRETRAIN / "model" / "lightning_module.py", "LlamaPretraining"),
    "data": (_PRETRAIN / "data" / "text_data.py", "TextData"),
    "checkpoint": (_PRETRAIN / "checkpoints" / "callback.py", "RunCheckpoint"),
    "fault_tolerance": (_PRETRAIN / "callbacks" / "fault_tolerance.py", "FaultTolerance"),
    "monitor": (_PRETRAIN / "callbacks" / "throughput.py", "TrainingMonitor"),
}
_PLAIN = {"config", "seed_everything", "threads", "progress_bar", "compare", "help", "print_config"}


def read_recipe(path: Path) -> dict[str, Any]:
    """The values in a recipe's YAML, over its base; without defaults and checks.

    Raises:
        RecipeError: it is no YAML of sections, or its base is not there.
    """
    import yaml

    try:
        values = yaml.safe_load(recipe_text(path))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a recipe: it has no sections")
    return values


def check_names(args: Sequence[str]) -> None:
    """Look for misspelt settings in the arguments of `fit` and in the YAMLs that they name.

    Args:
        args: the words after `fit`.

    Raises:
        UsageError: there is no setting of that name; says where it stands and which one was meant.
    """
    known = setting_names()
    for name, files in _given_names(args):
        if not _exists(name, known):
            raise UsageError(unknown_setting(name, _whole_names(known), files))


def _given_names(args: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Every name of a setting, and the word with its YAML where it stands in one."""
    import yaml

    for word in with_paths(["fit", *args])[1:]:
        if word.startswith("--config="):
            try:
                values = yaml.safe_load(Path(word.removeprefix("--config=")).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError, OSError):
                continue  # the parser says why
            for name in _names_in(values if isinstance(values, dict) else {}):
                yield name, [word]
        elif word.startswith("--") and word != "--":
            yield word[2:].partition("=")[0].rstrip("+"), []


def setting_names() -> dict[str, set[str] | None]:
    """Section -> the names of its settings, None where any may be; "" -> those that are in no section."""
    names: dict[str, set[str] | None] = {
        section: _arguments(path, name, "__init__") for section, (path, name) in _SECTIONS.items()
    }
    found = find_spec("lightning")
    home = next(iter(found.submodule_search_locations or ()), "") if found else ""
    trainer = Path(home, "pytorch", "trainer", "trainer.py")
    names["trainer"] = _arguments(trainer, "Trainer", "__init__")
    fit = _arguments(trainer, "Trainer", "fit")
    names[""] = None if fit is None else _PLAIN | fit - {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
    return names


def _arguments(path: Path, class_name: str, function: str) -> set[str] | None:
    """The arguments of a method, read from its source; None where it cannot be read, or takes others' (**options)."""
    if not path.is_file():
        return None
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == function and method.args.kwarg is None:
                    given = method.args
                    return {argument.arg for argument in [*given.args[1:], *given.kwonlyargs]}
    return None


def _names_in(values: Mapping[str, Any]) -> list[str]:
    sections = [(name, inner) for name, inner in values.items() if isinstance(inner, dict)]
    nested = [f"{name}.{key}" for name, inner in sections for key in inner]
    return [*(str(name) for name in values), *nested]


def _exists(name: str, known: Mapping[str, set[str] | None]) -> bool:
    section, dot, rest = name.partition(".")
    if not dot and section in known:
        return True
    names = known.get(section, set()) if dot else known[""]
    return names is None or (rest if dot else section).partition(".")[0] in names


def _whole_names(known: Mapping[str, set[str] | None]) -> list[str]:
    whole = [f"{section}.{key}" if section else key for section, keys in known.items() for key in sorted(keys or ())]
    optimizer = _arguments(_PRETRAIN.parent / "optim" / "adamw.py", "AMAdamW", "__init__") or ()
    return [*whole, *filter(None, known), *(f"model.optimizer.{key}" for key in sorted(optimizer))]


if __name__ == "__main__":
    try:
        check_names(sys.argv[1:])
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
