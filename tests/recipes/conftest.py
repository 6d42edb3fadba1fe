"""The programs in recipes/ import each other by plain names, as they do when they are run."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch.cli
import pytest
import torch

from tests.lacking import pytest_runtest_makereport  # noqa: F401

if find_spec("jsonargparse") is None:  # the programs raise SystemExit for it, which fixtures do not cache

    def _skip(*args: Any, **options: Any) -> None:
        pytest.skip("LightningCLI needs jsonargparse, which is not installed")

    lightning.pytorch.cli.LightningArgumentParser.__init__ = _skip

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 120 small text files, of which about 5 % are held out; the same words every time."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["def", "return", "memory", "momentum", "step", "=", "(x)", ":", "\n", "for", "in", "range"]
    rng = random.Random(0)
    for number in range(120):
        file = folder / f"part{number % 4}" / f"{number:03d}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(" ".join(rng.choices(words, k=300)))
    return folder


@pytest.fixture(autouse=True)
def same_process() -> Iterator[None]:
    """Restore the number of threads, which runs inside the test's process change."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nobodys_folder() -> Iterator[Path]:
    """Return a folder whose user is not root, because root could read everything."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        if root:
            os.seteuid(65534)
        yield Path(folder)
        if root:
            os.seteuid(0)
