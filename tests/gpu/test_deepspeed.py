"""DeepSpeed at one rank: ZeRO 0 to 3 and offload beside one float64 process on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.device import BACKEND
from tests.sharding.pool import Pool

RUNS = "tests.deepspeed.runs:"
START = 300  # seconds: imports, and what DeepSpeed builds
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES: dict[str, dict[str, Any]] = {
    **{f"stage {stage}": {"stage": stage} for stage in (0, 1, 2, 3)},
    **{f"stage {stage}, offload": {"stage": stage, **OFFLOAD} for stage in (1, 2, 3)},
    "stage 3, parameters offloaded": {"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}},
    "stage 2, accumulated": {"stage": 2, "accumulate": 2},
    "stage 0, fused": {"stage": 0, "fused": True},
    "stage 1, fused": {"stage": 1, "fused": True},
    "stage 3, global": {"stage": 3, "scope": "global", "attach": True},
}
HALF = [(0, "bfloat16"), (1, "bfloat16"), (2, "float16"), (3, "bfloat16"), (3, "float16")]


@pytest.fixture(scope="module")
def engine() -> Iterator[Pool]:
    """Return a rank of its own, because DeepSpeed changes the process that imports it."""
    from tests.deepspeed.build import build_operator, refusal

    if reason := refusal():
        pytest.skip(reason)
    build_operator()
    pool = Pool(1, BACKEND)
    try:
        yield pool
    finally:
        pool.stop()


@pytest.mark.parametrize("name", CASES)
def test_zero(engine: Pool, name: str) -> None:
    (rank,) = engine.run(f"{RUNS}compare", timeout=START, **CASES[name])
    assert rank["share"] >= 0.2
    assert rank["beta"] <= 2e-5 and rank["weights"] <= 2e-5


@pytest.mark.parametrize(("stage", "dtype"), HALF)
def test_16_bit(engine: Pool, stage: int, dtype: str) -> None:
    """One process gets the engine's own gradients; with float16 the first steps overflow."""
    (rank,) = engine.run(f"{RUNS}compare_in_16_bit", timeout=START, stage=stage, dtype=dtype)
    assert rank["share"] > 0.1 and rank["beta"] <= 2e-5
    assert rank["dropped"] > 0 or dtype != "float16"
