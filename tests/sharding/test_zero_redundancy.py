"""torch.distributed.optim.ZeroRedundancyOptimizer: each rank's optimizer has some whole tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sharding.pool import Pool

WORKER = "tests.sharding.zero_redundancy:"


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("world", [2, 4])
def test_one_beta_for_each_tensor_is_that_of_one_process(pool: Callable[[int], Pool], world: int, kind: str) -> None:
    ranks = pool(world).run(f"{WORKER}run", kind=kind)
    assert sorted(name for rank in ranks for name in rank["names"]) == ranks[0]["all"], "each tensor on one rank"
    for rank in ranks:
        assert rank["error"] <= 1e-12 and rank["weights"] <= 1e-12 and rank["share"] > 0.2
        assert rank["names"] and not rank["warned"]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("world", [2, 4])
def test_sums_over_several_tensors_are_refused(pool: Callable[[int], Pool], world: int, scope: str, kind: str) -> None:
    for rank in pool(world).run(f"{WORKER}refused", kind=kind, scope=scope):
        assert f"scope='{scope}' cannot be formed inside ZeroRedundancyOptimizer" in rank["text"]
        assert "sees only that rank's tensors" in rank["text"] and "Use scope='tensor'" in rank["text"]
        assert not rank["moved"] and not rank["states"]


def test_the_norm_of_some_tensors_is_refused(pool: Callable[[int], Pool]) -> None:
    for text in pool(2).run(f"{WORKER}clip_the_inner_optimizer"):
        assert text is not None and "ZeroRedundancyOptimizer" in text and "torch.nn.utils.clip_grad_norm_" in text


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(("start", "end"), [("many", "many"), ("many", "alone"), ("alone", "many")])
@pytest.mark.parametrize("world", [2, 4])
def test_resumed_is_unbroken(pool: Callable[[int], Pool], world: int, start: str, end: str, kind: str) -> None:
    """consolidate_state_dict and state_dict resume into another such optimizer or one process's optimizer, and back."""
    for rank in pool(world).run(f"{WORKER}resume", kind=kind, start=start, end=end):
        assert rank["before"] <= 1e-12 and rank["error"] <= 1e-12 and rank["weights"] <= 1e-12
        if end == "alone":
            assert not {"scope", "nonfinite"} & rank["options"], "options of the whole optimizer came with the groups"


def test_adaptive_scalars_keep_their_precision(pool: Callable[[int], Pool]) -> None:
    ranks = pool(2).run(f"{WORKER}low_precision")
    assert any(0.01 < beta < 0.88 for rank in ranks for beta in rank["betas"])
    for rank in ranks:
        assert rank["dtypes"] == ["torch.float32"] and rank["same"]
