"""Every private name of another package that is read is in the table and exists, which warns early of changes."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch

from tests.package import private_objects
from tests.package.private_deepspeed import DEEPSPEED
from tests.package.private_names import ACCELERATE, LIGHTNING, LITDATA, TIMM, TORCH, TRANSFORMERS, Private
from tests.package.private_objects import ABSENT, THERE, problem_of, version_of, why_not_looked_up
from tests.package.private_reads import Read, foreign_reads, is_private, mentions, reads_in, trees
from tests.package.test_architecture import CORE, FLOORS
from tests.package.tree import PACKAGE, ROOT, module_name, sources

LOOKED_UP = [*TORCH, *LIGHTNING, *ACCELERATE, *TRANSFORMERS, *TIMM, *LITDATA]
TABLE = [*LOOKED_UP, *DEEPSPEED]
LISTED = {(file, row.read_as) for row in TABLE for file in row.where}
LIBRARIES = ("torch", "lightning", "accelerate", "transformers", "deepspeed", "timm", "litdata")
ADD = "add it to tests/package/private_names.py with why it is read, or read something public instead"


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """Return key of a name -> whether it exists; one process checks all of them."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.package.private_objects"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("row", LOOKED_UP, ids=lambda row: row.key)
def test_private_name_is_there(found: dict[str, str], row: Private) -> None:
    answer = found[row.key]
    if answer.startswith(ABSENT):
        pytest.skip(answer.removeprefix(ABSENT))
    assert answer == THERE, answer


# ------------------------------------------------------------------ the table is complete
@pytest.mark.slow
def test_every_private_name_that_is_read_is_in_the_table() -> None:
    unlisted = [
        f"{read.file}:{read.line} reads {read.name}: {ADD}"
        for read in foreign_reads()
        if (read.file, read.name) not in LISTED
    ]
    assert not unlisted, "\n".join(unlisted)


def test_every_name_in_the_table_is_read() -> None:
    files = {file: mentions(tree) for file, tree in trees().items()}
    stale = [
        f"{row.key} is in the table, but {file} reads it no more: take it out"
        for row in TABLE
        for file in row.where
        if row.read_as not in files.get(file, ())
    ]
    assert not stale, "\n".join(stale)


def test_every_row_is_whole() -> None:
    keys = [row.key for row in TABLE]
    assert sorted(set(keys)) == sorted(keys)
    for row in TABLE:
        assert row.library in LIBRARIES and row.where and row.why and not row.why.endswith("."), row.key
        assert row.made_by is None or row.made_by in private_objects.MAKERS, row.key


@pytest.mark.slow
def test_private_names_shared_with_a_base_class_are_in_the_table() -> None:
    """A method of ours that overrides a private one, and an attribute that both set, share the name on purpose."""
    unlisted = [f"{file}: {cls} shares {name} with its base class: {ADD}" for file, cls, name in _shared_names()]
    assert not unlisted, "\n".join(unlisted)


def _shared_names() -> Iterator[tuple[str, str, str]]:
    for path in sources(PACKAGE):
        if path.name == "__main__.py":
            continue
        try:
            module = importlib.import_module(module_name(path))
        except ImportError:  # an extra that is not installed
            continue
        file = path.relative_to(ROOT).as_posix()
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
            shared = _names_on_self(cls) & {name for base in bases for name in _names_on_self(base)}
            yield from ((file, cls.__qualname__, name) for name in sorted(shared) if (file, name) not in LISTED)


def _names_on_self(cls: type) -> set[str]:
    """Return private attributes of a class, and those that its methods read or set on ``self``."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):  # a built-in class
        return set()
    names = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def test_import_am_lightning_reads_no_private_name() -> None:
    """A private name that torch moves may break what needs it, but never the import."""
    core = {name for name, floor in FLOORS.items() if floor <= CORE}
    early = []
    for read in foreign_reads():
        module = module_name(ROOT / read.file)
        if read.at_import and any(f"{module}.".startswith(f"{name}.") for name in core):
            early.append(f"{read.file}:{read.line} reads {read.name} as soon as it is imported")
    assert not early, "\n".join(early)


# ------------------------------------------------------------------ these tests can fail
def _names_read(text: str) -> set[str]:
    return {read.name for read in reads_in({"am_lightning/some.py": ast.parse(text)})}


@pytest.mark.parametrize(
    "line",
    [
        "optimizer._gone",
        "self._gone()",
        "getattr(optimizer, '_gone', None)",
        "optimizer.__dict__.pop('_gone', None)",
        "'_gone' in vars(optimizer)",
        "from torch import _gone",
        "from torch._gone.deep import public",
        "import torch._gone.deep",
        "import_module('torch._gone.deep')",
        "names = re.compile(r'(?:_gone|module)[.]')",
    ],
)
def test_a_private_name_is_found(line: str) -> None:
    assert _names_read(f"def use(self, optimizer):\n    {line}\n") == {"_gone"}


def test_names_of_ours_are_not_found() -> None:
    ours = "class Ours:\n    def __init__(self):\n        self._a = _b = 1\n    def _c(self):\n        return self._a\n"
    assert (
        _names_read(ours + "    __private__ = 1\ndef use(ours):\n    return ours._c(), ours.__dict__, '_'\n") == set()
    )


def test_a_name_at_import_is_told_from_one_in_a_function() -> None:
    tree = ast.parse("import torch._early\ndef use():\n    import torch._late\n")
    reads = reads_in({"am_lightning/some.py": tree})
    assert reads == [Read("am_lightning/some.py", 1, "_early", True), Read("am_lightning/some.py", 3, "_late", False)]


def test_a_name_of_ours_in_another_file_hides_no_foreign_one() -> None:
    """FSDP1's ``_params`` is foreign, although another class of ours has ``_params``, too."""
    ours, reader = ast.parse("class Ours:\n    _params = 1\n"), ast.parse("flat._params\n")
    assert [read.name for read in reads_in({"am_lightning/a.py": ours, "am_lightning/b.py": reader})] == ["_params"]


def test_what_is_gone_is_named_with_the_place_and_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(row for row in TORCH if row.name == "_patch_step_function")
    assert problem_of(row) is None
    monkeypatch.delattr(torch.optim.Optimizer, "_patch_step_function")
    text = problem_of(row)
    assert text is not None
    assert text.startswith(
        f"torch.optim.Optimizer._patch_step_function is gone (torch {version_of('torch')}): "
        "am_lightning/optim/convert.py reads it in order to wrap step() of a converted AdamW in torch's hooks and "
        "profiling. Find in"
    )
    assert "correct tests/package/private_names.py" in text


def test_a_module_and_an_attribute_of_an_object_that_are_gone_are_named() -> None:
    row = next(row for row in TORCH if row.name == "_optimizer_load_state_dict_post_hooks")
    for gone in (
        dataclasses.replace(row, owner="torch._no_such_module.deep", made_by=None),
        dataclasses.replace(row, name="_no_such_attribute"),
    ):
        text = problem_of(gone)
        assert text is not None and text.startswith(f"{gone.key} is gone (torch ")


def test_versions_and_missing_packages_are_told_apart() -> None:
    row = TORCH[0]
    assert why_not_looked_up(dataclasses.replace(row, since=None)) is None
    assert why_not_looked_up(dataclasses.replace(row, since="999.0")) == "read from torch 999.0 on"
    assert why_not_looked_up(dataclasses.replace(row, since=None, until="2.0")) == "read before torch 2.0 only"
    assert why_not_looked_up(dataclasses.replace(row, needs=("no_such_package",))) == "no_such_package is not installed"
