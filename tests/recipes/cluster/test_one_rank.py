"""One of two ranks fails or has a NaN: the run resumes bitwise, drops the step on both, or ends on both."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.commands import RECIPES, differences, final_state
from tests.recipes.test_entry_points import needs_compiler

from . import one_rank
from .endings import PROGRAMS
from .one_rank import VARIABLE, Event, memory_cgroup, read
from .runs import LAUNCH, options, variables

STEPS, EVERY = 12, 5


def train(root: Path, corpus: Path, event: Event, steps: int = STEPS, *extra: str, **others: str) -> tuple[int, str]:
    """The exit status of torchrun.sh on one machine with two ranks, and what was printed."""
    env = variables(root, NODES="1", GPUS_PER_NODE="2", PROGRAM=str(one_rank.__file__), **others)
    env |= {VARIABLE: json.dumps(asdict(event)), "PYTHONPATH": os.pathsep.join([str(RECIPES.parent), *_path()])}
    command = [str(LAUNCH / "torchrun.sh"), *options(corpus, steps, EVERY), *extra]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    return done.returncode, done.stdout


def _path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


SAID = {
    "raise": "ValueError: raised on one rank",
    "limit": "can't allocate memory: you tried to allocate",
    "oom": "failed (exitcode: -9)",
}
CASES = [*((program, "raise") for program in PROGRAMS), ("pretrain.py", "limit"), ("pretrain.py", "oom")]


@pytest.mark.nightly("exceptions")
@pytest.mark.parametrize(("program", "kind"), CASES)
def test_a_rank_that_fails_leaves_no_trace(program: str, kind: str, tmp_path: Path, corpus_folder: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    event = Event(program, str(tmp_path / "rows"))
    status, said = train(whole, corpus_folder, event, MAX_RESTARTS="0")
    assert status == 0, said
    with memory_cgroup() as cgroup:
        if kind == "oom" and cgroup is None:
            pytest.skip("no memory cgroup can be made here")
        event = Event(program, str(tmp_path / "broken-rows"), kind=kind, cgroup=str(cgroup), batches=(7,))
        status, said = train(broken, corpus_folder, event, MAX_RESTARTS="1")
    assert status == 0, said
    assert SAID[kind] in said, said
    for ours, theirs in zip(read(tmp_path / "broken-rows"), read(tmp_path / "rows"), strict=True):
        assert [line["batch"] for line in ours][-(STEPS - EVERY) :] == list(range(STEPS - EVERY))  # resumed at step 5
        values = [[(line["loss"], line["weights"]) for line in lines] for lines in (ours, theirs)]
        assert values[0][-(STEPS - EVERY) :] == values[1][EVERY:]
    states = [final_state(root, STEPS) for root in (broken, whole)]
    assert len(states[0]) >= 2
    assert differences(*states) == []


ZERO = RECIPES / "configs" / "deepspeed"
ENGINES = {
    "Lightning, ZeRO 2": ("pretrain.py", 2),
    "Lightning, ZeRO 3": ("pretrain.py", 3),
    "Accelerate, ZeRO 2": ("pretrain_accelerate.py", 2),
}


def deepspeed(root: Path, corpus: Path, engine: str, kind: str, batches: tuple[int, ...], steps: int) -> Any:
    """(exit status, what was printed, the lines of every rank)."""
    program, stage = ENGINES[engine]
    event = Event(program, str(root.with_name("rows")), kind=kind, batches=batches)
    others = {"MAX_RESTARTS": "0"}
    if program == "pretrain.py":
        strategy = {"": "tests.deepspeed.entry_points.OnCPU", ".config": str(ZERO / f"zero{stage}.json")}
        extra = [text for key, value in strategy.items() for text in (f"--trainer.strategy{key}", value)]
    else:
        extra = []
        others |= {"ACCELERATE_USE_DEEPSPEED": "true"}
        others |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ZERO / f"zero{stage}.json")}
    status, said = train(root, corpus, event, steps, *extra, **others)
    return status, said, read(root.with_name("rows"))


@needs_compiler
@pytest.mark.nightly("NaN under DeepSpeed")
@pytest.mark.parametrize(("engine", "kind"), list(itertools.product(ENGINES, ("nan", "gradient"))))
def test_a_nan_on_one_rank_drops_the_step_on_both(engine: str, kind: str, tmp_path: Path, corpus_folder: Path) -> None:
    status, said, ranks = deepspeed(tmp_path / "run", corpus_folder, engine, kind, (4,), STEPS)
    assert status == 0, said
    assert "1 step since the last report dropped" in said
    for lines in ranks:
        weights = [line["weights"] for line in lines]
        assert [before == after for before, after in itertools.pairwise(weights)] == [n == 4 for n in range(STEPS - 1)]
        assert all(line["loss"] == line["loss"] for line in lines if line["batch"] != 4)
    if "ZeRO 3" not in engine:  # there each rank keeps other weights
        assert [line["weights"] for line in ranks[0]] == [line["weights"] for line in ranks[1]]


@needs_compiler
@pytest.mark.nightly("NaN under DeepSpeed")
@pytest.mark.parametrize("engine", ENGINES)
def test_nans_without_end_end_the_run_on_both(engine: str, tmp_path: Path, corpus_folder: Path) -> None:
    status, said, ranks = deepspeed(tmp_path / "run", corpus_folder, engine, "nan", tuple(range(3, 99)), 40)
    assert status == 1, said
    assert said.count("error: 20 steps in a row were dropped") == 1
    assert [len(lines) for lines in ranks] == [23, 23]


@pytest.mark.nightly("NaN without DeepSpeed")
@pytest.mark.parametrize("program", PROGRAMS[1:])
@pytest.mark.parametrize("optimizer", ["ours", "torch.optim.AdamW"])
def test_nans_without_end_end_the_other_programs(
    program: str, optimizer: str, tmp_path: Path, corpus_folder: Path
) -> None:
    event = Event(program, str(tmp_path / "rows"), kind="nan", batches=tuple(range(3, 99)))
    extra = [] if optimizer == "ours" else ["--trainer.callbacks", "null", "--model.optimizer", optimizer]
    status, said = train(tmp_path / "run", corpus_folder, event, 40, *extra, MAX_RESTARTS="0")
    assert status == 1, said
    wanted = "20 steps in a row were dropped" if optimizer == "ours" else "train/loss is nan at step 4. Resume from"
    assert said.count(f"error: {wanted}") == 1, said
