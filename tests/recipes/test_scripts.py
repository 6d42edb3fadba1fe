"""recipes/env.sh and quickstart.sh without a network; the test's copy has a build backend of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.python import COLD

ROOT = Path(__file__).resolve().parents[2]
INSTALLATIONS = pytest.mark.nightly("installations")

# The part of PEP 660 that an editable installation needs. It records every use.
BACKEND = """
import pathlib, zipfile

FILES = {
    "METADATA": ["Metadata-Version: 2.1", "Name: am-lightning", "Version: 0", "Provides-Extra: a"],
    "WHEEL": ["Wheel-Version: 1.0", "Generator: test", "Root-Is-Purelib: true", "Tag: py3-none-any"],
}

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name, info = "am_lightning-0-py3-none-any.whl", "am_lightning-0.dist-info/"
    with open("installations", "a") as file:
        file.write("x")
    with zipfile.ZipFile(pathlib.Path(wheel_directory, name), "w") as wheel:
        wheel.writestr("am_lightning.pth", str(pathlib.Path.cwd()))
        for member, lines in FILES.items():
            wheel.writestr(info + member, "".join(line + "\\n" for line in lines))
        wheel.writestr(info + "RECORD", "")
    return name
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of what the scripts use, in a folder with a space in its name."""
    root = tmp_path / "a checkout"
    for folder in ("am_lightning", "recipes"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "backend.py").write_text(BACKEND)
    (root / "pyproject.toml").write_text(PYPROJECT)
    return root


def bash(script: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run with no HOME and no index; the tests' interpreter, which can import torch, makes the environment."""
    env = {"PATH": os.environ["PATH"], "AM_PYTHON": COLD, "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-euc", script], cwd=cwd, env={**env, **variables}, capture_output=True, text=True, timeout=240
    )


ENSURE = 'source "$0/recipes/env.sh"; ensure_venv "{}"; echo "$PYTHON"'


