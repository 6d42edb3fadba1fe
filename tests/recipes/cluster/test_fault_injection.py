"""A short run of kills that the other tests of this folder do not make; fault_injection.py is the long version."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from . import fault_injection, namespaces
from .conftest import STEPS


@pytest.mark.nightly("kills")
def test_a_run_outlives_a_broken_checkpoint_and_a_full_disk(
    tmp_path: Path, run_options: list[str], unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := namespaces.missing():
        pytest.skip(reason)
    short = fault_injection.FaultInjection(tmp_path, run_options, STEPS, unbroken, random.Random(0), pause=0.2)
    short.run(1, ["truncated checkpoint", "full disk"], None)
    rows = capsys.readouterr().out
    assert short.failures == 0, rows
    assert "last.ckpt cut to" in rows
    assert "bitwise equal" in rows


def test_the_plan_is_the_seeds_and_has_every_kind() -> None:
    plans = [fault_injection.plan(20, random.Random(seed), with_slurm=True) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    kinds = [kind for run in plans[0] for kind in run]
    assert len(kinds) == 20
    assert min(kinds.count(kind) for kind in (*fault_injection.kills.KINDS, "SIGUSR1")) >= 3
    assert all(len(run) <= fault_injection.KILLS_PER_RUN for run in plans[0])
    assert all(set(run) == {"SIGUSR1"} for run in plans[0] if "SIGUSR1" in run)


def test_kills_come_before_the_run_can_end() -> None:
    for seed in range(100):
        steps = fault_injection.moments(4, random.Random(seed), 240)
        assert len(steps) == 4
        assert max(steps) < fault_injection.LATEST * 240
