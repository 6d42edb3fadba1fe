"""DDP on two processes, through the real Trainer and its launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.lightning.model import interior_share
from tests.lightning.processes import run_module


def run(folder: Path, name: str, **job) -> list[dict]:
    """Run a job and return one result per rank."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"world": 2, "width": 300, "steps": 12, "scope": "tensor", **job}))
    results = [Path(f"{path}.rank{rank}.pt") for rank in range(job.get("world", 2))]
    return run_module("tests.lightning.ddp_worker", path, results, threads=2)


@pytest.fixture(scope="module", params=["tensor", "global"])
def unbroken(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"ddp-{request.param}")
    return folder, request.param, run(folder, "unbroken", scope=request.param)


@pytest.mark.slow
def test_ranks_with_other_thread_counts_end_bitwise_equal(unbroken) -> None:
    _, _, (first, second) = unbroken
    assert (first["threads"], second["threads"]) == (1, 2)
    assert first["seen"] == second["seen"]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    for key, state in first["state"].items():
        assert all(torch.equal(value, second["state"][key][name]) for name, value in state.items())


def test_beta_and_weights_are_those_of_one_process_with_the_whole_batch(unbroken) -> None:
    folder, scope, (first, _) = unbroken
    (alone,) = run(folder, "alone", scope=scope, world=1)
    assert first["steps"] == alone["steps"] == 12
    assert interior_share(alone["seen"], 0.89) > 0.2
    for ours, theirs in zip(first["seen"], alone["seen"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-5, atol=1e-5)


def test_one_all_reduce_a_step_is_the_optimizers_own(unbroken) -> None:
    _, _, results = unbroken
    assert [result["all_reduces"] for result in results] == [1 + 12, 1 + 12]  # the first vote is on kernels


@pytest.mark.slow
def test_a_resumed_run_is_bitwise_the_unbroken_one(unbroken) -> None:
    folder, scope, (first, second) = unbroken
    checkpoint = str(folder / "half.ckpt")
    run(folder, "half", scope=scope, steps=7, save=checkpoint)
    resumed = run(folder, "resumed", scope=scope, resume=checkpoint)
    for whole, part in zip((first, second), resumed, strict=True):
        assert part["steps"] == 12
        assert part["seen"] == whole["seen"][7:]
        assert all(torch.equal(part["weights"][name], value) for name, value in whole["weights"].items())
        for key, state in whole["state"].items():
            assert all(torch.equal(value, part["state"][key][name]) for name, value in state.items())
