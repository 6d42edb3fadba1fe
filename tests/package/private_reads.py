"""Find by the syntax tree which private names of other packages this project reads.

A private name starts with an underscore and is no ``__dunder__``. Ours are the names that our own code defines: for
``self`` and ``cls`` anywhere in the project, for every other object in the same file.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.package.tree import PACKAGE, RECIPES, ROOT, sources

# These only look private: documented names, names of ours that another file of ours reads, or no attributes.
NOT_PRIVATE = {
    "_exit": "os._exit is documented",
    "_getframe": "sys._getframe is documented",
    "_replace": "a method of every namedtuple, documented",
    "_SubParsersAction": "argparse's; in an annotation, which nothing evaluates",
    "_asdict": "a method of every namedtuple, documented",
    "_fields": "an attribute of every namedtuple, documented",
    "_stats": "AdaptiveMemoryOptimizer's own, which clip and checkpointing read",
    "_workspace": "AdaptiveMemoryOptimizer's own, which clip reads",
    "_names_of_unnamed": "a key of ours in a pickle",
    "_sysconfigdata": "the start of a file's name",
    "_bias": "the end of a parameter's name",
    "_proj": "the end of a parameter's name",
}
_IN_TEXT = re.compile(r"(?<![A-Za-z0-9_])_[A-Za-z]\w*")


@dataclass(frozen=True)
class Read:
    """A place that reads a private name of another package.

    Attributes:
        file: path relative to the repository's root.
        at_import: whether the read happens, or names a module, when the file is imported.
    """

    file: str
    line: int
    name: str
    at_import: bool


def is_private(name: str) -> bool:
    return name.isidentifier() and name.startswith("_") and bool(name.strip("_")) and not name.endswith("__")


@cache
def trees() -> dict[str, ast.Module]:
    """Return relative path -> syntax tree of every file of the package and of the recipes."""
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sources(PACKAGE, RECIPES)}


@cache
def foreign_reads() -> list[Read]:
    """Return every read of a private name that is not ours."""
    return reads_in(trees())


def reads_in(files: dict[str, ast.Module]) -> list[Read]:
    everywhere = {
        name for file, tree in files.items() for name in {*_defined(tree), *Path(file).parts, Path(file).stem}
    }
    found = []
    for file, tree in files.items():
        here = {*_defined(tree), *NOT_PRIVATE}
        for node, at_import in _walk(tree, True):
            ours = everywhere | here if _is_of_self(node) else here
            names = [name for name in _private_names(node) if name not in ours]
            found += [Read(file, getattr(node, "lineno", 0), name, at_import) for name in names]
    return found


def mentions(tree: ast.Module) -> set[str]:
    """Return every name that a file reads, imports, defines or spells in a string, private or not."""
    found = set(_defined(tree))
    for node in ast.walk(tree):
        found.update(_names(node))
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found


def _walk(node: ast.AST, at_import: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if _is_docstring(child):
            continue
        yield child, at_import and not isinstance(child, ast.Constant)
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _walk(child, at_import and not inside)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_of_self(node: ast.AST) -> bool:
    if not isinstance(node, ast.Attribute):
        return False
    owner = node.value
    named = isinstance(owner, ast.Name) and owner.id in ("self", "cls")
    return named or (isinstance(owner, ast.Call) and ast.unparse(owner.func) == "super")


def _private_names(node: ast.AST) -> Iterable[str]:
    return filter(is_private, _names(node))


def _names(node: ast.AST) -> Iterable[str]:
    """Yield the names in one node: an attribute, the parts of an import, the identifier in a string of one word."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Import):
        return [part for alias in node.names for part in alias.name.split(".")]
    if isinstance(node, ast.ImportFrom):
        if node.level or (node.module or "").startswith("am_lightning"):
            return []
        return [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
        return [node.value, *_IN_TEXT.findall(node.value)]
    return []


def _defined(tree: ast.Module) -> Iterator[str]:
    """Return the names of functions, classes, variables, fields, and of attributes that ``self`` or ``cls`` gets."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_of_self(node):
            yield node.attr
