"""The DeepSpeed program of docs/start.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.programs import betas, run_program

pytestmark = pytest.mark.slow


@pytest.mark.slow
def test_the_program_trains_on_two_ranks(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run_program(tmp_path, [*launcher, "deepspeed_engine.py"])
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in done.stdout.splitlines() if "beta_t" in line]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 1
    found = betas(tmp_path)
    assert len(found) == 100 and min(found) < 0.88
