"""`cp`: an editable copy of a recipe with the programs that it runs with."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.paths import find_config, recipe_files, recipes_folder
from am_lightning.pretrain.runtime.recipe_text import recipe_text

# Of recipes/: those of the checkout alone, and what tools leave.
_STAYS = {"configs", "quickstart.sh", "quickstart.py", "env.sh", "gpu", "studies", "runs", "__pycache__"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cp`."""
    parser.add_argument("name", metavar="NAME", help="name of the recipe; `list` shows them")
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder for the copy; it is made if it does not exist")
    parser.add_argument("--force", action="store_true", help="overwrite files that differ")


def run(args: argparse.Namespace) -> int:
    """Copy the recipe and print how to train it; see `copy_recipe` for the errors."""
    copy_recipe(args.name, args.folder, force=args.force)
    print(f"copied {args.name} and its programs. To train:\n")
    print(f"  cd {args.folder}\n  python pretrain.py fit --config {args.name}.yaml")
    print(f"  CONFIG={args.name}.yaml launch/torchrun.sh    # several processes; sizes in launch/cluster.env\n")
    return 0


def copy_recipe(name: str, folder: Path, *, force: bool = False) -> None:
    """Put `NAME.yaml`, written out whole, the programs, `configs/` of engines and `launch/` into `folder`.

    With `force` a link in the place of a file is replaced: what it points to stays as it is.

    Raises:
        RecipeError: there is no such recipe, a file is there already and differs, or a folder in `folder` is a link;
            then nothing is written.
    """
    if name not in recipe_files():
        find_config(name)  # raises, with the names, unless it is a file
        raise RecipeError(f"NAME is {name!r}, a file: cp copies recipes by name ({', '.join(recipe_files())})")
    recipe, text = folder / f"{name}.yaml", recipe_text(recipe_files()[name]).encode()
    pairs = list(_pairs(folder))
    parents = sorted({parent for _, target in pairs for parent in target.relative_to(folder).parents})
    if linked := [folder / parent for parent in parents[1:] if (folder / parent).is_symlink()]:
        raise RecipeError(f"{linked[0]} is a link, and cp writes only into DIR: remove it, or use another DIR")
    differing = [recipe] if _differs(recipe, text) else []
    differing += [target for source, target in pairs if _differs(target, source.read_bytes())]
    if differing and not force:
        shown = ", ".join(map(str, differing[:3])) + (", ..." if len(differing) > 3 else "")
        raise RecipeError(f"{shown}: there already, and other than the recipe's. Use another DIR, or --force")
    for source, target in pairs:
        target.parent.mkdir(parents=True, exist_ok=True)
        _unlink(target)
        shutil.copy(source, target)
    _unlink(recipe)
    recipe.write_bytes(text)


def _pairs(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Every file of the programs, and its place in the copy."""
    root = recipes_folder()
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        engine = relative.parts[0] == "configs" and len(relative.parts) > 2
        if path.is_file() and "__pycache__" not in relative.parts and (engine or relative.parts[0] not in _STAYS):
            yield path, folder / relative


def _differs(path: Path, content: bytes) -> bool:
    """Whether something else is there; a link always is, since a write would go to what it points to."""
    if path.is_symlink():
        return True
    return path.exists() and not (path.is_file() and path.read_bytes() == content)


def _unlink(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
