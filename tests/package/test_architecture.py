"""The house of floors: imports go down only, the optimizer core knows torch alone, nothing grows beyond a screen."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.package.tree import PACKAGE, RECIPES, module_name, sources

# Longest prefix wins. A module may import from its own floor and from those below.
FLOORS = {
    "am_lightning.distributed": 1,
    "am_lightning.optim": 2,
    "am_lightning.loggers": 3,
    "am_lightning.lightning": 4,
    "am_lightning.huggingface": 4,
    "am_lightning.deepspeed": 4,
    "am_lightning.clients": 4,
    "am_lightning.bench": 5,
    "am_lightning.pretrain": 5,
    "am_lightning.recipes": 5,
    "am_lightning": 5,
}
CORE = 3  # this floor and those below import torch and the standard library only
ADAPTERS = {
    "am_lightning.lightning.compat": {"lightning_utilities"},  # and whichever of the names is there
    "am_lightning.huggingface.accelerate": {"accelerate"},
    "am_lightning.huggingface.trainer": {"accelerate", "transformers"},
    "am_lightning.deepspeed.engine": {"deepspeed"},
    "am_lightning.clients.timm": {"timm"},
    "am_lightning.clients.torchtitan": {"torchtitan"},
    "am_lightning.optim.kernels.triton.kernels": {"triton"},
    "am_lightning.optim.kernels.triton.row_kernels": {"triton"},
}


def _prefix(module: str, table: dict[str, object]) -> str | None:
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in table and (name != "am_lightning" or module == name)), None)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _imports(path: Path, *, local: bool) -> Iterator[tuple[str, int]]:
    """(module, line) of the imports that run; with ``local`` also those inside functions."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if _is_type_checking(child):
                continue
            if not local and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            yield child
            yield from walk(child)

    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package) if node.level else base
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in MODULES else base), node.lineno


PATHS = {module_name(path): path for path in sources(PACKAGE)}
MODULES = set(PATHS)


def test_every_module_has_a_floor() -> None:
    assert {module for module in MODULES if _prefix(module, FLOORS) is None} == set()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_only(module: str) -> None:
    floor = FLOORS[_prefix(module, FLOORS)]
    for name, line in _imports(PATHS[module], local=True):
        if name.partition(".")[0] != "am_lightning":
            continue
        assert name in MODULES, f"{module}:{line} imports {name}, which is not a module here"
        assert FLOORS[_prefix(name, FLOORS)] <= floor, f"{module}:{line} imports {name} from a floor above"
        assert name != "am_lightning" or floor >= CORE + 2, f"{module}:{line} imports the package's face from inside"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_third_party_imports(module: str) -> None:
    """The core: torch alone. An adapter: torch and what it serves."""
    prefix = _prefix(module, FLOORS)
    if FLOORS[prefix] > CORE + 1:
        pytest.skip("the top floor may use anything, inside what needs it")
    allowed = {"torch", "am_lightning", *sys.stdlib_module_names} | ADAPTERS.get(_prefix(module, ADAPTERS), set())
    for name, line in _imports(PATHS[module], local=True):
        assert name.partition(".")[0] in allowed, f"{module}:{line} imports {name}"


def test_no_import_cycles() -> None:
    graph = {
        module: {name for name, _ in _imports(path, local=False) if name in MODULES and name != module}
        for module, path in PATHS.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows the cycle


STRATEGIES = "am_lightning.distributed.strategies"
NAMES_A_STRATEGY = {"am_lightning.optim.base"}  # to go


def test_nothing_above_the_strategies_names_one() -> None:
    """A new strategy is one file there and one line in its table; adapters of a framework may know its own."""
    found = {
        module
        for module, path in PATHS.items()
        if FLOORS[_prefix(module, FLOORS)] <= CORE and not f"{module}.".startswith(f"{STRATEGIES}.")
        for name, _ in _imports(path, local=True)
        if name.startswith(f"{STRATEGIES}.")
    }
    assert found == NAMES_A_STRATEGY


@pytest.mark.parametrize("path", sources(PACKAGE, RECIPES), ids=lambda path: path.name)
def test_sizes(path: Path) -> None:
    """Files of at most 400 lines, functions of at most 60."""
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            code_starts = node.body[1].lineno if _has_docstring(node) and len(node.body) > 1 else node.lineno
            assert node.end_lineno - code_starts < 60, f"{path.name}:{node.lineno} {node.name} is longer than a screen"


def _has_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return ast.get_docstring(node, clean=False) is not None
