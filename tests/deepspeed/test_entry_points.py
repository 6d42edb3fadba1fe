"""DeepSpeed through Lightning, Fabric, Accelerate and the HF Trainer: two processes, curves in the event file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.loggers.intervals import assert_curves, curves_of
from tests.loggers.planted import expected_curves

pytestmark = pytest.mark.slow

ENTRY_POINTS = "tests.deepspeed.entry_points"
START_UP, STEPS, EVERY = 300, 6, 2
TAGS = {"am/beta/mean", "am/beta/min", "am/beta/max", "am/clamp/at_max", "am/clamp/at_zero", "am/skipped_steps"}


def check(ranks: list[dict], *, axis: int = 0) -> None:
    """Require beta_t and weights of one process, equal on all ranks, and curves of both steps of each interval."""
    seen = [{name: float.fromhex(beta) for name, beta in step.items()} for step in ranks[0]["bits"]]
    for rank in ranks:
        assert rank["beta"] <= 5e-6
        assert rank["weights"] <= 1e-5
        assert rank["bits"] == ranks[0]["bits"]
        assert set(rank["scalars"]) >= TAGS
        assert_curves(rank["scalars"], curves_of(seen, range(EVERY, STEPS + 1, EVERY)), axis)


@pytest.mark.parametrize(
    ("stage", "scope"), [(0, "tensor"), (2, "tensor"), (2, "global"), (3, "tensor"), (3, "global")]
)
def test_lightning(pool, tmp_path: Path, stage: int, scope: str) -> None:
    """A converted AdamW trains unbroken, and is saved and resumed half way."""
    ranks = pool(2).run(f"{ENTRY_POINTS}:lightning", timeout=START_UP, folder=str(tmp_path), stage=stage, scope=scope)
    check(ranks, axis=-1)
    assert all(rank["resumed"]["beta"] <= 5e-6 and rank["resumed"]["weights"] <= 1e-5 for rank in ranks)
    assert "am/beta" in ranks[0]["histograms"]
    assert "am/grad_norm" not in ranks[0]["scalars"]  # the engine clips


def test_lightning_with_offload_sets_what_the_engine_asks_for(pool, tmp_path: Path) -> None:
    ranks = pool(2).run(f"{ENTRY_POINTS}:lightning", timeout=START_UP, folder=str(tmp_path), stage=3, offload=True)
    check(ranks, axis=-1)


def test_lightning_refuses_an_optimizer_in_the_configuration(pool) -> None:
    for text in pool(2).run(f"{ENTRY_POINTS}:named_in_config", timeout=START_UP, stage=2):
        assert text.startswith("MisconfigurationException")
        assert "remove 'optimizer' from it" in text


@pytest.mark.parametrize(("stage", "scope"), [(2, "tensor"), (3, "global")])
def test_fabric(pool, tmp_path: Path, stage: int, scope: str) -> None:
    check(pool(2).run(f"{ENTRY_POINTS}:fabric", timeout=START_UP, folder=str(tmp_path), stage=stage, scope=scope))


@pytest.mark.parametrize("stage", [0, 2])
def test_the_curves_of_a_beta_that_is_known(pool, tmp_path: Path, stage: int) -> None:
    """The engine steps the optimizer several times in a step, in float32."""
    options = {"folder": str(tmp_path), "stage": stage, "steps": 28, "every": 7}
    found = pool(2).run(f"{ENTRY_POINTS}:planted", timeout=START_UP, **options)[0]
    for tag, points in expected_curves(28, 7).items():
        assert found[tag] == pytest.approx(points, abs=1e-4, rel=1e-4), tag


@pytest.mark.parametrize(("stage", "scope"), [(0, "tensor"), (2, "tensor"), (3, "global")])
def test_accelerate(pool, tmp_path: Path, stage: int, scope: str) -> None:
    """This includes save_state and load_state during the run."""
    check(pool(2).run(f"{ENTRY_POINTS}:accelerate", timeout=START_UP, folder=str(tmp_path), stage=stage, scope=scope))


@pytest.mark.parametrize(("stage", "form"), [(2, "class"), (3, "factory")])
def test_trainer(pool, tmp_path: Path, stage: int, form: str) -> None:
    ranks = pool(2).run(f"{ENTRY_POINTS}:trainer", timeout=START_UP, folder=str(tmp_path), stage=stage, form=form)
    for rank in ranks:
        assert rank["engine"] == "DeepSpeedEngine"
        assert rank["share"] > 0.2
        assert rank["beta"] <= 5e-6
        assert rank["bits"] == ranks[0]["bits"]
        assert set(rank["scalars"]) >= {f"train/{tag}" for tag in TAGS}
