"""The rows of each step."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from am_lightning.pretrain.data import permutation
from am_lightning.pretrain.data.order import StepOrder, TokenRows
from am_lightning.pretrain.data.permutation import feistel, sample_rows
from am_lightning.pretrain.runtime.errors import RecipeError

sizes = st.integers(1, 60)
LARGE = [1756041, 109326, 2195177, 2616609]
C4 = [472960300, 31438673, 182803347, 113705168]
seeds = st.integers(0, 2**31)


@pytest.fixture(params=["array", "feistel"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Select how the permutation is computed: for a small data set, or for one too large for an array."""
    if request.param == "feistel":
        monkeypatch.setattr(permutation, "ROWS_IN_MEMORY", 0)
    return str(request.param)


@given(rows=sizes, seed=seeds, number=st.integers(0, 3))
def test_every_row_comes_once_in_a_pass(rows: int, seed: int, number: int) -> None:
    samples = np.arange(number * rows, (number + 1) * rows)
    assert sorted(sample_rows(samples, rows, seed)) == list(range(rows))
    assert sorted(feistel(np.arange(rows), rows, seed, number)) == list(range(rows))


@given(rows=sizes, seed=seeds, samples=st.lists(st.integers(0, 300), max_size=20))
@pytest.mark.filterwarnings("error")
def test_a_sample_does_not_depend_on_which_are_asked_for_with_it(rows: int, seed: int, samples: list[int]) -> None:
    alone = [int(sample_rows(np.array([sample]), rows, seed)[0]) for sample in samples]
    assert sample_rows(np.array(samples, int), rows, seed).tolist() == alone


def test_the_order_of_a_small_data_set_is_numpys() -> None:
    """Earlier runs must find their rows again."""
    expected = [*np.random.default_rng([5, 0]).permutation(7), *np.random.default_rng([5, 1]).permutation(7)]
    assert sample_rows(np.arange(14), 7, 5).tolist() == expected


def test_the_order_of_a_large_data_set_stays() -> None:
    rows = permutation.ROWS_IN_MEMORY + 1
    assert sample_rows(np.arange(4), rows, 0).tolist() == LARGE
    assert sample_rows(np.arange(4), 650_000_000, 0).tolist() == C4


def test_a_large_order_is_mixed() -> None:
    """Consecutive samples are spread like random numbers, and passes have nothing in common."""
    rows, count = 650_000_000, 100_000
    first, second = (feistel(np.arange(count), rows, 0, number) for number in range(2))
    shares = np.histogram(first, 50, (0, rows))[0] / count
    assert np.abs(shares - 1 / 50).max() < 0.002  # five standard deviations
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert abs(np.corrcoef(first % 2, np.arange(count) % 2)[0, 1]) < 0.02


def test_passes_and_seeds_have_their_own_order(method: str) -> None:
    def order(seed: int, number: int) -> list[int]:
        return sample_rows(np.arange(number * 100, number * 100 + 100), 100, seed).tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert orders[0] == order(0, 0)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert all(o != list(range(100)) for o in orders)


def _steps(
    rows: int, batch: int, steps: int, seed: int, world: int, accumulate: int, first: int = 0
) -> list[list[int]]:
    """Return the rows of every step over all ranks and micro-batches, in the order of the samples."""
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
def test_steps_are_the_same_for_every_world_size_and_accumulation(
    rows: int, share: int, steps: int, seed: int, world: int, accumulate: int
) -> None:
    batch = share * 8
    expected = [sample_rows(np.arange(s * batch, (s + 1) * batch), rows, seed).tolist() for s in range(steps)]
    assert _steps(rows, batch, steps, seed, world, accumulate) == expected


@given(rows=sizes, steps=st.integers(1, 6), first=st.integers(0, 6), accumulate=st.sampled_from([1, 2]))
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
    with pytest.raises(RecipeError, match=rf"data.batch_size 8 .* {world} \(processes .*\) x {accumulate}"):
        StepOrder(100, 8, 1, world_size=world, accumulate=accumulate)


def test_no_rows_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"shorter than one row.*model.seq_len"):
        StepOrder(0, 8, 1)


def test_rows_are_consecutive_slices() -> None:
    rows = TokenRows(np.arange(35, dtype=np.uint8), 8)
    assert len(rows) == 4
    assert rows[2].dtype == torch.int64
    assert rows[2].tolist() == list(range(16, 24))
