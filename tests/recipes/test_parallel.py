"""The recipe's Llama trains under every strategy as in one process: weights, losses, momentum, gradient norms."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from am_lightning.pretrain.model.parallelize import check_tensor_parallel
from am_lightning.pretrain.model.shape import LlamaShape
from am_lightning.pretrain.runtime.errors import RecipeError
from tests.recipes.parallel_runs import STEPS, fit
from tests.sharding.pool import Pool, RankError, pools

WAIT = 240  # seconds; a busy machine imports slowly
FIT = "tests.recipes.parallel_runs:fit"


@pytest.fixture(scope="module")
def pool() -> Iterator[Callable[[int], Pool]]:
    with pools() as start:
        yield start


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return fit("ddp")


def check(outs: list[dict[str, Any]], alone: dict[str, Any], *, loss: float = 1e-5, beta: float = 1e-4) -> None:
    """Require that every rank has the values of one process."""
    for out in outs:
        assert out["losses"] == pytest.approx(alone["losses"], rel=loss)
        assert len(out["betas"]) == STEPS
        for mine, theirs in zip(out["betas"], alone["betas"], strict=True):
            assert mine == pytest.approx(theirs, abs=beta)
    assert all(out["betas"] == outs[0]["betas"] for out in outs)  # the same bits on all ranks


def check_first_weights(out: dict[str, Any], alone: dict[str, Any]) -> None:
    """Require bitwise equality, whatever the number of processes is."""
    assert out["first"].keys() == alone["first"].keys()
    assert all((out["first"][name] == weight).all() for name, weight in alone["first"].items())


@pytest.mark.slow
def test_the_run_is_one_in_which_momentum_moves(alone: dict[str, Any]) -> None:
    inside = [0 < beta < 0.889 for step in alone["betas"] for beta in step.values()]
    assert sum(inside) > 10
    assert max(alone["norms"]) > 0.5  # the clipping is active


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), [("ddp", 2), ("fsdp1", 2), ("fsdp2", 2), ("tp2", 2), ("fsdp2tp2", 4)])
def test_a_strategy_trains_as_one_process(
    pool: Callable[[int], Pool], alone: dict[str, Any], name: str, world: int
) -> None:
    outs = pool(world).run(FIT, timeout=WAIT, name=name)
    check(outs, alone)
    assert outs[0]["norms"] == pytest.approx(alone["norms"], rel=5e-5)  # the weights drift apart
    if name != "fsdp1":  # FSDP1 shows flat shards
        check_first_weights(outs[0], alone)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="DeepSpeed compiles a CPU operator; there is no g++")
def test_deepspeed_stage_3_trains_as_one_process(pool: Callable[[int], Pool]) -> None:
    alone = fit("ddp")
    outs = pool(2).run(FIT, timeout=500, name="zero3")
    check(outs, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), [("fsdp2", 2), ("tp2", 2)])
def test_tied_and_checkpointed(pool: Callable[[int], Pool], name: str, world: int) -> None:
    options = {"tie_word_embeddings": True, "activation_checkpointing": True}
    alone = fit("ddp", **options)
    outs = pool(world).run(FIT, timeout=WAIT, name=name, **options)
    check(outs, alone)
    check_first_weights(outs[0], alone)
    assert "lm_head.weight" not in outs[0]["first"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_runs_and_learns(pool: Callable[[int], Pool], alone: dict[str, Any], precision: str) -> None:
    outs = pool(2).run(FIT, timeout=WAIT, name="fsdp2", precision=precision)
    check(outs, alone, loss=0.03, beta=1.0)
    assert outs[0]["losses"][-1] < outs[0]["losses"][0] - 0.2


@pytest.mark.slow
def test_sizes_that_do_not_divide_are_refused_on_every_rank(pool: Callable[[int], Pool]) -> None:
    answers = pool(2).attempt(FIT, timeout=WAIT, name="tp2", num_heads=4, num_key_value_heads=1)
    assert all(isinstance(answer, RankError) and answer.kind == "RecipeError" for answer in answers)
    expected = "model.num_key_value_heads is 1, which tensor_parallel_size 2 does not divide"
    assert all(expected in answer.text for answer in answers)


@pytest.mark.slow
def test_a_precision_that_fsdp2_has_not_is_refused(pool: Callable[[int], Pool]) -> None:
    answers = pool(2).attempt(FIT, timeout=WAIT, name="fsdp2", precision="16-true")
    assert all(isinstance(answer, RankError) and "trainer.precision is '16-true'" in answer.text for answer in answers)


def test_what_would_divide_is_named() -> None:
    shape = LlamaShape(48, 96, 12, 2, 96, 24)
    check_tensor_parallel(shape, 6)
    with pytest.raises(RecipeError, match=r"model.num_heads is 12, which .* 8 does not divide.* 1, 2, 3, 4, 6"):
        check_tensor_parallel(shape, 8)
    with pytest.raises(RecipeError, match=r"model.intermediate_size is 5461, which tensor_parallel_size 2 .*: 1$"):
        check_tensor_parallel(LlamaShape(2048, 5461, 32, 24, 32100, 256), 2)
