"""The names, plain types and values of the settings of `fit`, without imports that take seconds.

    python -m am_lightning.pretrain.runtime.settings ARGUMENTS OF FIT    # an error if a name or a value is wrong

The parser of `fit` decides in the end. It needs six seconds and, under a launcher, as many processes as there are GPUs.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from am_lightning.pretrain.runtime.errors import RecipeError, UsageError
from am_lightning.pretrain.runtime.paths import read_values, with_bases, with_paths
from am_lightning.pretrain.runtime.suggestions import meant, place

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
_PLAIN = {"config": "", "seed_everything": "bool | int", "threads": "int | None", "progress_bar": "", "compare": "bool"}
_PLAIN |= {"help": "", "print_config": "", "verbose": ""}  # the last one is for `validate`
_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "null": ()}


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the values of a recipe's YAML over its base, without defaults and checks.

    Raises:
        RecipeError: if it is not a YAML of sections, or its base does not exist.
    """
    return functools.reduce(_merged, map(read_values, with_bases(path)))


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Merge sections and the arguments of classes, and replace any other value, as the parser does."""
    for key, value in values.items():
        old: Any = base.get(key)
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


def check_settings(args: Sequence[str]) -> None:
    """Look for misspelt settings, and for values of a wrong type, in the arguments of `fit` and the YAMLs they name.

    Args:
        args: the command line after `fit`.

    Raises:
        UsageError: if there is no setting of a name, or its value is not of its type; tells where it stands and which
            setting was probably meant, or what is allowed.
    """
    known = setting_types()
    for name, value, files in _given(args):
        key = ".".join(name.split(".")[:2])
        if known and key not in known:
            raise UsageError(f"there is no setting {name}{meant(name, sorted(known))}{place(name, files)}")
        if wrong := wrong_type(value, known.get(name, "")):
            raise UsageError(f"{name} is {wrong}{place(name, files)}")


def wrong_type(value: Any, annotation: str) -> str:
    """Return the value and what is allowed, or "" if the parser may accept it: it decides about all other types."""
    names = re.findall(r"\w+", re.sub("Optional|None", "null", annotation.replace("Union", "")))
    found = value
    if isinstance(value, str):  # the parser reads a text as YAML, with more numbers than PyYAML knows, such as 1e3
        import yaml

        with contextlib.suppress(yaml.YAMLError, TypeError, ValueError):
            found = yaml.safe_load(value)
            found = float(found) if isinstance(found, str) else found
    allowed = {kind for name in names for kind in _TYPES.get(name, (type(found),))}
    fits = found is None or not names or type(found) in allowed
    return "" if fits else f"{value!r}; allowed: {' or '.join(names)}"


def _given(args: Sequence[str]) -> Iterator[tuple[str, Any, list[str]]]:
    """Yield the name and the value of every setting, with the argument that names its YAML if it stands in one."""
    words = with_paths(["fit", *args])[1:]
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        if word.startswith("--config="):
            for name, inner in read_values(Path(word.removeprefix("--config="))).items():
                yield str(name), inner, [word]
                yield from ((f"{name}.{key}", inner[key], [word]) for key in (inner if isinstance(inner, dict) else ()))
        elif word.startswith("--") and word != "--":
            name, given, value = word[2:].partition("=")
            yield name.rstrip("+"), value if given else None if following.startswith("--") else following, []


@functools.cache  # the command and the parser of `fit` both ask for them
def setting_types() -> dict[str, str]:
    """Return the settings and sections, such as "trainer.max_steps", and the annotation of each in the source, or "".

    There are none if Lightning is not installed.
    """
    found = find_spec("lightning")
    if found is None or not found.submodule_search_locations:
        return {}
    trainer = Path(found.submodule_search_locations[0], "pytorch", "trainer", "trainer.py")
    sections = {"trainer": (trainer, "Trainer"), **_SECTIONS}
    inside = {f"{name}.{key}": kind for name, where in sections.items() for key, kind in _arguments(*where).items()}
    others = ("train_dataloaders", "val_dataloaders", "datamodule")
    fit = {name: kind for name, kind in _arguments(trainer, "Trainer", "fit").items() if name not in others}
    inside |= {name: "" for name in inside if name.startswith("model.optimizer.")}  # another class has other types
    return {**_PLAIN, **fit, **dict.fromkeys(sections, ""), **inside}


def _arguments(path: Path, class_name: str, function: str = "__init__") -> dict[str, str]:
    """Return the arguments of a method and their annotations, read from its source."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == function:
                    found = [*method.args.args[1:], *method.args.kwonlyargs]
                    return {each.arg: ast.unparse(each.annotation) if each.annotation else "" for each in found}
    return {}


if __name__ == "__main__":
    try:
        check_settings(sys.argv[1:])
    except RecipeError as error:
        sys.exit(f"error: {error}")
