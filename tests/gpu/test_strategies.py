"""NCCL at one rank, and two ranks of gloo on one GPU: the run is that of one float64 process on the CPU.

In a rehearsal both are gloo on the CPU.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from am_lightning.optim.kernels.cpu.compiler import find_compiler
from tests.device import ON_GPU
from tests.gpu.steps import words_of
from tests.sharding.pool import Pool, RankError
from tests.sharding.steps import assert_as_one_process

RANKS, CLIPPING, FUSED = "tests.gpu.ranks:", "tests.sharding.clipping:", "tests.sharding.fused_steps:"
ALONE = ("ddp", "fsdp2", "fsdp2_offload", "hsdp", "tp", "fsdp1_full", "fsdp1_no_shard", "fsdp1_flat")
PAIR = ("ddp", "fsdp2", "fsdp1_full")
LIMITS = {"float64": 1e-11, "float32": 1e-4}  # another device adds in another order

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def scope_of(layout: str) -> str:
    return "global" if "flat" in layout else "tensor"


def of_gloo(pool: Pool, layout: str, function: str, **arguments: Any) -> list[Any]:
    """Skip what this torch's gloo cannot do for tensors of a GPU; it can do DDP's all-reduce."""
    try:
        return pool.run(function, layout=layout, **arguments)
    except RankError as error:
        if layout != "ddp" and ON_GPU and re.search(r"gloo|[Nn]ot implemented|No backend type", error.text):
            pytest.skip(f"this torch's gloo has no {layout} on a GPU: {error.text[:200]}")
        raise


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("layout", ALONE)
def test_one_rank(alone: Pool, layout: str, dtype: str) -> None:
    ranks = alone.run(f"{RANKS}compare", layout=layout, kind="adamw", scope=scope_of(layout), dtype=dtype)
    assert_as_one_process(ranks, LIMITS[dtype])
    kernels = words_of("default") if layout != "fsdp2_offload" else ""
    assert f"kernels: {kernels}" in ranks[0]["described"]


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "fsdp1_full", "fsdp2_offload"])
def test_one_rank_fused(alone: Pool, layout: str) -> None:
    """The CPU's loop steps offloaded parameters."""
    if layout == "fsdp2_offload" and find_compiler() is None:
        pytest.skip("the loop for offloaded parameters needs a C++ compiler")
    arguments = {"kind": "adamw", "scope": "tensor", "dtype": "float32", "fused": True}
    ranks = alone.run(f"{RANKS}compare", layout=layout, unseen=True, **arguments)
    assert_as_one_process(ranks, LIMITS["float32"])
    kernels = words_of("triton") if layout != "fsdp2_offload" else "C++ loop"
    assert f"kernels: {kernels}" in ranks[0]["described"]


@pytest.mark.parametrize("layout", ALONE)
def test_one_rank_clips(alone: Pool, layout: str) -> None:
    (rank,) = alone.run(f"{CLIPPING}compare", layout=layout, kind="adamw", scope=scope_of(layout))
    assert rank["share"] > 0.2 and rank["clipped"] == [True, False, False, True, True, True]
    assert max(rank["norm"], rank["gradients"], rank["raw"], rank["weights"]) <= LIMITS["float64"]
    assert not any(rank["unlike"][1:3])


def test_float64_goes_over_the_backend(alone: Pool) -> None:
    """CPU tensors go over the GPU, because NCCL does not accept them."""
    (found,) = alone.run(f"{RANKS}reduced_on_the_accelerator")
    assert found["equal"] and all(name == device for name, device in found["devices"].items())


@pytest.mark.parametrize("offload", [False, True])
def test_a_group_that_really_reduces(alone: Pool, offload: bool) -> None:
    (found,) = alone.run(f"{RANKS}pipelined", offload=offload)
    assert found["off"] <= LIMITS["float64"] and 0 < found["norm"] < 100


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "hsdp", "tp", "fsdp1_full"])
def test_one_rank_waits_for_nothing(alone: Pool, layout: str) -> None:
    (betas,) = alone.run(f"{RANKS}waits", layout=layout)
    assert all(0 <= beta <= 0.89 for beta in betas)


def test_mixed_precision_of_fsdp2(alone: Pool) -> None:
    (found,) = alone.run(f"{RANKS}mixed_precision")
    assert found["losses"][-1] < 0.7 * found["losses"][0]


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["default", "fused"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_distributed_checkpoint_resumes_to_the_bit(
    alone: Pool, layout: str, options: dict[str, bool], tmp_path: Path
) -> None:
    """The direction is in bfloat16."""
    (rank,) = alone.run(f"{FUSED}low_precision", layout=layout, where=str(tmp_path), **options)
    assert rank["saved"] == rank["kept"] == {"torch.bfloat16"}
    assert rank["resumed"] == rank["whole"]


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["default", "fused"])
@pytest.mark.parametrize("layout", PAIR)
def test_two_ranks_on_one_device(pair: Pool, layout: str, options: dict[str, bool]) -> None:
    arguments = {"kind": "adamw", "scope": "tensor", "dtype": "float32", **options}
    assert_as_one_process(of_gloo(pair, layout, f"{RANKS}compare", **arguments), LIMITS["float32"])


@pytest.mark.parametrize("layout", PAIR)
def test_two_ranks_clip(pair: Pool, layout: str) -> None:
    for rank in of_gloo(pair, layout, f"{CLIPPING}compare", kind="adamw", scope="tensor"):
        assert rank["norm"] <= 1e-11 and rank["weights"] <= 1e-11 and rank["share"] > 0.2


def test_a_nan_on_one_rank_skips_both(pair: Pool) -> None:
    for rank in pair.run(f"{CLIPPING}one_nan", layout="ddp"):
        assert rank["norm"] != rank["norm"] and rank["skipped"] and not rank["moved"]


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("placed", ["ddp_strategy", "fsdp1", "fsdp1_full", "fsdp2", "fsdp2_full"])
def test_lightnings_strategies(alone: Pool, placed: str, clip: float | None) -> None:
    (rank,) = alone.run("tests.lightning.cluster:fit", placed=placed, clip=clip)
    assert rank["raw"] <= LIMITS["float64"] and rank["weights"] <= LIMITS["float64"]
    assert rank["kind"] == "AMAdamW" and rank["names"] and rank["share"] > 0.2
    if clip is not None:
        assert rank["norms"] == pytest.approx(rank["expected_norms"], rel=1e-11)


@pytest.mark.parametrize("placed", ["ddp_strategy", "fsdp1", "fsdp2"])
def test_lightnings_strategies_in_bf16_mixed(alone: Pool, placed: str) -> None:
    import torch

    (rank,) = alone.run(
        "tests.lightning.cluster:fit", placed=placed, dtype=torch.float32, precision="bf16-mixed", clip=0.05
    )
    assert rank["share"] > 0.2 and rank["dtypes"] == {"torch.float32"}
    assert rank["norms"][0] == pytest.approx(rank["expected_norms"][0], rel=0.02)


@pytest.mark.parametrize("placed", ["ddp", "fsdp1", "fsdp2"])
def test_fabric(alone: Pool, placed: str, tmp_path: Path) -> None:
    from tests.lightning.cluster_fabric import alone as one_process

    (rank,) = alone.run("tests.lightning.cluster_fabric:fit", placed=placed, folder=str(tmp_path))
    for ours, theirs in zip(rank["seen"], one_process()[0], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)
