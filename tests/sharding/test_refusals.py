"""Sums that cannot be exact are refused at the first step, by every rank, with a remedy, before anything moves."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from am_lightning import AMSGD, AMAdamW
from tests.sharding.pool import Pool, RankError

TIMEOUT = 60  # seconds of a whole pool's attempt, after which it counts as a hang
FLAT = "use_orig_params=False.*Set use_orig_params=True.*fsdp_use_orig_params: true.*scope='global' or 'group'"
UNKNOWN = (
    "scope='{scope}' needs the whole model.* 2 ranks .* parameter 'shift'.* not all 4 of the world.*"
    "pass replica_group.*optimizer.pipeline_group.*scope='tensor' needs neither"
)


def attempt(pool: Callable[[int], Pool], world: int, case: str, **arguments: Any) -> list[dict[str, Any]]:
    ranks = pool(world).attempt("tests.sharding.refusals:attempt", timeout=TIMEOUT, case=case, **arguments)
    for rank in ranks:
        assert not isinstance(rank, RankError), str(rank)
    return ranks


def assert_refused(ranks: list[dict[str, Any]], text: str) -> None:
    for rank in ranks:
        assert rank["error"] == "ValueError", rank["text"]
        assert re.search(text, rank["text"]), rank["text"]
        assert not rank["moved"] and not rank["states"]


def assert_stepped(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["error"] is None, rank["text"]
        assert rank["moved"] and rank["states"]


# ---------------------------------------------------------------- placements
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_partial_parameter(pool: Callable[[int], Pool], world: int, scope: str) -> None:
    ranks = attempt(pool, world, "partial_parameter", scope=scope)
    assert_refused(ranks, r"'sums.weight' is a DTensor placed as \(Partial.*Redistribute it to Shard or Replicate")


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_shards_that_do_not_add_up(pool: Callable[[int], Pool], world: int, scope: str) -> None:
    ranks = attempt(pool, world, "pieces_do_not_add_up", scope=scope)
    found = f"'short.weight', placed as .* on mesh .*, has 15 elements, but the shards on ranks .* have {6 * world}:"
    assert_refused(ranks, f"{found}.*Shard the model before the optimizer is built")


def test_one_shard_that_is_too_large(pool: Callable[[int], Pool]) -> None:
    ranks = attempt(pool, 4, "one_piece_too_large", scope="tensor")
    assert_refused(ranks, "'long.weight', placed as .*, has 24 elements, but the shards on ranks 0, 1, 2, 3 have 27")


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_mesh_that_leaves_ranks_out(pool: Callable[[int], Pool], scope: str) -> None:
    """The ranks outside raise, and those inside do not wait for them."""
    ranks = attempt(pool, 4, "outside_of_the_mesh", scope=scope)
    for number, rank in enumerate(ranks[2:], start=2):
        assert_refused([rank], rf"'pair.weight' is a DTensor on a mesh of ranks \[0, 1\], and this rank is {number}")
    if scope == "tensor":
        assert_stepped(ranks[:2])
    else:
        assert_refused(ranks[:2], "scope='global' needs the whole model, but the 2 ranks that hold .*'pair.weight'")


# ---------------------------------------------------------------- groups
@pytest.mark.parametrize("world", [2, 4])
def test_a_replica_group_that_overlaps_the_mesh(pool: Callable[[int], Pool], world: int) -> None:
    ranks = attempt(pool, world, "replicas_inside_the_mesh", scope="tensor")
    assert_refused(ranks, "replica_group has ranks 0, 1.* in the mesh of 'table.weight'.*Leave replica_group out")


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_copies_that_nobody_named(pool: Callable[[int], Pool], kind: str) -> None:
    """With TP under DDP the other ranks could hold copies or other stages. The sums of one tensor need no more."""
    for scope in ("global", "group"):
        ranks = attempt(pool, 4, "replicas_not_named", scope=scope, kind=kind)
        assert_refused(ranks, UNKNOWN.format(scope=scope))
    assert_stepped(attempt(pool, 4, "replicas_not_named", scope="tensor", kind=kind))


def test_copies_are_warned_of_once_until_they_are_named(pool: Callable[[int], Pool]) -> None:
    """No error is possible, because with scope "tensor" the ranks may be independent. A group set later counts."""
    ranks = pool(2).run("tests.sharding.refusals:copies_named_late", timeout=TIMEOUT)
    for rank in ranks:
        (text,) = rank["texts"][0]
        assert re.search("initialised with 2 processes.* replica_group=torch.distributed.group.WORLD", text)
        assert rank["texts"][1:] == [[], [], []]
        assert all("no reduction" in text for text in rank["described"][:2])
        assert all("1 all-reduce a step: 1 x 4 numbers over 2 ranks" in text for text in rank["described"][2:])
        assert rank["beta"] == ranks[0]["beta"]


@pytest.mark.parametrize("odd_ranks", [(0,), (2,), (1, 3)], ids=str)
@pytest.mark.parametrize("what", ["name", "shape", "count", "order"])
def test_replicas_with_another_model(pool: Callable[[int], Pool], what: str, odd_ranks: tuple[int, ...]) -> None:
    usual = {
        "name": "tensor 14 of 18 is 'mix.weight' with 30 elements in group 0, unlike on others",
        "shape": "tensor 14 of 18 is 'mix.weight' with 30 elements in group 0, unlike on others",
        "count": "there are 18 tensors, fewer than on others",
        "order": "tensor 0 of 18 is 'shift' with 6 elements",
    }
    odd = {
        "name": "tensor 14 of 18 is 'odd.weight'",
        "shape": "tensor 14 of 18 is 'mix.weight' with 21 elements",
        "count": "tensor 18 of 19 is 'extra.weight'",
        "order": "tensor 0 of 18 is 'gain' with 1 elements",
    }
    ranks = attempt(pool, 4, "other_models", what=what, odd_ranks=odd_ranks, scope="tensor")
    for number, rank in enumerate(ranks):
        here = odd[what] if number in odd_ranks else usual[what]
        text = (
            f"ranks 0, 1, 2, 3 do not hold the same model: on rank {number} {here}.*Build the optimizer from the same"
        )
        assert_refused([rank], text)


def test_replicas_with_other_groups(pool: Callable[[int], Pool]) -> None:
    ranks = attempt(pool, 4, "other_groups", odd_ranks=(3,), scope="group")
    assert_refused(ranks, r"do not hold the same model: .*tensor 3 of 18 is '.*' with 6 elements in group [01], unlike")


@pytest.mark.parametrize("what", ["count", "order"])
@pytest.mark.parametrize("world", [2, 4])
def test_one_rank_of_fsdp2_with_another_model(pool: Callable[[int], Pool], world: int, what: str) -> None:
    ranks = attempt(pool, world, "other_sharded_models", what=what, odd_ranks=(1,), scope="global")
    assert_refused(ranks, "do not hold the same model: on rank .*Build the optimizer from the same")


def test_a_group_without_this_rank(pool: Callable[[int], Pool]) -> None:
    """new_group returns no group to ranks that it leaves out, and they raise at once."""
    ranks = pool(4).run("tests.sharding.refusals:not_a_member", timeout=TIMEOUT)
    assert ranks[:2] == [None, None]
    for kind, text in ranks[2:]:
        assert (
            kind == "TypeError"
            and "replica_group must be a torch.distributed.ProcessGroup that this rank is in" in text
        )


@pytest.mark.parametrize("value", ["WORLD", 2, [0, 1], object()], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["replica_group", "pipeline_group"])
@pytest.mark.parametrize("cls", [AMAdamW, AMSGD])
def test_what_is_no_process_group(cls: type[torch.optim.Optimizer], name: str, value: Any) -> None:
    optimizer = cls([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=f"Invalid {name}: .*{name} must be a torch.distributed.ProcessGroup.*or None"):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) is None
    setattr(optimizer, name, None)


@pytest.mark.parametrize("value", [None, nn.Linear, [nn.Parameter(torch.ones(2))]], ids=["None", "class", "list"])
def test_what_is_no_model(value: Any) -> None:
    optimizer = AMAdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=r"Invalid model: .*model must be a torch.nn.Module"):
        optimizer.bind_model(value)


# ---------------------------------------------------------------- FSDP1
@pytest.mark.parametrize("bind", [True, False], ids=["bound", "unbound"])
@pytest.mark.parametrize("layout", ["fsdp1_flat", "fsdp1_flat_no_shard"])
@pytest.mark.parametrize("world", [2, 4])
def test_one_beta_for_each_tensor_of_a_flat_parameter(
    pool: Callable[[int], Pool], world: int, layout: str, bind: bool
) -> None:
    for kind in ("adamw", "sgd"):
        ranks = attempt(pool, world, "flat_parameters", scope="tensor", kind=kind, layout=layout, bind=bind)
        assert_refused(ranks, f"parameters 'shift' and '.*' are in one flat parameter .*{FLAT}")
    for scope in ("global", "group"):
        assert_stepped(attempt(pool, world, "flat_parameters", scope=scope, kind="adamw", layout=layout, bind=bind))


@pytest.mark.parametrize("original", [True, False], ids=["original", "flat"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_fsdp1_over_tensor_parallel(pool: Callable[[int], Pool], scope: str, original: bool) -> None:
    ranks = attempt(pool, 4, "fsdp1_over_tensor_parallel", scope=scope, original=original, bind=True)
    assert_refused(ranks, "'blocks.0.up.weight' is split by tensor parallel and again by FSDP1 .*Use FSDP2")


def test_flat_parameters_show_tensor_parallel_without_the_model(pool: Callable[[int], Pool]) -> None:
    ranks = attempt(pool, 4, "fsdp1_over_tensor_parallel", scope="global", original=False, bind=False)
    assert_refused(ranks, "'blocks.0.up.weight' is split by tensor parallel and again by FSDP1 .*Use FSDP2")
