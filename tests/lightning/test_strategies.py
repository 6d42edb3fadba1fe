"""The user changes only the strategy: beta_t, norms and weights are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from am_lightning import AdaptiveMemory
from tests.lightning.cluster import STEPS
from tests.lightning.model import Regression, quiet
from tests.sharding.pool import Pool, RankError

FIT = "tests.lightning.cluster:fit"
CLIP = 0.05  # it clips about half of the steps
Ranks = Callable[[int], Pool]


def four(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


LAYOUTS = [
    ("ddp", 2),
    ("fsdp1", 2),
    ("fsdp2", 2),
    ("tp", 2),
    ("fsdp2_tp", 4),
    four("ddp", 4),
    four("fsdp1", 4),
    four("fsdp2", 4),
]


def check(ranks: list[dict[str, Any]], tolerance: float = 1e-12) -> None:
    first = ranks[0]
    for rank in ranks:
        assert rank["raw"] <= tolerance and rank["weights"] <= tolerance
        assert rank["bits"] == first["bits"] and rank["names"]
        assert rank["share"] > 0.2 and rank["kind"] == "AMAdamW"


def check_norms(ranks: list[dict[str, Any]], tolerance: float = 1e-12) -> None:
    """Rank zero alone logs the norms of every step; they are those of torch's clipping on the whole model."""
    first, *others = ranks
    assert first["norms"] == pytest.approx(first["expected_norms"], rel=tolerance)
    assert len(first["norms"]) == first["betas_logged"] == STEPS
    assert not any(rank["betas_logged"] for rank in others)
    share = sum(norm > CLIP for norm in first["norms"]) / STEPS
    assert 0.3 < share < 1, "clipping must bite at some steps and not at others"


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize(("placed", "world"), LAYOUTS)
def test_every_strategy_is_one_process(pool: Ranks, placed: str, world: int, scope: str) -> None:
    ranks = pool(world).run(FIT, placed=placed, scope=scope)
    check(ranks)
    assert {rank["all_reduces"] for rank in ranks} == {
        1 + STEPS
    }  # one per step, by the optimizer; the first also votes on kernels
    assert not any(rank["norms"] for rank in ranks)


@pytest.mark.parametrize(("placed", "world"), LAYOUTS)
def test_clipping_by_norm(pool: Ranks, placed: str, world: int) -> None:
    """Lightning's own clipping raises under FSDP1, and torch's under FSDP2 with tensor parallelism."""
    ranks = pool(world).run(FIT, placed=placed, clip=CLIP)
    check(ranks)
    check_norms(ranks)
    assert {rank["all_reduces"] for rank in ranks} == {1 + 2 * STEPS}


PLACES = [("ddp", 2), ("fsdp1", 2), ("fsdp2", 2), four("fsdp2_tp", 4)]


@pytest.mark.parametrize(("placed", "world"), PLACES)
def test_a_modules_own_clipping_by_norm(pool: Ranks, placed: str, world: int) -> None:
    """The module's configure_gradient_clipping calls self.clip_gradients."""
    ranks = pool(world).run(FIT, placed=placed, way="override", clip=CLIP)
    check(ranks)
    check_norms(ranks)


@pytest.mark.parametrize(("placed", "world"), PLACES)
def test_clipping_by_value_is_lightnings_own(pool: Ranks, placed: str, world: int) -> None:
    ranks = pool(world).run(FIT, placed=placed, way="value", clip=CLIP)
    check(ranks)
    assert not any(rank["norms"] for rank in ranks)


@pytest.mark.parametrize(("placed", "world"), [("ddp", 2), ("fsdp1_inside", 2), ("fsdp2", 2), four("fsdp2_tp", 4)])
def test_manual_optimization(pool: Ranks, placed: str, world: int) -> None:
    """FSDP1 wraps a module inside the LightningModule."""
    ranks = pool(world).run(FIT, placed=placed, way="manual", clip=CLIP)
    check(ranks)
    check_norms(ranks)


