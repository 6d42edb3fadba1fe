"""`import am_lightning` imports torch and nothing else; what needs an extra names it if it is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import am_lightning
from tests.lacking import PACKAGES
from tests.package.tree import PACKAGE, ROOT, module_name, sources
from tests.python import COLD

# Public name or module -> (package that it needs, extra that installs it)
NEEDS = {
    "am_lightning:AdaptiveMemory": ("lightning", "lightning"),
    "am_lightning.lightning:AdaptiveMemory": ("lightning", "lightning"),
    "am_lightning.lightning:attach": ("lightning", "lightning"),
    "am_lightning.lightning.fabric:attach": ("lightning", "lightning"),
    "am_lightning.huggingface:attach": ("accelerate", "accelerate"),
    "am_lightning.huggingface:AdaptiveMemoryCallback": ("transformers", "transformers"),
    "am_lightning.huggingface:AMAdamWFactory": ("transformers", "transformers"),
}
# Module -> the package that it serves
OPTIONAL = {
    "am_lightning.clients.timm": "timm",
    "am_lightning.clients.torchtitan": "torchtitan",
    "am_lightning.deepspeed.engine": "deepspeed",
    "am_lightning.huggingface.accelerate": "accelerate",
    "am_lightning.lightning.compat": "lightning",
}
IMPORTABLE = {module_name(path) for path in sources(PACKAGE)} - {"am_lightning.__main__"}
OLDER = {"pytorch_lightning", "lightning_fabric"}  # packages that may replace lightning
HEAVY = {
    "lightning",
    *OLDER,
    "torchmetrics",
    "tensorboard",
    "transformers",
    "accelerate",
    "deepspeed",
    "triton",
}

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocked())
"""


def _python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COLD, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=240)


def _modules_after(code: str) -> set[str]:
    done = _python(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_import_brings_torch_and_nothing_else() -> None:
    """The public optimizers and factories work without further imports."""
    use = "import am_lightning as am; am.AMAdamW, am.AMSGD, am.am_adamw, am.am_sgd, am.clip_grad_norm_"
    added = {name.partition(".")[0] for name in _modules_after(use) - _modules_after("import torch, json")}
    assert added - set(sys.stdlib_module_names) <= {"am_lightning", "torch"}
    assert "am_lightning" in added


@pytest.mark.slow
def test_every_module_imports_first() -> None:
    """Each module can be imported first: no cycle works in one order only."""
    code = (
        "import importlib, sys, torch\n"
        "lacking = set(sys.argv[1].split())\n"
        "for name in sys.argv[2:]:\n"
        "    for module in [m for m in sys.modules if m.partition('.')[0] == 'am_lightning']:\n"
        "        del sys.modules[module]\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except Exception as error:\n"
        "        missing = getattr(error.__cause__ or error.__context__ or error, 'name', None) or ''\n"
        "        if missing.partition('.')[0] not in lacking:\n"
        "            raise SystemExit(f'import {name}: {error!r}')\n"
    )
    lacking = [package for package in PACKAGES if find_spec(package) is None]
    done = _python(code, " ".join(lacking), *sorted(IMPORTABLE))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", NEEDS)
def test_missing_extra_is_named(target: str) -> None:
    package, extra = NEEDS[target]
    module, name = target.split(":")
    code = BLOCK.format(blocked={package, *OLDER}) + f"from {module} import {name}"
    done = _python(code)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("ImportError", "ModuleNotFoundError"))
    assert f"pip install am-lightning[{extra}]" in last.replace("'", "").replace('"', "")
    assert done.stderr.count("Traceback") == 1


@pytest.mark.slow
def test_a_package_that_fails_to_import_is_told_from_one_that_is_missing(tmp_path: Path) -> None:
    """The error has a cause if the package is installed, and none if it is not."""
    for package in OPTIONAL.values():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("import a_dependency_of_it")
    code = (
        "import importlib, sys\n"
        "for module in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(module)\n"
        "    except ImportError as error:\n"
        "        print(module, repr(error.__cause__), error.__suppress_context__, sep='|')\n"
    )
    missing = _python(BLOCK.format(blocked={*OPTIONAL.values(), *OLDER}) + code, *OPTIONAL)
    broken = _python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + BLOCK.format(blocked=OLDER) + code, *OPTIONAL
    )
    assert missing.stdout.splitlines() == [f"{module}|None|True" for module in OPTIONAL], missing.stderr
    cause = "ModuleNotFoundError(\"No module named 'a_dependency_of_it'\")"
    assert broken.stdout.splitlines() == [f"{module}|{cause}|True" for module in OPTIONAL], broken.stderr


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lightning", "matplotlib", "transformers"])
def test_the_recipes_name_what_they_lack_in_one_line(package: str) -> None:
    code = BLOCK.format(blocked={package, *OLDER} if package == "lightning" else {package})
    start = "sys.argv = ['am-lightning', 'fit', 'laptop']; import runpy; runpy.run_module('am_lightning.recipes', "
    done = _python(f"{code}{start}run_name='__main__')")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: the recipes need {package}") and "am-lightning[recipes]" in line


@pytest.mark.slow
def test_attach_works_without_transformers() -> None:
    done = _python(BLOCK.format(blocked={"transformers"}) + "from am_lightning.huggingface import attach")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_everything_else_works_without_any_extra() -> None:
    code = BLOCK.format(blocked=HEAVY) + (
        "import torch, am_lightning as am\n"
        "model = torch.nn.Linear(2, 2)\n"
        "makers = [am.am_adamw, am.am_sgd, lambda m: am.AMAdamW(m.parameters()), lambda m: am.AMSGD(m.parameters())]\n"
        "for optimizer in [make(model) for make in makers]:\n"
        "    model(torch.ones(1, 2)).sum().backward()\n"
        "    am.clip_grad_norm_(optimizer, 1.0)\n"
        "    optimizer.step()\n"
        "    assert len(optimizer.momentum()) == 2\n"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    assert set(am_lightning.__all__) >= {"AMAdamW", "AMSGD", "am_adamw", "am_sgd", "AdaptiveMemory", "clip_grad_norm_"}
    assert len(set(am_lightning.__all__)) == len(am_lightning.__all__)
    for name in am_lightning.__all__:
        assert getattr(am_lightning, name) is not None
        assert name in dir(am_lightning)
    with pytest.raises(AttributeError, match="no_such_name"):
        am_lightning.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", ["deepspeed", "huggingface", "lightning", "loggers", "optim", "distributed"])
def test_a_package_needs_no_import_of_its_own(name: str) -> None:
    """Pages and README write am_lightning.deepspeed.attach(...)."""
    code = f"import am_lightning; print(am_lightning.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [f"am_lightning.{name}"], done.stderr  # DeepSpeed prints before
