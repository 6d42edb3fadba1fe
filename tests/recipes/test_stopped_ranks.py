"""Two processes: if one rank gets a signal, fails or hangs, both stop; a resumed run equals an unbroken one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from am_lightning.pretrain.checkpoints.resume import newest_whole
from tests.ports import free_port
from tests.python import COLD, PYTHON

from .commands import differences, load
from .small_run import Options

SMALL_RUN = Path(__file__).with_name("small_run.py")
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def start(options: list[Options], python: str = PYTHON, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python, "-m", "tests.recipes.small_run", *(json.dumps(asdict(o)) for o in options)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_in_turn(options: list[Options]) -> None:
    """Run all of them in the same two processes, started as by torchrun."""
    several = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    several |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    ranks = [start(options, RANK=str(rank), LOCAL_RANK=str(rank), **several) for rank in range(2)]
    outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)


def state(root: Path, name: str = "last.ckpt") -> dict[str, Any]:
    """Return the complete weights and optimizer of a checkpoint, and its step."""
    path = root / "checkpoints" / name
    if path.is_file():
        return {key: load(path)[key] for key in ("state_dict", "optimizer_states", "global_step")}
    dcp_to_torch_save(path, root / "whole.pt")
    return {**torch.load(root / "whole.pt", weights_only=True), "global_step": load(path / "meta.pt")["global_step"]}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_stopped_broken_and_resumed_is_bitwise_unbroken(tmp_path: Path, strategy: str) -> None:
    roots = {name: tmp_path / name for name in ("unbroken", "stopped", "background", "broken")}
    for root in roots.values():
        root.mkdir()
    common: dict[str, Any] = {"strategy": strategy, "accumulate": 2, "event_rank": 1}
    shard = "" if strategy == "ddp" else "__1_0.distcp"
    run_in_turn(
        [
            Options(str(roots["unbroken"]), **common),
            Options(str(roots["stopped"]), **common, events={"8": "SIGTERM"}),  # on rank 1, in the middle of step 5
            Options(str(roots["stopped"]), **common),
            Options(str(roots["background"]), **common, asynchronous=True, keep=2, events={"9": "SIGUSR1"}),
            Options(str(roots["background"]), **common, asynchronous=True, keep=2),
            Options(str(roots["broken"]), **common),
            Options(str(roots["broken"]), **common, truncate=f"checkpoints/step-000008.ckpt/{shard}".rstrip("/")),
        ]
    )
    wanted = state(roots["unbroken"])
    assert wanted["global_step"] == 8
    ends = {"unbroken": ["finished"], "stopped": ["stopped 143", "finished"]}
    ends |= {"background": ["stopped 138", "finished"], "broken": ["finished", "finished"]}
    for name, root in roots.items():
        for rank in range(2):
            assert Options(str(root)).ended(rank) == ends[name], name
        assert differences(state(root), wanted) == [], name
        assert not list((root / "checkpoints").glob(".*"))
    during = [state(roots[name], "step-000006.ckpt") for name in ("unbroken", "background")]
    assert differences(*during) == []  # written while the next steps were made
    assert sorted(p.name for p in (roots["background"] / "checkpoints").glob("*.ckpt")) == [
        "last.ckpt",
        "step-000006.ckpt",
        "step-000008.ckpt",
    ]
    assert (roots["stopped"] / "checkpoints" / "step-000005.ckpt").exists()


def test_answers_that_come_a_step_later_come_before_an_end_and_a_validation(tmp_path: Path) -> None:
    """GPUs answer one step later. The signal comes in the step that should_stop ends, and before a validation."""
    common: dict[str, Any] = {"strategy": "ddp", "event_rank": 1, "late_answers": True}
    several = {
        "inside": Options(str(tmp_path / "inside"), **common, events={"4": "SIGTERM"}),
        "stopping": Options(str(tmp_path / "stopping"), **common, events={"4": "SIGTERM"}, stop_at=4),
        "interval": Options(
            str(tmp_path / "interval"),
            **common,
            events={"4": "SIGTERM"},
            stop_at=4,
            fault_tolerance={"check_every_n_steps": 3},
        ),
        "validating": Options(str(tmp_path / "validating"), **common, events={"4": "SIGTERM"}, validate_every=5),
        "accumulating": Options(
            str(tmp_path / "accumulating"), **common, events={"3": "SIGTERM"}, validate_every=5, accumulate=2
        ),
    }
    for name in several:
        (tmp_path / name).mkdir()
    run_in_turn(list(several.values()))
    found = {}
    for name, options in several.items():
        assert {tuple(options.ended(rank)) for rank in range(2)} == {("stopped 143",)}, name
        assert not list(tmp_path.glob(f"{name}/validated-*")), name
        found[name] = load(tmp_path / name / "checkpoints" / "last.ckpt")["global_step"]
    assert found == {"inside": 6, "stopping": 5, "interval": 5, "validating": 5, "accumulating": 2}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return room for one checkpoint and a half."""
    folder = tmp_path / "full" / "checkpoints"
    folder.mkdir(parents=True)
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=184k", "tmpfs", folder]).returncode:
        pytest.skip("cannot mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_what_one_rank_meets_all_ranks_end_with(tmp_path: Path, small_disk: Path) -> None:
    """One rank has a gradient that is not finite, or a disk that becomes full under its shard."""
    bad, full = tmp_path / "bad", tmp_path / "full"
    bad.mkdir()
    events = {str(batch): "nan" for batch in range(4, 30)}
    run_in_turn(
        [
            Options(str(bad), "fsdp2", 30, max_skips=3, events=events, event_rank=1),
            Options(str(bad), "fsdp2", 8),
            Options(str(full), "fsdp2", 30),
        ]
    )
    for rank in range(2):
        ended, resumed = Options(str(bad)).ended(rank)
        assert ended.startswith("error: 3 steps in a row were dropped"), ended
        assert str(bad / "checkpoints" / "am-nonfinite-step=7.ckpt") in ended
        assert resumed == "finished"
        (ended,) = Options(str(full)).ended(rank)
        assert ended.startswith(f"error: cannot write {small_disk / 'step-000006.ckpt'}: No space left"), ended
    assert newest_whole(small_disk) == small_disk / "last.ckpt"
    assert sorted(p.name for p in small_disk.iterdir()) == ["last.ckpt", "step-000003.ckpt"]


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143)])
def test_under_lightnings_launcher_rank_0_has_the_status(tmp_path: Path, name: str, status: int) -> None:
    """Lightning kills rank 0 if a process that it started ends with another status than 0."""
    process = start([Options(str(tmp_path), "ddp", 6, events={"3": name}, event_rank=1)])
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    assert f"stopped by {name} at step 4" in output
    assert load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_sigusr1_before_training_on_another_rank_than_0_is_obeyed_after_a_step(tmp_path: Path) -> None:
    """Only rank 0 requeues a SLURM job, and a rank that ended would end the job's step with it."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$SLURM_PROCID $@" >> {tmp_path}/called\n')
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    job |= {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    options = [Options(str(tmp_path), "ddp", 6, events={"before": "SIGUSR1"}, event_rank=1)]
    ranks = [start(options, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **job) for rank in range(2)]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [138, 138], outputs
    assert (tmp_path / "called").read_text().split("\n") == ["0 requeue 77", ""]
    assert load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 1


def living(group: int) -> list[str]:
    """Return the processes of a process group that are not zombies."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, owner = file.read_text().rsplit(") ", 1)[1].split()[:3]
            if int(owner) == group and state != "Z":
                found.append(file.parent.name)
    return found


@pytest.mark.nightly("hangs")
@pytest.mark.parametrize(("strategy", "rank"), [("ddp", 0), ("fsdp2", 1)])
def test_a_rank_that_hangs_ends_the_job_with_an_error(tmp_path: Path, strategy: str, rank: int) -> None:
    """Under FSDP2 the other ranks wait in a group of the device mesh, which has its own timeout."""
    tolerance = {"hang_timeout_s": 10.0}
    process = start(
        [Options(str(tmp_path), strategy, events={"3": "hang"}, event_rank=rank, fault_tolerance=tolerance)],
        COLD,  # its process group is checked
    )
    output, _ = process.communicate(timeout=300)  # it would sleep for 600 s
    assert process.returncode not in (0, None), output
    assert "imed out" in output or "imeout" in output, output
    deadline = time.monotonic() + 30
    while alive := living(process.pid):
        assert time.monotonic() < deadline, f"left behind: {alive}"
        time.sleep(0.1)
