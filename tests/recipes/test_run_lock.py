"""Two runs in one folder: the second is told about the first, and a killed one blocks no other."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from am_lightning.pretrain.runtime import run_lock
from am_lightning.pretrain.runtime.errors import RecipeError
from tests.python import PYTHON

from .commands import RECIPES, arguments

HOLDER = """
import os, sys, time
from pathlib import Path
from am_lightning.pretrain.runtime.run_lock import hold
hold(Path(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(600)
"""


@contextmanager
def holder(folder: Path) -> Iterator[int]:
    """Return the process that holds a run, until it is killed."""
    process = subprocess.Popen([PYTHON, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    number = int(process.stdout.readline())
    try:
        yield number
    finally:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
        process.wait()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_PATIENCE_S", 0.0)


@pytest.mark.usefixtures("impatient")
def test_a_second_process_is_told_of_the_first_until_it_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with holder(folder) as first:
        text = rf"another run writes to {tmp_path}: process {first} on .*, since 20.*choose another folder"
        with pytest.raises(RecipeError, match=text):
            run_lock.hold(folder)
        run_lock.hold(tmp_path / "other" / "checkpoints")
        os.kill(first, signal.SIGSTOP)  # it is not dead
        with pytest.raises(RecipeError, match=text):
            run_lock.hold(folder)
    run_lock.hold(folder)
    run_lock.hold(folder)  # a second call changes nothing
    for of in (folder, tmp_path / "other" / "checkpoints", folder):
        run_lock.release(of)
    with holder(folder):
        pass


def test_one_that_ends_soon_is_waited_for(tmp_path: Path) -> None:
    """torchrun restarts ranks while the others are being killed."""
    with holder(tmp_path / "checkpoints") as first:
        start = time.monotonic()
        threading.Timer(1.0, os.kill, (first, signal.SIGKILL)).start()
        run_lock.hold(tmp_path / "checkpoints")
    assert time.monotonic() - start > 0.9
    run_lock.release(tmp_path / "checkpoints")


@pytest.mark.usefixtures("impatient")
def test_a_file_system_without_locks_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with holder(tmp_path / "checkpoints"):
        monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
        run_lock.hold(tmp_path / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("program", ["pretrain.py", "pretrain_accelerate.py", "pretrain_hf_trainer.py"])
def test_a_program_leaves_a_live_run_alone(program: str, tmp_path: Path, corpus_folder: Path) -> None:
    folder = tmp_path / "checkpoints"
    command = [PYTHON, str(RECIPES / program), *(["fit"] if program == "pretrain.py" else [])]
    settings = [word for word in arguments(tmp_path, corpus_folder, 2) if word != "fit"]
    with holder(folder) as first:
        folder.mkdir()
        (folder / ".step-000001.ckpt.part").touch()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: another run writes to {tmp_path}: process {first} on ")
    assert "Traceback" not in result.stderr
    assert [path.name for path in folder.iterdir()] == [".step-000001.ckpt.part"]
    assert not (tmp_path / "earlier").exists()
