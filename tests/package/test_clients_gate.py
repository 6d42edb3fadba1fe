"""tests/clients.sh and what tests/run.sh makes of it, with a pytest and a uv that write down how they were called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients import PAGES, REQUIRED_VARIABLE, client
from tests.package.tree import ROOT

CLIENTS = ROOT / "tests" / "clients"
PYTEST = "bin/python -m pytest -n auto --dist loadfile --durations=5 -rs"
PICTURES = "tests/lightning/test_images.py tests/huggingface/test_images.py tests/loggers/test_attach.py"
PROGRAMS = f"programs/{PYTEST} tests/clients {PICTURES} --ignore tests/clients/test_litgpt.py"
LITGPT = f"litgpt/{PYTEST} tests/clients/test_litgpt.py"

# Stand-ins for uv and Python. `uv venv` copies the stand-in for Python into the environment.
UV = """#!/bin/sh
echo "uv $*" >>"$CALLS"
if [ "$1 ${FAILS:-}" = "pip uv" ]; then echo "error: no network" >&2; exit 2; fi
if [ "$1" = venv ]; then
    for folder; do :; done
    mkdir -p "$folder/bin" && cp "$(dirname "$0")/python3.11" "$folder/bin/python"
fi
"""
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then echo "$0"; exit 0; fi
echo "${AM_CLIENTS_TESTS:-}${0#"$PWD/.clients/"} $*" >>"$CALLS"
case "${FAILS:-}" in ?*) case "$0" in *"$FAILS"*) exit 1 ;; esac ;; esac
"""
ENV = """ensure_venv() { PYTHON="$PWD/main/bin/python"; }"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with a space in its name that has what the two scripts use."""
    root = tmp_path / "a checkout"
    for name in ("bin", "main/bin", "recipes", "tests/clients"):
        (root / name).mkdir(parents=True)
    for name in (
        "run.sh",
        "clients.sh",
        "environments.sh",
        "clients/requirements.txt",
        "clients/litgpt.txt",
        "clients/loggers.txt",
    ):
        shutil.copy(ROOT / "tests" / name, root / "tests" / name)
    for name, text in {"bin/uv": UV, "bin/python3.11": PYTHON, "main/bin/python": PYTHON}.items():
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    (root / "recipes" / "env.sh").write_text(ENV)
    (root / "pyproject.toml").touch()
    return root


def run(root: Path, script: str, *arguments: str, fails: str = "") -> tuple[int, list[str]]:
    """Run a script, and return its exit status and the calls that it made."""
    calls = root / "calls"
    calls.write_text("")
    variables = {"PATH": f"{root / 'bin'}:/usr/bin:/bin", "CALLS": str(calls), "FAILS": fails}
    done = subprocess.run([root / "tests" / script, *arguments], env=variables, capture_output=True, timeout=60)
    return done.returncode, calls.read_text().splitlines()


def pytests(calls: list[str]) -> list[str]:
    return [call for call in calls if not call.startswith("uv ")]


@pytest.mark.parametrize("arguments", [[], ["--fast"], ["--ci"], ["--nightly", "-k", "sgd"]])
def test_only_the_whole_nightly_gate_has_the_clients(checkout: Path, arguments: list[str]) -> None:
    status, calls = run(checkout, "run.sh", *arguments)
    assert status == 0 and len(calls) == 1 and "/main/bin/python -m pytest" in calls[0]


@pytest.mark.parametrize("fails", ["", "main/bin", "programs", "litgpt"])
def test_nightly_runs_them_after_the_others(checkout: Path, fails: str) -> None:
    status, calls = run(checkout, "run.sh", "--nightly", "-q", fails=fails)
    main, *clients = pytests(calls)
    assert main.endswith("-m pytest -n auto --dist loadfile -q --gate nightly")
    assert clients == [f"1{PROGRAMS}", f"1{LITGPT}"]
    assert status == (1 if fails else 0)


def test_an_environment_is_made_once(checkout: Path) -> None:
    status, calls = run(checkout, "clients.sh", "litgpt", "--", "-x")
    assert (status, pytests(calls)) == (0, [f"1{LITGPT} -x"])
    requirements = [call for call in calls if "--requirement" in call]
    assert len(requirements) == 1 and requirements[0].endswith("--requirement tests/clients/litgpt.txt")
    assert run(checkout, "clients.sh", "litgpt") == (0, [f"1{LITGPT}"])
    with (checkout / "tests" / "clients" / "litgpt.txt").open("a") as file:
        file.write("another\n")
    assert any("--requirement" in call for call in run(checkout, "clients.sh", "litgpt")[1])


def test_what_cannot_be_installed_is_a_failure(checkout: Path) -> None:
    for _ in range(2):  # the second run tries again
        status, calls = run(checkout, "clients.sh", fails="uv")
        assert status != 0 and pytests(calls) == [] and any("--requirement" in call for call in calls)
    assert run(checkout, "run.sh", "--nightly", fails="uv")[0] != 0
    assert run(checkout, "clients.sh", "no-such-row")[0] != 0


def test_what_is_missing_is_skipped_elsewhere_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REQUIRED_VARIABLE, raising=False)
    with pytest.raises(pytest.skip.Exception):
        client("no_such_package")
    monkeypatch.setenv(REQUIRED_VARIABLE, "1")
    with pytest.raises((ModuleNotFoundError, pytest.skip.Exception)) as raised:
        client("no_such_package")
    assert raised.type is ModuleNotFoundError  # a skip would skip this test
    assert client("os.path") is os.path
    assert not [path.name for path in CLIENTS.glob("test_*.py") if "importorskip" in path.read_text()]


@pytest.mark.parametrize("name", ["requirements.txt", "litgpt.txt"])
def test_the_pages_name_the_releases(name: str) -> None:
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (CLIENTS / name).read_text(), re.MULTILINE))
    text = " ".join(" ".join(page.read_text().lower().split()) for page in PAGES.glob("*.md"))
    named = pins.keys() - {"torch", "lightning", "pytorch-lightning", "transformers", "accelerate", "litdata"}
    assert named and not [f"{client} {pins[client]}" for client in named if f"{client} {pins[client]}" not in text]
