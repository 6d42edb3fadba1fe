"""The names and values of the settings of `fit`, without imports that take seconds.

    python -m am_lightning.pretrain.runtime.settings ARGUMENTS OF FIT    # exit status 2, and why, if a name is wrong

The parser of `fit` decides in the end. It needs six seconds and, under a launcher, as many processes as there are GPUs.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from am_lightning.pretrain.runtime.errors import UsageError
from am_lightning.pretrain.runtime.main import command_line
from am_lightning.pretrain.runtime.paths import read_values, with_bases, with_paths
from am_lightning.pretrain.runtime.suggestions import unknown_setting

_PRETRAIN = Path(__file__).resolve().parents[1]
# Section -> the file of its class and the class, whose arguments are the section's keys.
_SECTIONS = {
    "model": (_PRETRAIN / "model" / "lightning_module.py", "LlamaPretraining"),
    "data": (_PRETRAIN / "data" / "text_data.py", "TextData"),
    "checkpoint": (_PRETRAIN / "checkpoints" / "callback.py", "RunCheckpoint"),
    "fault_tolerance": (_PRETRAIN / "callbacks" / "fault_tolerance.py", "FaultTolerance"),
    "monitor": (_PRETRAIN / "callbacks" / "throughput.py", "TrainingMonitor"),
    "model.optimizer": (_PRETRAIN.parent / "optim" / "adamw.py", "AMAdamW"),  # any other class is possible
}
_PLAIN = {"config", "seed_everything", "threads", "progress_bar", "compare", "help", "print_config"}


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the values of a recipe's YAML over its base, without defaults and checks.

    Raises:
        RecipeError: if it is not a YAML of sections, or its base does not exist.
    """
    return functools.reduce(_merged, map(read_values, with_bases(path)))


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Merge sections and the arguments of classes, and replace any other value, as the parser does."""
    for key, value in values.items():
        old = base.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merges = both and (key in (*_SECTIONS, "trainer", "init_args") or "init_args" in old)
        base[key] = _merged(old, value) if merges else value
    return base


def saved_config(folder: Path) -> dict[str, Any]:
    """Return the resolved configuration that the run in `folder` saved, or {} if it saved none.

    Raises:
        RecipeError: if the file is not a YAML of sections.
    """
    files = (place / "config.yaml" for place in (folder / "logs", folder))
    return next((read_recipe(path) for path in files if path.is_file()), {})


def check_names(args: Sequence[str]) -> None:
    """Look for misspelt settings in the arguments of `fit` and in the YAMLs that they name.

    Args:
        args: the command line after `fit`.

    Raises:
        UsageError: if there is no setting of a name; tells where it stands and which setting was probably meant.
    """
    known = setting_names()
    for name, files in _given_names(args):
        if known and ".".join(name.split(".")[:2]) not in known:
            raise UsageError(unknown_setting(name, sorted(known), files))


def _given_names(args: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield every name of a setting, with the argument that names its YAML if it stands in one."""
    for word in with_paths(["fit", *args])[1:]:
        if word.startswith("--config="):
            for name, inner in read_values(Path(word.removeprefix("--config="))).items():
                yield str(name), [word]
                yield from ((f"{name}.{key}", [word]) for key in (inner if isinstance(inner, dict) else ()))
        elif word.startswith("--") and word != "--":
            yield word[2:].partition("=")[0].rstrip("+"), []


def setting_names() -> set[str]:
    """Return the names of the settings and of their sections: "trainer", "trainer.max_steps", "ckpt_path", ...

    The set is empty if Lightning is not installed.
    """
    found = find_spec("lightning")
    if found is None or not found.submodule_search_locations:
        return set()
    trainer = Path(found.submodule_search_locations[0], "pytorch", "trainer", "trainer.py")
    sections = {"trainer": (trainer, "Trainer"), **_SECTIONS}
    inside = {f"{section}.{key}" for section, (path, name) in sections.items() for key in _arguments(path, name)}
    fit = _arguments(trainer, "Trainer", "fit") - {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
    return {*_PLAIN, *fit, *sections, *inside}


def _arguments(path: Path, class_name: str, function: str = "__init__") -> set[str]:
    """Return the arguments of a method, read from its source."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == function:
                    return {argument.arg for argument in [*method.args.args[1:], *method.args.kwonlyargs]}
    return set()


if __name__ == "__main__":
    with command_line(imports=False):
        check_names(sys.argv[1:])
