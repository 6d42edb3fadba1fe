"""recipes/launch/slurm.sh on a SLURM of two nodes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.processes import wait_until

from .conftest import EVERY, STEPS
from .runs import LAUNCH, PROGRAM, changed, newest_step, processes_of
from .slurm import Slurm
from .test_launchers import HOSTILE, PROBE, arguments, said

pytestmark = pytest.mark.nightly("SLURM")


def submit(cluster: Slurm, root: Path, args: list[str]) -> str:
    # The nodes' names do not resolve, so the job gets the first node's address; there are no GPUs to request.
    others = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "SBATCH_ARGS": ""}
    return cluster.submit([str(LAUNCH / "slurm.sh"), *args], root, **others)


def submitted_with_checkpoints(cluster: Slurm, root: Path, args: list[str]) -> str:
    """Submit a run, wait until it has written two checkpoints, and return its job."""
    job = submit(cluster, root, args)
    wait_until(lambda: newest_step(root) >= 2 * EVERY, "no checkpoint")
    return job


def log(root: Path) -> str:
    return "\n".join(path.read_text() for path in root.glob("slurm-*.log"))


def test_a_signalled_job_is_requeued_and_ends_with_the_same_bits(
    cluster: Slurm, tmp_path: Path, run_options: list[str], unbroken: Path
) -> None:
    root = tmp_path / "run"
    job = submitted_with_checkpoints(cluster, root, run_options)
    cluster.call("scancel", "--signal=USR1", job)
    assert cluster.wait(job, 240) == "COMPLETED", log(root)
    assert cluster.job(job)["Restarts"] == "1"
    assert f"SLURM job {job}: requeued" in log(root)
    assert "Restored all states from the checkpoint" in log(root)
    assert newest_step(root) == STEPS
    assert changed(root, unbroken) == []


def test_a_failed_step_is_started_again_and_given_up(cluster: Slurm, tmp_path: Path) -> None:
    """The program always fails, and the job fails after MAX_RESTARTS more attempts."""
    program = tmp_path / "fails.py"
    program.write_text("import os, sys\nprint('rank', os.environ['RANK'], flush=True)\nsys.exit(3)\n")
    root = tmp_path / "run"
    others = {"PROGRAM": str(program), "MAX_RESTARTS": "1", "SBATCH_ARGS": ""}
    job = cluster.submit([str(LAUNCH / "slurm.sh")], root, **others)
    assert cluster.wait(job, 60) == "FAILED"
    assert "restart 1 of 1" in log(root)
    assert "error: stopped after 1 restarts" in log(root)


def test_a_killed_rank_is_started_again_in_the_job(
    cluster: Slurm, tmp_path: Path, run_options: list[str], unbroken: Path
) -> None:
    root = tmp_path / "run"
    job = submitted_with_checkpoints(cluster, root, run_options)
    os.kill(processes_of(root, PROGRAM)[-1], signal.SIGKILL)
    assert cluster.wait(job, 300) == "COMPLETED", log(root)
    assert cluster.job(job)["Restarts"] == "0"
    assert "a process failed: restart 1 of 3" in log(root)
    assert newest_step(root) == STEPS
    assert changed(root, unbroken) == []


def test_no_value_is_executed_or_split(cluster: Slurm, tmp_path: Path) -> None:
    """This includes the patterns that sbatch replaces in the name of the log."""
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    root = tmp_path / f"-{HOSTILE}".replace("\\", "").replace("\n", "")  # sbatch's --output takes neither
    words = ["--data.source", HOSTILE, "", "-", f"--data.text_field={HOSTILE}"]
    others = {"PROGRAM": str(probe), "MAX_RESTARTS": "0", "SBATCH_ARGS": ""}
    job = cluster.submit([str(LAUNCH / "slurm.sh"), *words], root, **others)
    assert cluster.wait(job, 120) == "COMPLETED", (log(root), list(tmp_path.iterdir()))
    assert said(root)[0]["argv"] == arguments(root, 2, 1, *words)
    assert len(list(root.glob("slurm-*.log"))) == 1
    assert not [path for folder in (tmp_path, root, Path.cwd()) for path in folder.glob("X*")]
    with pytest.raises(RuntimeError, match=r"RUN_DIR is .*; allowed under SLURM: a path without a backslash"):
        cluster.submit([str(LAUNCH / "slurm.sh")], tmp_path / "a\\b", **others)
