"""Where the recipes are: the wheel carries a copy of the checkout's recipes/, an editable install has the checkout."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError

_PACKAGE = Path(__file__).resolve().parents[2]
_PACKAGE_DATA = _PACKAGE / "recipes" / "files"  # made by the build, see pyproject.toml
_CHECKOUT = _PACKAGE.parent / "recipes"

BASE = re.compile(r"^# base: (\S+)$", re.MULTILINE)  # a YAML that says only what differs from another one beside it


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
    paths = sorted((recipes_folder() / "configs").glob("*.yaml"))
    return {path.stem: path for path in paths if path.stem != "base"}


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


def base_of(path: Path) -> Path | None:
    """The YAML that the one at `path` differs from: its line `# base: FILE`, None where it has none.

    Raises:
        RecipeError: it is not there.
    """
    try:
        found = BASE.search(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return None  # whoever reads it says so
    if found is None:
        return None
    base = path.parent / found[1]
    if not base.is_file():
        raise RecipeError(
            f"{path} says only what differs from {base}, which is not there: "
            "am-lightning cp NAME DIR writes a recipe out whole"
        )
    return base


def config_files(name_or_path: str) -> list[Path]:
    """The YAMLs that make up a configuration, the base first.

    Raises:
        RecipeError: a name or path that stands for nothing.
    """
    files = [find_config(name_or_path)]
    while (base := base_of(files[0])) is not None:
        files.insert(0, base)
    return files


def with_paths(args: Sequence[str]) -> list[str]:
    """A command line whose `--config NAME` and `fit NAME` are paths, each after its base.

    Raises:
        RecipeError: a name or path that stands for nothing.
    """
    result: list[str] = []
    for position, arg in enumerate(args):
        before = args[position - 1] if position else ""
        if before in ("--config", "-c"):
            result.pop()
            result += [f"--config={path}" for path in config_files(arg)]
        elif arg.startswith("--config="):
            result += [f"--config={path}" for path in config_files(arg.partition("=")[2])]
        elif position == 1 and not arg.startswith("-") and not before.startswith("-"):
            result += [f"--config={path}" for path in config_files(arg)]
        else:
            result.append(arg)
    return result
