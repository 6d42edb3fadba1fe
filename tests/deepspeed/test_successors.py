"""Optimizers given during a run under DeepSpeed, whose engine keeps its own: refused at once, on every rank."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SUCCESSORS = "tests.deepspeed.successors"
START_UP = 300
REFUSED = r"MisconfigurationException: the Trainer was given (AdamW|no optimizer) in mid-run, but DeepSpeed's engine"


@pytest.mark.parametrize("way", ["assigned", "put into the list", "set up again"])
def test_lightning_refuses_what_would_never_step(pool, way: str) -> None:
    for rank in pool(2).run(f"{SUCCESSORS}:lightning", timeout=START_UP, way=way):
        assert re.match(REFUSED, rank["said"]), rank["said"]
        assert rank["steps"] == 2


def test_lightning_takes_the_same_one_again(pool) -> None:
    for rank in pool(2).run(f"{SUCCESSORS}:lightning", timeout=START_UP, way="the same one"):
        assert rank["said"] == "" and rank["steps"] == 5


@pytest.mark.parametrize("way", ["assigned", "put into the list"])
def test_of_adamw_lightning_never_steps_the_successor(pool, way: str) -> None:
    for rank in pool(2).run(f"{SUCCESSORS}:lightning", timeout=START_UP, way=way, ours=False):
        assert rank == {"said": "", "steps": 5, "stepped": False}


def test_trainer_refuses_what_would_never_step(pool, tmp_path: Path) -> None:
    for text in pool(2).run(f"{SUCCESSORS}:trainer", timeout=START_UP, folder=str(tmp_path)):
        assert text.startswith("2 ValueError: no DeepSpeed engine steps this AMAdamW")


def test_fabric_refuses_another_optimizer_than_the_engines(pool) -> None:
    for own, other in pool(2).run(f"{SUCCESSORS}:fabric", timeout=START_UP):
        assert own == ""
        assert other.startswith("ValueError: the DeepSpeed engine in this model steps another AMAdamW")
