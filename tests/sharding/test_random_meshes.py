"""Meshes, placements, shapes and missing gradients at random: the result is one process's, or all ranks refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.sharding.pool import Pool, RankError
from tests.sharding.random_meshes import DIMS, OTHER_ROOT, Drawn, Example

MESHES = {
    2: [(2,), (1, 2), (2, 1), (1, 2, 1)],
    4: [(4,), (2, 2), (1, 4), (4, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1)],
}
STEPS = 4
SIZES = st.sampled_from([5, 1, 3, 8, 2, 0])  # uneven over 2 and 4; one row; none
RATES = {"adamw": (1.0, 2.0, 0.7, 1.5, 0.0), "sgd": (1.0, 0.5, 0.7, 1.5, 0.0)}  # many betas lie inside the clamps


@st.composite
def tensors(draw: st.DrawFn, names: tuple[str, ...], roots: tuple[tuple[str, ...], ...]) -> Drawn:
    """Draw tensors on all of ``names``, some of them, none, or one of ``roots``."""
    shape = tuple(draw(st.lists(SIZES, max_size=3)))
    some = st.lists(st.sampled_from(names), unique=True).map(lambda chosen: tuple(n for n in names if n in chosen))
    dims = draw(st.one_of(st.just(names), some, *(st.just(root) for root in roots)))
    return Drawn(
        shape=shape,
        dims=dims,
        splits=tuple(draw(st.sampled_from([None, *range(len(shape))])) for _ in dims),
        present=tuple(draw(st.sampled_from([True, True, True, False])) for _ in range(STEPS)),
        partial=draw(st.booleans()),
        none_if_empty=draw(st.booleans()),
        group=draw(st.integers(0, 1)),
    )


@st.composite
def examples(draw: st.DrawFn, *, part_of_the_world: bool = False) -> Example:
    mesh_shape = draw(st.sampled_from(MESHES[4] + MESHES[2]))
    names, roots = DIMS[: len(mesh_shape)], (OTHER_ROOT,) if draw(st.booleans()) else ()
    if part_of_the_world:
        mesh_shape = draw(st.sampled_from([shape for shape in MESHES[4] if max(shape) == 2]))
        names, roots = tuple(draw(st.sampled_from([DIMS[: len(mesh_shape) - 1], DIMS[1 : len(mesh_shape)]]))), ()
    kind = draw(st.sampled_from(["adamw", "sgd"]))
    return Example(
        mesh_shape=mesh_shape,
        tensors=tuple(draw(st.lists(tensors(names, roots), min_size=2, max_size=7))),
        kind=kind,
        scope=draw(st.sampled_from(["global", "group"] if part_of_the_world else ["tensor", "global", "group"])),
        rates=tuple(draw(st.sampled_from(RATES[kind])) for _ in range(STEPS)),
        seed=draw(st.integers(0, 999)),
    )


def spanned(example: Example) -> int:
    """Return the number of ranks of the smallest mesh slice that has all tensors; 1 if all are plain."""
    used = {dim for tensor in example.tensors for dim in tensor.dims}
    if used & set(OTHER_ROOT):
        return math.prod(example.mesh_shape)
    return math.prod(size for dim, size in zip(DIMS, example.mesh_shape, strict=False) if dim in used)


def is_refused(example: Example) -> bool:
    """Return whether the other ranks' content is unknown: copies, or other parts of the model."""
    return example.scope != "tensor" and spanned(example) not in (1, math.prod(example.mesh_shape))


def attempt(pool: Callable[[int], Pool], example: Example) -> list[Any]:
    return pool(math.prod(example.mesh_shape)).attempt("tests.sharding.random_meshes:run", example=example)


def check(ranks: list[Any], example: Example) -> None:
    for rank in ranks:
        assert not isinstance(rank, RankError), str(rank)
        assert "refused" not in rank, rank.get("refused")
        assert rank["raw"] <= 1e-12 and rank["beta"] <= 1e-12 and rank["weights"] <= 1e-12
        assert rank["bits"] == ranks[0]["bits"] and rank["weight_bits"] == ranks[0]["weight_bits"]
        assert rank["collectives"] == int(spanned(example) > 1)


@pytest.mark.slow
def test_random_layouts_are_what_one_process_gets(pool: Callable[[int], Pool]) -> None:
    betas, interior = [], []

    @settings(derandomize=True, max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(examples())
    def try_one(example: Example) -> None:
        assume(not is_refused(example))
        ranks = attempt(pool, example)
        check(ranks, example)
        betas.append(ranks[0]["betas"])
        interior.append(ranks[0]["interior"])

    try_one()
    assert sum(interior) > 0.2 * sum(betas) > 20, "the clamps would hide wrong sums"


@pytest.mark.slow
def test_where_the_meshes_leave_ranks_out_all_refuse_scopes_beyond_a_tensor(pool: Callable[[int], Pool]) -> None:
    @settings(derandomize=True, max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(examples(part_of_the_world=True))
    def try_one(example: Example) -> None:
        assume(is_refused(example))
        for rank in attempt(pool, example):
            assert not isinstance(rank, RankError), str(rank)
            assert "needs the whole model" in rank["refused"] and not rank["moved"]
        example = replace(example, scope="tensor")
        check(attempt(pool, example), example)

    try_one()
