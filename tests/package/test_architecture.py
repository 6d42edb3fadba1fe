"""The floors of the design: imports go down only, without a circle; the core imports torch alone; sizes are limited.

An import counts wherever it is: at the top of a module, inside a function, or under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.package.tree import PACKAGE, RECIPES, ROOT, module_name, sources

# The longest prefix decides. A module may import from its own floor and from those below.
FLOORS = {
    "am_lightning.optional_imports": 1,
    "am_lightning.distributed": 1,
    "am_lightning.optim": 2,
    "am_lightning.loggers": 3,
    "am_lightning.lightning": 4,
    "am_lightning.huggingface": 4,
    "am_lightning.deepspeed": 4,
    "am_lightning.clients": 4,
    "am_lightning.pretrain": 5,
    "am_lightning.bench": 6,
    "am_lightning.recipes": 6,
    "am_lightning": 6,
    "recipes": 7,
}
CORE = 3  # this floor and those below import torch and the standard library only
# Packages of floor 4 know one framework each. Other frameworks use DeepSpeed's engine, so this one serves several.
SHARED = {"am_lightning.deepspeed"}
ADAPTERS = {
    "am_lightning.loggers.custom_scalars": {"tensorboard"},
    "am_lightning.loggers.heatmap": {"numpy"},
    "am_lightning.loggers.heatmap_image": {"numpy", "PIL"},
    "am_lightning.loggers.images": {"numpy"},
    "am_lightning.lightning.compat": {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"},
    "am_lightning.huggingface.accelerate": {"accelerate"},
    "am_lightning.huggingface.trainer": {"accelerate", "tqdm", "transformers"},
    "am_lightning.deepspeed.engine": {"deepspeed"},
    "am_lightning.clients.timm": {"timm"},
    "am_lightning.clients.torchtitan": {"torchtitan"},
    "am_lightning.optim.kernels.cpu.wheel": {"hatchling"},
    "am_lightning.optim.kernels.triton.kernels": {"triton"},
    "am_lightning.optim.kernels.triton.row_kernels": {"triton"},
}
HELPERS = [path for path in sources(ROOT / "tests") if not path.name.startswith("test_")]
TABLES = ROOT / "tests" / "mutations"  # the tables are as long as there are faults
PATHS = {module_name(path): path for path in sources(PACKAGE, RECIPES)}
MODULES = sorted(module for module in PATHS if module.startswith("am_lightning"))


def _prefix(module: str, table: dict[str, object]) -> str | None:
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in table and (name != "am_lightning" or module == name)), None)


def _floor(module: str) -> int:
    return FLOORS[_prefix(module, FLOORS)]


def imports(module: str, text: str, known: set[str]) -> Iterator[tuple[str, int]]:
    """Return (module, line) of every import in ``text``, at any depth."""
    path = PATHS.get(module)
    package = module if path and path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package) if node.level else base
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in known else base), node.lineno


def _imports(module: str) -> Iterator[tuple[str, int]]:
    return imports(module, PATHS[module].read_text(), set(PATHS))


def test_an_import_counts_wherever_it_stands() -> None:
    text = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from pkg.a import A
def function():
    def inner():
        import pkg.b
    class Local:
        from . import c
"""
    found = {name for name, _ in imports("pkg.here", text, {"pkg.a", "pkg.b", "pkg.c"})}
    assert found == {"typing", "pkg.a", "pkg.b", "pkg.c"}


def test_every_module_has_a_floor() -> None:
    assert {module for module in PATHS if _prefix(module, FLOORS) is None} == set()


@pytest.mark.parametrize("module", sorted(PATHS))
def test_imports_go_down_only(module: str) -> None:
    floor = _floor(module)
    for name, line in _imports(module):
        if name.partition(".")[0] not in ("am_lightning", "recipes"):
            continue
        assert name in PATHS, f"{module}:{line} imports {name}, which is not a module here"
        assert _floor(name) <= floor, f"{module}:{line} imports {name} from a floor above"


def test_frameworks_do_not_know_each_other() -> None:
    """Packages of floor 4 import no neighbour except DeepSpeed's, which imports none."""
    package = {module: _prefix(module, FLOORS) for module in MODULES if _floor(module) == CORE + 1}
    pairs = {
        (package[module], package[name])
        for module in package
        for name, _ in _imports(module)
        if name in package and package[name] != package[module]
    }
    assert {pair for pair in pairs if pair[1] not in SHARED or pair[0] in SHARED} == set()


@pytest.mark.parametrize("module", MODULES)
def test_third_party_imports(module: str) -> None:
    """The core imports torch alone; an adapter imports torch and the framework that it serves."""
    if _floor(module) > CORE + 1:
        pytest.skip("the floors above may import anything where they need it")
    allowed = {"torch", "am_lightning", *sys.stdlib_module_names} | ADAPTERS.get(_prefix(module, ADAPTERS), set())
    for name, line in _imports(module):
        assert name.partition(".")[0] in allowed, f"{module}:{line} imports {name}"


def test_no_import_cycles() -> None:
    """This covers all files, the recipes' too, and lazy imports and imports for types."""
    graph = {
        module: {name for name, _ in _imports(module) if name in PATHS and name != module}
        for module in PATHS
        if module != "am_lightning"  # the public names, which it imports on first use; nothing below imports it
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows the cycle


STRATEGIES = "am_lightning.distributed.strategies"


def test_nothing_above_the_strategies_names_one() -> None:
    """A new strategy is one file there and one line in its table; a framework's adapter may know the framework's."""
    found = {
        module
        for module in PATHS
        if FLOORS[_prefix(module, FLOORS)] <= CORE and not f"{module}.".startswith(f"{STRATEGIES}.")
        for name, _ in _imports(module)
        if name.startswith(f"{STRATEGIES}.")
    }
    assert found == set()


@pytest.mark.parametrize("path", [*PATHS.values(), *HELPERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    """Files have at most 400 lines, and functions at most 60 without their docstrings."""
    text = path.read_text()
    assert len(text.splitlines()) <= 400 or TABLES in path.parents
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            code_starts = node.body[1].lineno if _has_docstring(node) and len(node.body) > 1 else node.lineno
            assert node.end_lineno - code_starts < 60, f"{path.name}:{node.lineno} {node.name} is longer than a screen"


def _has_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return ast.get_docstring(node, clean=False) is not None
