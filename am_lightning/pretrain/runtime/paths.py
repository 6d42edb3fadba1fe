"""The recipes' files: the wheel holds a copy of the checkout's recipes/, an editable install reads the checkout."""

from __future__ import annotations

import codecs
import locale
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from am_lightning.pretrain.runtime.errors import RecipeError, UsageError
from am_lightning.pretrain.runtime.suggestions import meant

_PACKAGE = Path(__file__).resolve().parents[2]
_PACKAGE_DATA = _PACKAGE / "recipes" / "files"  # made by the build, see pyproject.toml
_CHECKOUT = _PACKAGE.parent / "recipes"

BASE = re.compile(r"^# base: (\S+)$", re.MULTILINE)  # the first line of a YAML that holds only what differs from FILE

_SECTIONS = ("model", "data", "trainer", "checkpoint", "fault_tolerance", "monitor")  # the sections of a recipe
_SECTIONED = f"sections ({', '.join(_SECTIONS)}) with settings of the form `KEY: VALUE`"


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


def read_text(path: Path) -> str:
    """Return the text of a YAML.

    Raises:
        RecipeError: if it is not UTF-8, or if jsonargparse, which uses the locale's encoding, would misread it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a recipe: its bytes are not UTF-8 text ({error.reason})") from None
    encoding = locale.getpreferredencoding(False)
    if not text.isascii() and codecs.lookup(encoding).name != "utf-8":
        raise RecipeError(f"{path} has letters that this locale ({encoding}) would misread; set LC_ALL=C.UTF-8")
    return text


def with_bases(path: Path) -> list[Path]:
    """Return the YAML at `path` after its base, which its line `# base: FILE` names, and the bases of that one.

    Raises:
        RecipeError: if a base does not exist, or is based on `path` itself.
    """
    files = [path]
    while (found := BASE.search(read_text(files[0]))) is not None:
        base = files[0].parent / found[1]
        if not base.is_file():
            raise RecipeError(
                f"{files[0]} holds only what differs from {base}, which does not exist: "
                "am-lightning cp NAME DIR writes a whole recipe"
            )
        if any(base.samefile(file) for file in files):
            circle = " -> ".join(map(str, [*reversed(files), base]))
            raise RecipeError(f"the lines `# base: FILE` of these files form a circle: {circle}")
        files.insert(0, base)
    return files


def read_values(path: Path) -> dict[str, Any]:
    """Return what a YAML sets, without its base.

    Raises:
        RecipeError: if it is not a YAML of sections.
    """
    import yaml

    text = read_text(path)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if values is None and BASE.search(text):
        return {}
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UsageError(f"{path} is not a recipe: it holds {found}; allowed: {_SECTIONED}")
    for name in _SECTIONS:
        if not isinstance(values.get(name), dict | str | None):  # a text is the path of the section's YAML
            raise UsageError(f"{path}: {name} is {values[name]!r}; allowed: settings of the form `KEY: VALUE` below it")
    return values


def with_paths(args: Sequence[str]) -> list[str]:
    """Return a command line whose `--config NAME` and `fit NAME` are replaced by paths, each after its base.

    Raises:
        RecipeError: if there is neither a file nor a recipe of a name, or a file is not a YAML of sections.
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
        files = with_bases(find_config(arg))
        result += [f"--config={path}" for path in files if read_values(path)] or [f"--config={files[-1]}"]
    return result
