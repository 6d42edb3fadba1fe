"""Where the recipes are: the wheel carries a copy of the checkout's recipes/, an editable install has the checkout."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError

_PACKAGE = Path(__file__).resolve().parents[2]
_PACKAGE_DATA = _PACKAGE / "recipes" / "files"  # made by the build, see pyproject.toml
_CHECKOUT = _PACKAGE.parent / "recipes"


def recipes_folder() -> Path:
    """The folder with pretrain.py, configs/ and launch/.

    Raises:
        RecipeError: the installation has none.
    """
    for folder in (_PACKAGE_DATA, _CHECKOUT):
        if (folder / "configs").is_dir():
            return folder
    raise RecipeError(f"this installation has no recipes: neither {_PACKAGE_DATA} nor {_CHECKOUT} holds configs/")


def recipe_files() -> dict[str, Path]:
    """Name -> YAML of every recipe, by name."""
    return {path.stem: path for path in sorted((recipes_folder() / "configs").glob("*.yaml"))}


def find_config(name_or_path: str) -> Path:
    """The YAML that a name of a recipe, or a path, stands for. A file that is there wins over a recipe of its name,
    and so does NAME.yaml in the working directory: an edited copy (`cp`) is meant by its name.

    Raises:
        RecipeError: neither; the text names the recipes.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    known = recipe_files()
    copy = Path(f"{name_or_path}.yaml")
    if name_or_path in known and copy.is_file():
        return copy
    if name_or_path in known:
        return known[name_or_path]
    near = difflib.get_close_matches(name_or_path, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise RecipeError(
        f"config is {name_or_path!r}: no such file, and no recipe of that name ({', '.join(known)}).{hint}"
    )


def with_paths(args: Sequence[str]) -> list[str]:
    """A command line whose `--config NAME` and `fit NAME` are paths.

    Raises:
        RecipeError: a name or path that stands for nothing.
    """
    result: list[str] = []
    for position, arg in enumerate(args):
        before = args[position - 1] if position else ""
        if before in ("--config", "-c"):
            result.append(str(find_config(arg)))
        elif arg.startswith("--config="):
            result.append(f"--config={find_config(arg.partition('=')[2])}")
        elif position == 1 and not arg.startswith("-") and not before.startswith("-"):
            result += ["--config", str(find_config(arg))]
        else:
            result.append(arg)
    return result
