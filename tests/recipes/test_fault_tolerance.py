"""One process and its signals: what is saved, how the process ends, and that a resumed run equals the unbroken one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from am_lightning.pretrain.callbacks.fault_tolerance import FaultTolerance
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.stop_signals import SIGNALS, Stopped
from tests.python import COLD, PYTHON

from .commands import differences, load, training_state
from .small_run import Options, Small, run, trainer_for


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unbroken")
    assert run(Options(str(root), accumulate=2)) == "finished"
    return root


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Restore the handlers, because a stopped process keeps FaultTolerance's to its end, and this process continues."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def last(root: Path) -> Path:
    return root / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)])
@pytest.mark.parametrize("batch", [8, 9])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stopped_run_resumes_bitwise(
    tmp_path: Path, unbroken: Path, name: str, status: int, batch: int, asynchronous: bool
) -> None:
    """A signal in either micro-batch of step 5 ends the run after that step, not in the middle of it."""
    options = Options(str(tmp_path), accumulate=2, asynchronous=asynchronous)
    options.events = {str(batch): name}
    assert run(options) == f"stopped {status}"
    assert load(last(tmp_path))["global_step"] == 5
    options.events = {}
    assert run(options) == "finished"
    assert differences(training_state(last(tmp_path)), training_state(last(unbroken))) == []


def test_after_a_finished_fit_the_handlers_are_the_old_ones(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    assert run(Options(str(tmp_path), steps=1)) == "finished"
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_is_agreed_on_every_few_steps(tmp_path: Path) -> None:
    options = Options(str(tmp_path), events={"0": "SIGTERM"}, fault_tolerance={"check_every_n_steps": 4})
    assert run(options) == "stopped 143"
    assert load(last(tmp_path))["global_step"] == 4


def test_a_signal_in_the_last_step_is_obeyed_when_all_is_saved(tmp_path: Path) -> None:
    assert run(Options(str(tmp_path), steps=4, events={"3": "SIGTERM"})) == "stopped 143"
    assert load(last(tmp_path))["global_step"] == 4
    assert run(Options(str(tmp_path), steps=4)) == "finished"


@pytest.mark.parametrize(
    ("moment", "more"), [("end", {}), ("end", {"stop_at": 3}), ("validation", {"validate_every": 4})]
)
def test_a_signal_after_the_last_step_is_obeyed(tmp_path: Path, moment: str, more: dict[str, int]) -> None:
    """The signal acts as one in the last step, because the run may have stopped before max_steps."""
    steps = 8 if "stop_at" in more else 4
    options = Options(str(tmp_path), steps=steps, events={moment: "SIGTERM"}, **more)  # type: ignore[arg-type]
    assert run(options) == "stopped 143"
    assert load(last(tmp_path))["global_step"] == 4
    assert run(Options(str(tmp_path), steps=8)) == "finished"
    assert load(last(tmp_path))["global_step"] == 8


def ends(tmp_path: Path, code: str, python: str = PYTHON, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `code` after these imports in a process of its own."""
    head = "import os, signal, sys, time\nfrom tests.recipes.small_run import *\noptions = Options(sys.argv[1])\n"
    return subprocess.run(
        [python, "-c", head + code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )


class Twice(Small):
    """Send SIGTERM twice in one step."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == 4:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
        return super().training_step(batch, batch_idx)


def test_a_sigterm_that_follows_at_once_is_the_same_one(tmp_path: Path) -> None:
    """torchrun passes on what srun or a process group has sent to all processes."""
    options = Options(str(tmp_path))
    with pytest.raises(Stopped) as stopped:
        trainer_for(options).fit(Twice(options))
    assert stopped.value.code == 143
    assert load(last(tmp_path))["global_step"] == 5


@pytest.mark.slow
def test_a_second_sigterm_ends_the_process_at_once(tmp_path: Path) -> None:
    code = """
from am_lightning.pretrain.runtime.stop_signals import SAME_SIGNAL_S
from tests.recipes.test_fault_tolerance import Twice

SAME_SIGNAL_S[signal.SIGTERM] = 0.001
trainer_for(options).fit(Twice(options))
"""
    result = ends(tmp_path, code)
    assert result.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM again, at once" in result.stderr
    assert load(last(tmp_path))["global_step"] == 3


SCONTROL = """#!/bin/sh
echo "$@" >> "$0.called"
[ "$FAIL" = 1 ] && { echo "Requested operation is presently disabled" >&2; exit 1; }
exit 0
"""


class Job:
    """Set the variables of a SLURM job, and a program called scontrol that records its calls.

    tests/recipes/cluster has a real SLURM.
    """

    def __init__(self, folder: Path) -> None:
        scontrol = folder / "bin" / "scontrol"
        scontrol.parent.mkdir()
        scontrol.write_text(SCONTROL)
        scontrol.chmod(0o755)
        self.variables = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}
        self.variables |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1"}
        self.variables |= {"SLURM_NNODES": "1", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
        self._calls = scontrol.with_name("scontrol.called")

    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


ARRAY = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "variables", "called", "told"),
    [
        ("SIGUSR1", {}, "requeue 77", "SLURM job 77: requeued"),
        (
            "SIGUSR1",
            ARRAY | {"FAIL": "1"},
            "requeue 70_3",
            "70_3: not requeued (Requested operation is presently disabled)",
        ),
        ("SIGTERM", {}, None, "stopped by SIGTERM at step 2"),
    ],
)
def test_a_slurm_job_is_requeued_after_its_checkpoint(
    tmp_path: Path, job: Job, number: str, variables: dict[str, str], called: str | None, told: str
) -> None:
    code = f"options.events = {{'1': '{number}'}}\ntrainer_for(options).fit(Small(options))"
    result = ends(tmp_path / "run", code, **job.variables, **variables)
    assert result.returncode == 128 + getattr(signal, number), result.stderr
    assert told in result.stderr
    assert job.calls() == ([called] if called else [])
    assert load(last(tmp_path / "run"))["global_step"] == 2
    assert not list((tmp_path / "run").glob("hpc_ckpt*"))  # Lightning's own, made in the handler


OUTSIDE = """
number = getattr(signal, os.environ["NUMBER"])
def signalled(where):
    if where == os.environ["WHERE"]:
        os.kill(os.getpid(), number)
        time.sleep(0 if where in ("start", "between") else 30)
        print("survived", flush=True)
class Early(Small):
    def configure_optimizers(self):
        signalled("before")
        return super().configure_optimizers()
    def validation_step(self, batch, batch_idx):
        signalled("validation")
with command_line():
    signalled("start")
    trainer, model = trainer_for(options), Early(options)
    print("prepared", flush=True)
    trainer.fit(model)
    signalled("between")
    trainer.validate(model, DataLoader([torch.zeros(1)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number", "requeued"),
    [
        ("before", "SIGTERM", []),
        ("before", "SIGUSR1", ["requeue 77"]),
        ("validation", "SIGUSR1", ["requeue 77"]),
        ("start", "SIGUSR1", ["requeue 77"]),
        ("between", "SIGUSR1", ["requeue 77"]),
    ],
)
def test_outside_training_a_signal_ends_the_process_at_once(
    tmp_path: Path, job: Job, where: str, number: str, requeued: list[str]
) -> None:
    """Preparing the data may take longer than a scheduler waits, and nothing is lost.

    If the program has just started, or no Trainer runs, it ends as soon as a handler is installed.
    """
    code = f"from am_lightning.pretrain.runtime.main import command_line{OUTSIDE}"
    python = COLD if where == "start" else PYTHON  # only a cold start has these first moments
    result = ends(tmp_path / "run", code, python, **job.variables, WHERE=where, NUMBER=number)
    assert result.returncode == 128 + getattr(signal, number), result.stderr
    assert job.calls() == requeued
    assert ("survived" in result.stdout) == (where in ("start", "between"))
    assert ("prepared" in result.stdout) == (where != "start")
    assert "auto-requeueing" not in result.stderr
    assert not list((tmp_path / "run").glob("hpc_ckpt*"))


KEPT = """
from am_lightning.pretrain.runtime.stop_signals import StopSignals, early_signals

with early_signals():
    os.kill(os.getpid(), signal.SIGUSR1)
    print("kept", flush=True)
    stop = StopSignals()
    stop.later = sys.argv[1] == "later"
    stop.take()
    print("taken", flush=True)
    stop.later = False
    print(stop.received == {signal.SIGUSR1})
    StopSignals().take()
    print("once", flush=True)
"""


@pytest.mark.parametrize(("when", "status", "told"), [("now", 138, ["kept"]), ("later", 0, None)])
def test_an_early_signal_is_kept_for_the_programs_without_lightning(
    tmp_path: Path, when: str, status: int, told: list[str] | None
) -> None:
    """The signal ends the process once, as soon as signals are handled or the early one is read."""
    result = ends(Path(when), KEPT)
    assert result.returncode == status, result.stderr
    assert result.stdout.split() == (told or ["kept", "taken", "True", "once"])


def test_a_forked_worker_requeues_nothing(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM signals all processes of a job, also those of DataLoaders."""
    trainer_for(Options(str(tmp_path)))
    for name, value in job.variables.items():
        monkeypatch.setenv(name, value)
    worker = os.fork()
    if worker == 0:
        os.kill(os.getpid(), signal.SIGUSR1)
        (tmp_path / "alive").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM
    assert (tmp_path / "alive").exists()
    assert job.calls() == []


@pytest.mark.parametrize("argument", [{"check_every_n_steps": 0}, {"hang_timeout_s": 0.0}])
def test_a_wrong_argument_is_named(argument: dict[str, float]) -> None:
    (name, value) = next(iter(argument.items()))
    with pytest.raises(RecipeError, match=rf"fault_tolerance.{name} is {value}; allowed: "):
        FaultTolerance(**argument)  # type: ignore[arg-type]
