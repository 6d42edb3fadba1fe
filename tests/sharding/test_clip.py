"""clip_grad_norm_ on each layout against torch's in one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from tests.sharding.layouts import LAYOUTS
from tests.sharding.pool import Pool

UNBOUND = [name for name in LAYOUTS if "unbound" in name]
CASES = [(name, max(worlds)) for name, (_, worlds) in LAYOUTS.items() if name not in UNBOUND]
CASES += [(name, 2) for name in ("ddp", "fsdp2_ignored", "tp_sequence", "fsdp1_full", "fsdp1_flat_no_shard")]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def check(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]
    assert first["share"] > 0.2 and first["clipped"] == [True, False, False, True, True, True]
    for rank in ranks:
        assert rank["norm"] <= 1e-12 and rank["gradients"] <= 1e-12, "the clipped gradients are not those of torch"
        assert rank["raw"] <= 1e-12 and rank["weights"] <= 1e-12, (
            "the steps after clipping are not those of one process"
        )
        assert rank["norm_bits"] == first["norm_bits"]
        if not rank["partial"]:  # Partial gradients are summed before
            assert not any(rank["unlike"][1:3]), "max_norm above the norm, or infinite, must not change the bits"
        check_collectives(rank)


def check_collectives(rank: dict[str, Any]) -> None:
    """Require one collective, and one per Partial gradient, which step() does not repeat."""
    sums = {"c10d.allreduce_": rank["collectives"]}
    settling = {"c10d_functional.all_reduce": rank["partial"]} if rank["partial"] else {}
    votes = 2 * rank["collectives"] if rank["votes"] else rank["collectives"]  # one vote on the kernels
    first = {"c10d.allgather_": 1, **sums, "c10d.allreduce_": votes, **settling}
    assert rank["clips"][0] == first, "the layout is compared between ranks once"
    assert rank["clips"][1] == {**sums, **settling}
    assert all(counts == sums for counts in rank["steps"])


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world"), CASES)
def test_as_torch_clips_in_one_process(pool: Callable[[int], Pool], layout: str, world: int) -> None:
    scope = "global" if layout.startswith("fsdp1_flat") else "tensor"
    check(pool(world).run("tests.sharding.clipping:compare", layout=layout, kind="adamw", scope=scope))


@pytest.mark.parametrize("layout", ["tp_sequence", "fsdp2_tp", "fsdp1_hybrid"])
def test_before_amsgd(pool: Callable[[int], Pool], layout: str) -> None:
    check(pool(4).run("tests.sharding.clipping:compare", layout=layout, kind="sgd", scope="global"))


@pytest.mark.parametrize("layout", UNBOUND)
def test_fsdp1_without_its_model_is_refused(pool: Callable[[int], Pool], layout: str) -> None:
    """A beta is a ratio, in which copies cancel; a norm is not."""
    for rank in pool(4).run("tests.sharding.clipping:refused", layout=layout, cure=True):
        assert (
            "does not know FSDP1's process groups" in rank["text"]
            and "call optimizer.bind_model(model)" in rank["text"]
        )
        assert not rank["unlike"] and abs(rank["norm"] - 1) <= 1e-12


def test_copies_that_nobody_named_are_refused(pool: Callable[[int], Pool]) -> None:
    for rank in pool(4).run("tests.sharding.clipping:refused", layout="tp_ddp", cure=True):
        assert "the global gradient norm needs the whole model" in rank["text"] and "pass replica_group" in rank["text"]
        assert not rank["unlike"] and abs(rank["norm"] - 1) <= 1e-12


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "hsdp_tp", "fsdp1_hybrid"])
def test_a_nan_on_one_rank_is_the_norm_on_all(pool: Callable[[int], Pool], layout: str) -> None:
    for rank in pool(4).run("tests.sharding.clipping:one_nan", layout=layout):
        assert math.isnan(rank["norm"]) and rank["skipped"] and not rank["moved"]
