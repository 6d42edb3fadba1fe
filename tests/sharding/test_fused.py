"""fused=True and exp_avg_dtype over ranks: all copies have equal bits, and the run is that of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sharding.pool import Pool
from tests.sharding.test_layouts import LIMITS, WITH_EMPTY_SHARDS, run

STEPS = "tests.sharding.fused_steps:"


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_ranks_are_equal_to_the_bit(pool: Callable[[int], Pool], layout: str, scope: str) -> None:
    ranks = run(pool, layout, 2, "adamw", scope, "float32", fused=True)
    for rank in ranks:
        assert rank["raw"] <= LIMITS["float32"] and rank["weights"] <= LIMITS["float32"]
        assert rank["bits"] == ranks[0]["bits"], "beta_t differs between ranks"
        assert rank["weight_bits"] == ranks[0]["weight_bits"], "weights differ between ranks"
        assert "kernels: C++ loop" in rank["described"]
        at_first, later = rank["collectives"]
        assert later == {"c10d.allreduce_": 1}
        assert at_first == {"c10d.allgather_": 1, "c10d.allreduce_": 2}, "the first also agrees on the kernels"
    assert layout not in WITH_EMPTY_SHARDS or any(rank["empty"] for rank in ranks)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["eager", "fused"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_direction_in_bfloat16_is_saved_as_one_and_resumed_to_the_bit(
    pool: Callable[[int], Pool], layout: str, options: dict[str, bool], tmp_path: Path
) -> None:
    ranks = pool(2).run(f"{STEPS}low_precision", layout=layout, where=str(tmp_path), **options)
    for rank in ranks:
        assert rank["saved"] == rank["kept"] == {"torch.bfloat16"}
        assert rank["resumed"] == rank["whole"]
        assert layout != "ddp" or rank["whole"] == ranks[0]["whole"], "copies were rounded differently"


def test_what_fsdp2_offloads_takes_the_loop_without_being_asked(pool: Callable[[int], Pool]) -> None:
    for rank in pool(2).run("tests.sharding.fused_steps:offloaded"):
        assert "kernels: C++ loop" in rank["described"] and rank["same"]


def test_fsdp1_refuses_a_direction_of_its_own_dtype(pool: Callable[[int], Pool]) -> None:
    for text in pool(2).run(f"{STEPS}refused_direction", layout="fsdp1_full"):
        assert "FSDP1" in text and "exp_avg_dtype must be None there" in text


def test_a_rank_without_a_compiler_is_an_error_on_every_rank(pool: Callable[[int], Pool]) -> None:
    ranks = pool(2).run(f"{STEPS}without_compiler", rank=1, layout="ddp")
    for rank in ranks:
        assert rank["state"] == 0
    assert "other ranks" in ranks[0]["error"] and "apt-get install g++" in ranks[1]["error"]


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_triton_is_the_default_on_all_ranks_or_none(pool: Callable[[int], Pool], layout: str) -> None:
    ranks = pool(2).run(f"{STEPS}triton_on_some", reasons={0: "", 1: "no compiler"}, layout=layout)
    assert "(no fused kernel: it does not work on 1 of the other ranks)" in ranks[0]["described"]
    assert "(no fused kernel: no compiler)" in ranks[1]["described"]
    assert layout != "ddp" or ranks[0]["bits"] == ranks[1]["bits"]


def test_fused_without_triton_on_a_rank_is_an_error_on_every_rank(pool: Callable[[int], Pool]) -> None:
    ranks = pool(2).run(f"{STEPS}triton_on_some", reasons={0: "", 1: "no compiler"}, layout="ddp", fused=True)
    assert "does not work on 1 of the other ranks" in ranks[0]["error"] and "no compiler" in ranks[1]["error"]
    assert all(rank["state"] == 0 for rank in ranks)
