"""The files that a user installs: the wheel and the source archive, built from this tree."""

from __future__ import annotations

import email
import os
import subprocess
import sysconfig
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

from am_lightning.optim.kernels.cpu.compiler import source_key
from tests.package.tree import PACKAGE, RECIPES, ROOT, STUDIES, extras, files, version
from tests.python import COLD

LIBRARY = f"am_lightning/optim/kernels/cpu/kernels_{source_key()}.so"


def _build(source: Path, out: Path, target: str, **variables: str) -> Path:
    command = [COLD, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    env = os.environ | variables
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


def _names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def _metadata(wheel: Path) -> Message:
    (name,) = [name for name in _names(wheel) if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(zipfile.ZipFile(wheel).read(name))


def test_wheel_is_the_package_with_the_recipes_and_nothing_else(wheel: Path) -> None:
    """The wheel contains the files that git knows, no caches, and recipes/ (without studies/) where paths.py looks."""
    package = {str(path.relative_to(ROOT)) for path in files() if PACKAGE in path.parents}
    package |= {
        f"am_lightning/recipes/files/{path.relative_to(RECIPES)}"
        for path in files()
        if RECIPES in path.parents and STUDIES not in path.parents
    }
    info = f"am_lightning-{version()}.dist-info"
    assert "am_lightning/py.typed" in package
    package |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert _names(wheel) == package | {LIBRARY}
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"am_lightning-{version()}-py3-none-{platform}.whl"


def test_wheel_metadata(wheel: Path) -> None:
    meta = _metadata(wheel)
    assert meta["Name"] == "am-lightning"
    assert meta["Version"] == version()
    assert meta["License-Expression"] == "Apache-2.0"
    assert meta["Requires-Python"] == ">=3.10"
    assert [need for need in meta.get_all("Requires-Dist", []) if "extra ==" not in need] == ["torch>=2.6"]
    assert set(meta.get_all("Provides-Extra", [])) == extras()
    text = meta.get_payload(decode=True)
    assert isinstance(text, bytes)
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in text.decode("utf-8")


def test_scripts_stay_executable(wheel: Path) -> None:
    """The wheel keeps the executable bit, and so do installers."""
    modes = {info.filename: info.external_attr >> 16 for info in zipfile.ZipFile(wheel).infolist()}
    scripts = [path.relative_to(RECIPES) for path in files() if RECIPES in path.parents and os.access(path, os.X_OK)]
    assert Path("launch/torchrun.sh") in scripts
    assert all(modes[f"am_lightning/recipes/files/{path}"] & 0o111 for path in scripts)


@pytest.mark.slow
def test_a_wheel_brings_its_own_loop(wheel: Path, tmp_path: Path) -> None:
    """The wheel's loop works without a compiler, and a wheel that was built without a compiler works as well."""
    code = (
        "import torch, am_lightning\n"
        "param = torch.nn.Parameter(torch.ones(3)); param.grad = torch.ones(3)\n"
        "optimizer = am_lightning.AMAdamW([param]); optimizer.step(); print(optimizer.describe())\n"
        "am_lightning.AMAdamW([param], fused='C++' in optimizer.describe())\n"
    )
    tools = tmp_path / "tools"
    tools.mkdir()
    pure = _build(ROOT, tmp_path / "pure", "wheel", PATH=str(tools), CXX="")
    assert pure.name == f"am_lightning-{version()}-py3-none-any.whl" and LIBRARY not in _names(pure)
    for built, kernel in ((wheel, "C++ loop"), (pure, "foreach for 1 (no fused kernel: $CXX, c++, g++")):
        folder = tmp_path / kernel.partition(" ")[0]
        zipfile.ZipFile(built).extractall(folder)
        env = {"PATH": str(tools), "PYTHONPATH": str(folder), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
        done = subprocess.run([COLD, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert kernel in done.stdout and ("of the wheel" in done.stdout) == (built is wheel), done.stdout + done.stderr
    assert not (tmp_path / "extensions").exists()


@pytest.mark.slow
def test_wheel_works_from_where_it_lies(wheel: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import am_lightning, torch\n"
        "assert am_lightning.__file__.startswith(sys.argv[1]), am_lightning.__file__\n"
        "optimizer = am_lightning.am_adamw(torch.nn.Linear(2, 2))\n"
        "print(am_lightning.__version__)\n"
    )
    done = subprocess.run([COLD, "-c", code, str(wheel)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == version()


def test_sdist_holds_what_it_takes_to_build_and_test(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {Path(*Path(member.name).parts[1:]) for member in archive.getmembers() if member.isfile()}
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    tracked = {path.relative_to(ROOT) for path in files() if path.relative_to(ROOT).parts[0] != ".ci"}
    assert names - {Path("PKG-INFO")} == tracked
    (folder,) = tmp_path.iterdir()
    assert _names(_build(folder, tmp_path / "out", "wheel")) == _names(wheel)
