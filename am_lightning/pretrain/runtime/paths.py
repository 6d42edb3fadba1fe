"""The recipes' files: the wheel holds a copy of the checkout's recipes/, an editable install reads the checkout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.suggestions import meant

_PACKAGE = Path(__file__).resolve().parents[2]
_PACKAGE_DATA = _PACKAGE / "recipes" / "files"  # made by the build, see pyproject.toml
_CHECKOUT = _PACKAGE.parent / "recipes"

BASE = re.compile(r"^# base: (\S+)$", re.MULTILINE)  # the first line of a YAML that holds only what differs from FILE


def recipes_folder() -> Path:
    """Return the folder with pretrain.py, configs/ and launch/.

    Raises:
        RecipeError: if the installation has none.
    """
    for folder in (_PACKAGE_DATA, _CHECKOUT):
        if (folder / "configs").is_dir():
            return folder
    raise RecipeError(f"this installation has no recipes: neither {_PACKAGE_DATA} nor {_CHECKOUT} holds configs/")


def recipe_files() -> dict[str, Path]:
    """Return the YAML of every recipe by its name, in order."""
    paths = sorted((recipes_folder() / "configs").glob("*.yaml"))
    return {path.stem: path for path in paths if path.stem != "base"}


def find_config(name_or_path: str) -> Path:
    """Return the YAML that a recipe's name or a path stands for.

    A file wins over a recipe of its name, and so does NAME.yaml in the working directory, an edited copy (`cp`).

    Raises:
        RecipeError: if there is neither a file nor a recipe of that name; the error lists the recipes.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    known = recipe_files()
    if name_or_path in known:
        copy = Path(f"{name_or_path}.yaml")
        return copy if copy.is_file() else known[name_or_path]
    names = f"{', '.join(known)}){meant(name_or_path, known, cutoff=0.6)}"
    raise RecipeError(f"config is {name_or_path!r}: no such file, and no recipe of that name ({names}")


def base_of(path: Path) -> Path | None:
    """Return the base of the YAML at `path`, which its line `# base: FILE` names, or None.

    Raises:
        RecipeError: if the base does not exist.
    """
    try:
        found = BASE.search(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return None  # the reader reports it
    if found is None:
        return None
    base = path.parent / found[1]
    if not base.is_file():
        raise RecipeError(
            f"{path} holds only what differs from {base}, which does not exist: "
            "am-lightning cp NAME DIR writes a whole recipe"
        )
    return base


def config_files(name_or_path: str) -> list[Path]:
    """Return the YAMLs of a configuration, the base first.

    Raises:
        RecipeError: if there is neither a file nor a recipe of that name.
    """
    files = [find_config(name_or_path)]
    while (base := base_of(files[0])) is not None:
        files.insert(0, base)
    return files


def with_paths(args: Sequence[str]) -> list[str]:
    """Return a command line whose `--config NAME` and `fit NAME` are replaced by paths, each after its base.

    Raises:
        RecipeError: if there is neither a file nor a recipe of a name.
    """
    result: list[str] = []
    for position, arg in enumerate(args):
        before = args[position - 1] if position else "-"
        if before in ("--config", "-c"):
            result.pop()
        elif arg.startswith("--config="):
            arg = arg.partition("=")[2]
        elif position != 1 or arg.startswith("-") or before.startswith("-"):
            result.append(arg)
            continue
        result += [f"--config={path}" for path in config_files(arg)]
    return result