@pytest.mark.parametrize("adaptive", [True, False])
def test_manual_optimization_under_an_outer_fsdp1_is_not_lightnings(pool: Ranks, adaptive: bool) -> None:
    """training_step is FSDP's forward there, and torch refuses a backward in it. If this passes, support the path."""
    answers = pool(2).attempt(FIT, placed="fsdp1", way="manual", adaptive=adaptive)
    assert all(isinstance(answer, RankError) and "BACKWARD_PRE" in answer.text for answer in answers)


@pytest.mark.parametrize(("placed", "world"), PLACES)
def test_accumulation(pool: Ranks, placed: str, world: int) -> None:
    ranks = pool(world).run(FIT, placed=placed, pieces=2)
    check(ranks)
    assert {rank["all_reduces"] for rank in ranks} == {1 + STEPS}


@pytest.mark.parametrize(("placed", "world"), [*PLACES, ("fsdp1_inside", 2)])
def test_a_module_that_returns_am_adamw(pool: Ranks, placed: str, world: int) -> None:
    """Weight decay depends on the logical shapes, also of parameters that the outermost FSDP1 module shows as 1-D."""
    check(pool(world).run(FIT, placed=placed, optimizer="factory"))


def test_flat_parameters_of_fsdp1(pool: Ranks) -> None:
    ranks = pool(2).run(FIT, placed="fsdp1_flat", scope="global", optimizer="flat", clip=CLIP)
    check(ranks)
    refused = pool(2).attempt(FIT, placed="fsdp1_flat", optimizer="flat")
    assert all(answer.kind == "ValueError" and "use_orig_params=True" in answer.text for answer in refused)
    refused = pool(2).attempt(FIT, placed="fsdp1_flat", optimizer="factory")
    assert all(answer.kind == "ValueError" and "use_orig_params=True" in answer.text for answer in refused)


# Largest relative error of the first norm, because bfloat16 has 8 significant bits.
PRECISIONS = {"32-true": 1e-5, "bf16-mixed": 0.02, "bf16-true": 0.02}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("placed", "world"), PLACES)
def test_precisions(pool: Ranks, placed: str, world: int, precision: str) -> None:
    ranks = pool(world).run(FIT, placed=placed, dtype=torch.float32, precision=precision, clip=CLIP)
    first = ranks[0]
    if precision == "32-true":
        check(ranks, 5e-5)
    for rank in ranks:
        assert rank["bits"] == first["bits"] and rank["share"] > 0.2
        assert rank["dtypes"] == {"torch.float32"} | ({"torch.bfloat16"} if precision == "bf16-true" else set())
    assert first["norms"][0] == pytest.approx(first["expected_norms"][0], rel=PRECISIONS[precision])


@pytest.mark.slow
def test_bf16_true_is_the_same_under_every_strategy(pool: Ranks) -> None:
    """The ranks' shares of a batch are equal, so gradients differ by the rounding of their averages alone."""
    how = {"dtype": torch.float32, "precision": "bf16-true"}
    ddp, *others = (pool(2).run(FIT, placed=placed, **how)[0] for placed in ("ddp", "fsdp1", "fsdp2"))
    for other in others:
        for ours, theirs in zip(other["bits"], ddp["bits"], strict=True):
            for name, beta in theirs.items():
                assert float.fromhex(ours[name]) == pytest.approx(float.fromhex(beta), abs=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: Lightning makes it bf16-mixed on the CPU")
def test_16_mixed_clips_unscaled_gradients() -> None:
    module = Regression()
    trainer = pl.Trainer(
        **quiet(
            accelerator="gpu", precision="16-mixed", max_steps=8, gradient_clip_val=0.5, callbacks=[AdaptiveMemory()]
        )
    )
    trainer.fit(module)
    norm = float(trainer.optimizers[0].report()[-1])
    assert 0 < norm < 100 and all(param.isfinite().all() for param in module.parameters())


def test_model_parallel_refuses_16_mixed(pool: Ranks) -> None:
    answers = pool(2).attempt(FIT, placed="fsdp2", dtype=torch.float32, precision="16-mixed")
    assert all("does not support" in answer.text for answer in answers)
