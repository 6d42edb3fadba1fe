"""Which rows make up which step."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from am_lightning.recipes.data.order import StepOrder, TokenRows, sample_row
from am_lightning.recipes.errors import RecipeError

sizes = st.integers(1, 60)
seeds = st.integers(0, 2**31)


@given(rows=sizes, seed=seeds, epoch=st.integers(0, 3))
def test_every_row_comes_once_in_a_pass(rows: int, seed: int, epoch: int) -> None:
    samples = [sample_row(epoch * rows + i, rows, seed) for i in range(rows)]
    assert sorted(samples) == list(range(rows))


def test_passes_and_seeds_have_their_own_order() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [sample_row(epoch * 100 + i, 100, seed) for i in range(100)]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert orders[0] == order(0, 0)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert all(o != list(range(100)) for o in orders)


def _steps(
    rows: int, batch: int, steps: int, seed: int, world: int, accumulate: int, first: int = 0
) -> list[list[int]]:
    """The rows of every step over all ranks and micro-batches, in the order of the samples."""
    ranks = [
        list(
            StepOrder(
                rows,
                batch,
                steps,
                seed=seed,
                rank=rank,
                world_size=world,
                accumulate=accumulate,
                first_step=lambda: first,
            )
        )
        for rank in range(world)
    ]
    assert all(len(batches) == (steps - first) * accumulate for batches in ranks)
    micro = [[row for rank in ranks for row in rank[i]] for i in range(len(ranks[0]))]
    return [list(chain(*micro[i : i + accumulate])) for i in range(0, len(micro), accumulate)]


@given(
    rows=sizes,
    share=st.integers(1, 3),
    steps=st.integers(1, 5),
    seed=seeds,
    world=st.sampled_from([1, 2, 4]),
    accumulate=st.sampled_from([1, 2]),
)
@settings(deadline=None)
def test_steps_are_the_same_for_every_world_size_and_accumulation(
    rows: int, share: int, steps: int, seed: int, world: int, accumulate: int
) -> None:
    batch = share * 8
    expected = [[sample_row(s * batch + i, rows, seed) for i in range(batch)] for s in range(steps)]
    assert _steps(rows, batch, steps, seed, world, accumulate) == expected


@given(rows=sizes, steps=st.integers(1, 6), first=st.integers(0, 6), accumulate=st.sampled_from([1, 2]))
@settings(deadline=None)
def test_a_resumed_order_is_the_rest_of_the_whole_one(rows: int, steps: int, first: int, accumulate: int) -> None:
    first = min(first, steps)
    whole = _steps(rows, 4, steps, 0, 2, accumulate)
    assert _steps(rows, 4, steps, 0, 2, accumulate, first) == whole[first:]


def test_the_position_is_read_when_iteration_begins() -> None:
    position = 0
    order = StepOrder(10, 2, 5, first_step=lambda: position)
    whole = list(order)
    position = 3
    assert list(order) == whole[3:]
    assert len(order) == 5  # Lightning counts from the beginning of the run


@pytest.mark.parametrize(("world", "accumulate"), [(3, 1), (2, 8), (1, 5)])
def test_an_indivisible_batch_is_refused(world: int, accumulate: int) -> None:
    with pytest.raises(RecipeError, match=rf"data.batch_size 8 .* {world} \(processes\) x {accumulate}"):
        StepOrder(100, 8, 1, world_size=world, accumulate=accumulate)


def test_no_rows_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"shorter than one row.*model.seq_len"):
        StepOrder(0, 8, 1)


def test_rows_are_consecutive_slices() -> None:
    rows = TokenRows(np.arange(35, dtype=np.uint8), 8)
    assert len(rows) == 4
    assert rows[2].dtype == torch.int64
    assert rows[2].tolist() == list(range(16, 24))


def test_a_sample_of_rows_is_evenly_spaced() -> None:
    tokens = np.arange(200, dtype=np.uint8)
    few = TokenRows(tokens, 10, rows=4)
    assert [int(few[i][0]) for i in range(len(few))] == [0, 50, 100, 150]
    assert len(TokenRows(tokens, 10, rows=99)) == 20