def ensure(root: Path, extras: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    return bash(ENSURE.format(extras).replace("$0", str(root)), root.parent, **variables)


def installations(root: Path) -> int:
    return len((root / "installations").read_text())


def test_help_installs_nothing(checkout: Path, tmp_path: Path) -> None:
    result = bash(f"'{checkout}/recipes/quickstart.sh' --help", tmp_path)
    assert result.returncode == 0 and "--ckpt_path last" in result.stdout and "#!" not in result.stdout
    assert not (checkout / ".venv").exists()


@pytest.mark.slow
def test_the_quickstart_trains_and_installs_once(checkout: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(80):
        (corpus / f"{number}.txt").write_text("some text " * 100)
    options = "--data.source corpus --trainer.enable_progress_bar false --model.num_layers 1"
    for steps in (2, 3):
        result = bash(f"'{checkout}/recipes/quickstart.sh' {options} --trainer.max_steps {steps}", tmp_path)
        assert result.returncode == 0, result.stderr
        assert "validation loss" in result.stdout
        assert "text after 'def ':\n\ndef " in result.stdout
    assert (checkout / "runs" / "laptop" / "checkpoints" / "step-000003.ckpt").exists()
    assert installations(checkout) == 1


@INSTALLATIONS
@pytest.mark.slow
def test_an_environment_is_made_once(checkout: Path) -> None:
    first = ensure(checkout)
    assert first.returncode == 0, first.stderr
    python = first.stdout.strip()
    assert python == str(checkout / ".venv" / "bin" / "python")
    code = "import torch, am_lightning; print(am_lightning.__file__)"
    found = subprocess.run([python, "-c", code], cwd=checkout.parent, capture_output=True)
    assert found.stdout.decode().strip() == str(checkout / "am_lightning" / "__init__.py")
    again = ensure(checkout, PATH="/usr/bin:/bin", AM_PYTHON="/nonexistent")
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    assert installations(checkout) == 1
    for extras, times in (("a", 2), ("", 2), ("a", 2)):  # another extra is added to the same environment
        assert ensure(checkout, extras).returncode == 0
        assert installations(checkout) == times
    (checkout / "pyproject.toml").write_text(PYPROJECT + "# other requirements\n")
    assert ensure(checkout).returncode == 0
    assert installations(checkout) == 3


@pytest.mark.slow
def test_no_network_is_needed_where_all_is_installed(checkout: Path) -> None:
    """The real requirements include a build backend that an isolated build would have to download."""
    extras = "lightning,recipes" if find_spec("jsonargparse") else ""
    shutil.copy(ROOT / "pyproject.toml", checkout)
    unreachable = {"PIP_NO_INDEX": "1", "PIP_INDEX_URL": f"http://127.0.0.1:{free_port()}/simple", "PIP_RETRIES": "0"}
    result = ensure(checkout, extras, **unreachable)
    assert result.returncode == 0, result.stderr
    code = "import torch, am_lightning; print(am_lightning.__file__)"
    found = subprocess.run([result.stdout.strip(), "-c", code], cwd=checkout.parent, capture_output=True, text=True)
    assert found.stdout.strip() == str(checkout / "am_lightning" / "__init__.py"), found.stderr
    again = ensure(checkout, extras, PATH="/usr/bin:/bin", AM_PYTHON="/nonexistent")
    assert (again.returncode, again.stdout, again.stderr) == (0, result.stdout, "")


@pytest.mark.slow
def test_what_is_missing_is_installed(checkout: Path) -> None:
    name = "am-lightning"
    extras = {"a": '"pytest>=1"', "b": '"no-such-package"', "c": '"pytest<1"', "d": f'"pytest>=1", "{name}[b]"'}
    lines = [f"{extra} = [{needs}]" for extra, needs in extras.items()]
    project = ["[project]", f'name = "{name}"', 'version = "0"', "[project.optional-dependencies]", *lines]
    (checkout / "pyproject.toml").write_text(PYPROJECT + "\n".join(project))
    for extra in ("", "a"):
        assert ensure(checkout, extra).returncode == 0
        assert not (checkout / "installations").exists()
    for times, extra in enumerate("bcd", start=1):
        assert ensure(checkout, extra).returncode == 0
        assert installations(checkout) == times


@INSTALLATIONS
@pytest.mark.slow
def test_a_half_made_environment_is_made_again(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to("/nonexistent/python")
    result = ensure(checkout)
    assert result.returncode == 0, result.stderr
    assert installations(checkout) == 1


@INSTALLATIONS
@pytest.mark.sample
@pytest.mark.slow
def test_two_at_the_same_time_install_once(checkout: Path) -> None:
    both = ENSURE.format("").replace("$0", str(checkout))
    result = bash(f"({both}) & first=$!; ({both}) & second=$!; wait $first; wait $second", checkout.parent)
    assert result.returncode == 0, result.stderr
    assert installations(checkout) == 1


@INSTALLATIONS
@pytest.mark.slow
def test_a_failed_installation_is_reported_and_tried_again(checkout: Path) -> None:
    backend = (checkout / "backend.py").read_text()
    (checkout / "backend.py").write_text("raise SystemExit('no backend today')")
    result = ensure(checkout)
    assert result.returncode != 0
    assert "pip could not install into" in result.stderr
    (checkout / "backend.py").write_text(backend)
    assert ensure(checkout).returncode == 0


def test_a_missing_python_is_reported(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "cksum", "grep", "flock"):
        if path := shutil.which(tool):
            (tools / tool).symlink_to(path)
    old = tools / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = ensure(checkout, PATH=str(tools), AM_PYTHON="")
    assert result.returncode != 0
    assert "Python 3.10 or newer is needed; found python3" in result.stderr
    old.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; *executable*) echo /some/python;; esac\n')
    (tools / "python").symlink_to(old)
    (tools / "some").mkdir()
    result = ensure(checkout, PATH=str(tools), AM_PYTHON="")
    assert result.returncode != 0
    assert "apt install python3-venv" in result.stderr


def test_the_scripts_are_sound_bash() -> None:
    for script in ("env.sh", "quickstart.sh"):
        assert subprocess.run(["bash", "-n", str(ROOT / "recipes" / script)]).returncode == 0
    assert os.access(ROOT / "recipes" / "quickstart.sh", os.X_OK)
