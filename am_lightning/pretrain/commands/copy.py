"""`cp`: an editable copy of a recipe with the programs that it runs with."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError, require
from am_lightning.pretrain.runtime.paths import find_config, recipe_files, recipes_folder
from am_lightning.pretrain.runtime.recipe_text import recipe_text

# Entries of recipes/ that are not copied: what only a checkout uses, and leftovers of tools.
_STAYS = {"configs", "quickstart.sh", "quickstart.py", "env.sh", "gpu", "studies", "runs", "__pycache__"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cp`."""
    parser.add_argument("name", metavar="NAME", help="name of the recipe; `list` shows them")
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder for the copy; it is made if it does not exist")
    parser.add_argument("--force", action="store_true", help="overwrite files that differ")


def run(args: argparse.Namespace) -> int:
    """Write `NAME.yaml` as a whole, the programs, `configs/` of engines and `launch/` into DIR.

    With --force a link in place of a file is replaced, and what it points to stays as it is.

    Raises:
        RecipeError: if there is no such recipe, a file exists and differs, a folder in DIR is a link, or DIR or a
            folder in it is a file. Nothing is written then.
    """
    name, folder, recipes = args.name, args.folder, recipe_files()
    if name not in recipes:
        find_config(name)  # raises, with the names, unless it is a file
        raise RecipeError(f"NAME is {name!r}, a file: cp copies recipes by name ({', '.join(recipes)})")
    sources = {folder / f"{name}.yaml": recipes[name], **dict(_programs(folder))}
    parents = sorted({parent for target in sources for parent in target.relative_to(folder).parents})
    if linked := [folder / parent for parent in parents[1:] if (folder / parent).is_symlink()]:
        raise RecipeError(f"{linked[0]} is a link, and cp writes only into DIR: remove it, or use another DIR")
    for path in (*folder.parents, *(folder / parent for parent in parents)):
        require(path.is_dir() or not path.exists(), "DIR", str(folder), f"a folder ({path} is a file)")
    contents = {target: source.read_bytes() for target, source in sources.items()}
    contents[folder / f"{name}.yaml"] = recipe_text(recipes[name]).encode()
    differing = [target for target, content in contents.items() if _differs(target, content)]
    if differing and not args.force:
        shown = ", ".join(map(str, differing[:3])) + (", ..." if len(differing) > 3 else "")
        raise RecipeError(f"{shown}: exists already and differs from the recipe's. Use another DIR, or --force")
    for target, content in contents.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink():
            target.unlink()
        target.write_bytes(content)
        target.chmod(sources[target].stat().st_mode | 0o200)  # to be edited
    print(f"copied {name} and its programs. To train:\n")
    print(f"  cd {folder}\n  python pretrain.py fit --config {name}.yaml")
    print(f"  CONFIG={name}.yaml launch/torchrun.sh    # several processes; sizes in launch/cluster.env\n")
    return 0


def _programs(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the place in the copy and the source of every file of the programs."""
    root = recipes_folder()
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        engine = relative.parts[0] == "configs" and len(relative.parts) > 2
        if path.is_file() and "__pycache__" not in relative.parts and (engine or relative.parts[0] not in _STAYS):
            yield folder / relative, path


def _differs(path: Path, content: bytes) -> bool:
    """Return whether something else is at `path`. A link always counts: a write would go to what it points to."""
    return path.is_symlink() or (path.exists() and not (path.is_file() and path.read_bytes() == content))
