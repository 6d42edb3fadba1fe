"""Ends of torchrun.sh and of `fit --gpus`: a short message, the exit status of the failed rank, and every traceback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.python import PYTHON
from tests.recipes.commands import RECIPES

from .runs import LAUNCH, variables

# Rank 1 waits, so that rank 0 is the first one that fails.
RANK = """
import os, signal, sys, time
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.main import command_line

kind, rank = os.environ["KIND"], os.environ["RANK"]
with command_line(imports=False):
    if kind == "same":
        raise RecipeError("the setting is wrong")
    if kind in ("bug", "status", "killed") and rank == "1":
        time.sleep(60)
    if kind == "bug":
        raise ValueError("a bug")
    if kind == "status":
        sys.exit(7)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "slow":  # as if it wrote a large checkpoint

        def leave(number, frame):
            time.sleep(2)
            os.write(1, b"saved\\n")
            os._exit(128 + number)

        signal.signal(signal.SIGUSR1, leave)
    os.write(1, b"ready\\n")
    time.sleep(60)
"""


def started(root: Path, kind: str, **others: str) -> subprocess.Popen[str]:
    program = root / "rank.py"
    program.write_text(RANK)
    sizes = {"NODES": "1", "GPUS_PER_NODE": "2", "MAX_RESTARTS": "0", "PYTHON": PYTHON, "CONFIG": "laptop"}
    path = os.pathsep.join([str(RECIPES.parent), os.environ.get("PYTHONPATH", "")])
    env = variables(root / "run", PROGRAM=str(program), KIND=kind, PYTHONPATH=path, **{**sizes, **others})
    pipe = subprocess.PIPE
    return subprocess.Popen([str(LAUNCH / "torchrun.sh")], env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def ended(root: Path, kind: str, **others: str) -> tuple[int, list[str]]:
    """Return the exit status and the lines of output."""
    process = started(root, kind, **others)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said.splitlines()


@pytest.mark.slow
def test_an_error_of_all_ranks_is_printed_once(tmp_path: Path) -> None:
    status, lines = ended(tmp_path, "same")
    assert status == 1 and lines[0] == "error: the setting is wrong" and len(lines) == 2, lines
    assert lines[1].endswith("ended with status 1; its error or traceback, if it had one, is above")


@pytest.mark.slow
def test_an_error_is_printed_once_in_each_start(tmp_path: Path) -> None:
    status, lines = ended(tmp_path, "same", MAX_RESTARTS="1")
    assert status == 1 and lines.count("error: the setting is wrong") == 2, lines
    assert any("failed (exitcode: 1)" in line for line in lines)  # torchrun's, because the run starts again
    assert not any(line.startswith("Traceback") for line in lines)


@pytest.mark.slow
def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    status, lines = ended(tmp_path, "bug")
    assert status == 1 and lines.count("Traceback (most recent call last):") == 1, lines
    assert "ValueError: a bug" in lines
    assert lines[-1].startswith("rank 0 ended with status 1; its error or traceback")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [("status", 7, "rank 0 ended with status 7"), ("killed", 137, "rank 0 was ended by SIGKILL")],
)
def test_the_status_is_that_of_the_rank(kind: str, status: int, says: str, tmp_path: Path) -> None:
    found, lines = ended(tmp_path, kind)
    assert found == status and lines[-1].startswith(says) and not any("Traceback" in line for line in lines), lines


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_without_a_traceback(name: str, tmp_path: Path) -> None:
    process = started(tmp_path, "wait")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(getattr(signal, name))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name), said
    lines = said.splitlines()
    assert lines[-1] == f"stopped by {name}, which was passed to the ranks" and len(lines) <= 3, said


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "saved"), [("", 2), ("1", 0)])
def test_a_signal_leaves_time_to_save(seconds: str, saved: int, tmp_path: Path) -> None:
    """torchrun of itself ends at SIGUSR1 without passing it on, and kills its ranks after 30 s."""
    process = started(tmp_path, "slow", PET_SHUTDOWN_TIMEOUT=seconds)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1 and said.count("saved\n") == saved, said
    assert said.splitlines()[-1] == "stopped by SIGUSR1, which was passed to the ranks"


@pytest.mark.slow
def test_the_launchers_leave_ten_minutes(tmp_path: Path) -> None:
    script = f"PYTHON={PYTHON} RUN_DIR={tmp_path} CONFIG=laptop; source {LAUNCH / 'common.sh'}; env"
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, timeout=60)
    assert "PET_SHUTDOWN_TIMEOUT=600" in done.stdout.splitlines(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_a_port_in_use_is_named(rendezvous: str, tmp_path: Path) -> None:
    with socket.socket() as used:
        used.bind(("", 0))
        used.listen()
        port = str(used.getsockname()[1])
        words = ["fit", "laptop", "--gpus", "1", "--nodes", "2", "--master-addr", "127.0.0.1", "--master-port", port]
        env = {**os.environ, "PYTHONPATH": str(RECIPES.parent), "RDZV": rendezvous, "NODE_RANK": "0"}
        command = [PYTHON, "-m", "am_lightning.recipes", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: port {port} of this machine is in use"), done.stderr
    assert "--master-port" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.slow
def test_a_machine_that_does_not_come_is_one_line(tmp_path: Path) -> None:
    port = str(free_port())
    others = {"NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RDZV_CONF": "join_timeout=1"}
    status, lines = ended(tmp_path, "same", **others)
    assert status == 1 and len(lines) == 1, lines
    assert lines[0].startswith("error: the machines did not find each other") and f"127.0.0.1:{port}" in lines[0]


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    others = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    status, lines = ended(tmp_path, "same", RDZV_CONF="join_timeout=1,read_timeout=1", **others)
    assert status == 1 and not any("Traceback" in line for line in lines), lines
    assert lines[-1].startswith("error: the machines did not find each other"), lines
