"""HeatMap: the content of its columns, and what a reader of the picture sees."""

from __future__ import annotations

import io
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from am_lightning.loggers.heatmap import HeatMap
from am_lightning.loggers.heatmap_image import round_numbers

CAP = 0.89


def names(count: int) -> list[str]:
    return ["embed", *(f"layers.{index}" for index in range(count - 2)), "lm_head"]


def feed(heat: HeatMap, betas: np.ndarray, ends: Any, first: int = 0) -> None:
    """Add ``betas`` ``[steps, layers]`` of the steps after ``first`` as readings that end at ``ends``."""
    start = first
    for end in ends:
        part = betas[start - first : end - first]
        heat.add(start, end, part.sum(0), (part == CAP).sum(0), np.full(part.shape[1], float(len(part))), part.min(0))
        start = end


def quiet(steps: int, layers: int) -> np.ndarray:
    return np.full((steps, layers), CAP)


def panels(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the two panels: the coloured areas left of the colour bar."""
    coloured = np.ptp(image, axis=-1) > 0
    left, right = runs(coloured.any(axis=0))[0]
    (top, middle), (low, bottom) = runs(coloured[:, left:right].any(axis=1))
    return image[top:middle, left:right], image[low:bottom, left:right]


def runs(flags: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def dark(panel: np.ndarray) -> tuple[slice, slice] | None:
    """Return the smallest box around all dark pixels."""
    y, x = np.nonzero(panel.sum(axis=-1) < 200)
    return (slice(y.min(), y.max() + 1), slice(x.min(), x.max() + 1)) if len(y) else None


def png(image: np.ndarray) -> int:
    """Return the file's bytes as SummaryWriter.add_image writes them."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.tell()


@pytest.mark.parametrize("layers", [100, 300])
def test_dip_of_one_step(layers: int) -> None:
    """The dip is visible at its layer and step among 100,000, in the lower panel only."""
    betas = quiet(100_000, layers)
    step, layer = 61_234, layers * 3 // 5
    betas[step - 1, layer] = 0.05
    heat = HeatMap(names(layers), CAP)
    feed(heat, betas, range(50, 100_001, 50))
    mean, lowest = panels(heat.image("am/beta"))
    assert dark(mean) is None
    box = dark(lowest)
    assert box is not None
    height, width = lowest.shape[:2]
    assert box[0].start <= (layer + 0.5) / layers * height < box[0].stop
    assert box[1].start - 1 <= step / 100_000 * width <= box[1].stop + 1
    assert 2 <= box[0].stop - box[0].start <= 3 and 3 <= box[1].stop - box[1].start <= 8
    assert (lowest[box].sum(axis=-1) < 200).all()


def test_columns_hold_the_mean_and_the_lowest_of_their_steps() -> None:
    betas = np.random.default_rng(0).uniform(0, CAP, (1200, 3))
    heat = HeatMap(names(3), CAP, columns=16)
    feed(heat, betas, range(10, 1201, 10))
    state = heat.state_dict()
    assert state["span"] == 80 and state["first"] == 0 and state["last"] == 1200
    columns = betas.reshape(15, 80, 3)
    assert np.allclose(state["totals"] / state["steps"], columns.mean(axis=1))
    assert np.array_equal(state["lowest"], columns.min(axis=1))


def test_readings_of_any_length_lose_nothing_and_leave_no_blank() -> None:
    random = np.random.default_rng(0)
    betas = random.uniform(0.5, CAP, (5000, 2))
    betas[3210, 1] = 0.1
    heat = HeatMap(["a", "b"], CAP, columns=20)
    feed(heat, betas, [*sorted(random.choice(np.arange(7, 5000), 60, replace=False).tolist()), 5000])
    state = heat.state_dict()
    assert (state["steps"] > 0).all() and torch.isfinite(state["lowest"]).all()
    assert np.allclose(state["totals"].sum(0), betas.sum(0)) and np.allclose(state["steps"].sum(0), 5000)
    last = state["last"] - (len(state["steps"]) - 1) * state["span"]
    assert np.allclose(state["steps"][:, 0], [*[state["span"]] * (len(state["steps"]) - 1), last])
    assert state["lowest"][3210 // state["span"], 1] == 0.1
    assert (state["lowest"] < 0.4).sum() <= 3  # the columns of its reading


def test_sizes_do_not_grow() -> None:
    heat, shapes, sizes = HeatMap(names(7), CAP), set(), []
    shapes.add(heat.image().shape)
    for start in range(0, 3000):
        feed(heat, quiet(1, 7), [start + 1], first=start)
        if start in (0, 2, 400, 2999):
            shapes.add(heat.image("title").shape)
            sizes.append(sum(value.numel() for value in heat.state_dict().values() if torch.is_tensor(value)))
    assert len(shapes) == 1 and max(sizes) <= 4 * 240 * 7
    for layers in (7, 100, 150, 1000):
        height, width, _ = HeatMap(names(layers), CAP).image().shape
        assert 650 <= height <= 850 and width == 1000


def test_a_young_run_fills_the_width() -> None:
    heat = HeatMap(names(100), CAP)
    betas = quiet(150, 100)
    betas[50:100] = 0.05
    feed(heat, betas, [50, 100, 150])
    _, lowest = panels(heat.image())
    box = dark(lowest)
    third = lowest.shape[1] / 3
    assert box is not None and box[1] == slice(round(third), round(2 * third))


def test_colours_go_from_dark_to_light() -> None:
    """No colour of the scale is grey."""
    heat = HeatMap(names(100), CAP)
    feed(heat, np.linspace(0, CAP, 200)[:, None].repeat(100, axis=1), range(1, 201))
    _, lowest = panels(heat.image())
    lightness = lowest[0] @ [0.2126, 0.7152, 0.0722]
    assert lightness[0] < 10 and lightness[-1] > 240 and (np.diff(lightness) >= 0).all()
    assert len(np.unique(lightness)) > 25
    assert (np.ptp(lowest[0].astype(int), axis=-1) > 3).all()


def test_resumed_run_continues() -> None:
    betas = np.random.default_rng(0).uniform(0, CAP, (900, 5))
    whole, before, after = (HeatMap(names(5), CAP, columns=20) for _ in range(3))
    feed(whole, betas, range(20, 901, 20))
    feed(before, betas, range(20, 501, 20))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    state = before.state_dict()
    feed(before, betas[500:], range(520, 901, 20), first=500)
    assert np.array_equal(whole.image(), before.image())
    before.load_state_dict(state)  # later steps have not changed it
    after.load_state_dict(torch.load(file, weights_only=True))
    feed(after, betas[500:], range(520, 901, 20), first=500)
    feed(before, betas[500:], range(520, 901, 20), first=500)
    assert np.array_equal(whole.image(), after.image())
    assert np.array_equal(whole.image(), before.image())


def test_a_cap_of_zero_has_a_picture() -> None:
    """The whole picture is dark, without grey."""
    heat = HeatMap(names(100), 0.0)
    feed(heat, np.zeros((100, 100)), [50, 100])
    for panel in panels(heat.image()):
        assert (panel.sum(axis=-1) < 10).all() and panel.shape[1] == 800


def test_gap_is_grey() -> None:
    heat = HeatMap(names(100), CAP)
    feed(heat, quiet(400, 100), range(50, 401, 50))
    feed(heat, quiet(400, 100), range(650, 1001, 50), first=600)
    for panel in panels_with_blanks(heat.image()):
        grey = np.ptp(panel, axis=-1) == 0
        width = panel.shape[1]
        assert grey[:, round(0.4 * width) : round(0.6 * width)].all()
        assert not grey[:, : round(0.4 * width)].any() and not grey[:, round(0.6 * width) :].any()


def panels_with_blanks(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the panels as ``panels`` does, with blank parts between the first and the last column."""
    coloured = np.ptp(image, axis=-1) > 0
    *parts, _ = runs(coloured.any(axis=0))  # without the colour bar
    left, right = parts[0][0], parts[-1][1]
    (top, middle), (low, bottom) = runs(coloured[:, left : left + 1].any(axis=1))
    return image[top:middle, left:right], image[low:bottom, left:right]


@pytest.mark.parametrize("back", [300, 310])
def test_the_later_life_counts(back: int) -> None:
    """A run returns to an earlier checkpoint; 310 is inside a column of 20."""
    betas = np.random.default_rng(0).uniform(0.5, CAP, (600, 3))
    abandoned = betas.copy()
    abandoned[400:] = 0.01
    heat, plain = HeatMap(names(3), CAP, columns=40), HeatMap(names(3), CAP, columns=40)
    feed(plain, betas, [*range(20, back, 20), back, *range(back + 20, 581, 20)])
    feed(heat, abandoned, range(20, 601, 20))
    feed(heat, betas[back:], range(back + 20, 581, 20), first=back)
    assert heat.state_dict()["last"] == plain.state_dict()["last"]
    assert torch.allclose(heat.state_dict()["steps"], plain.state_dict()["steps"])
    assert (heat.state_dict()["lowest"] > 0.4).all()
    aligned = back % 20 == 0
    assert torch.allclose(heat.state_dict()["totals"], plain.state_dict()["totals"], rtol=0 if aligned else 0.1)


def test_return_inside_the_last_column() -> None:
    heat = HeatMap(["a"], CAP, columns=4)
    feed(heat, quiet(30, 1), [20, 30])
    feed(heat, quiet(15, 1), [40], first=25)
    assert heat.state_dict()["steps"].tolist() == [[20], [20]]


def test_a_life_before_the_first_reading_replaces_all() -> None:
    heat, plain = HeatMap(names(3), CAP), HeatMap(names(3), CAP)
    feed(heat, quiet(500, 3) / 2, range(150, 601, 50), first=100)
    for each in (heat, plain):
        feed(each, quiet(200, 3), range(100, 251, 50), first=50)
    assert np.array_equal(heat.image(), plain.image())


def test_layers_without_a_step_are_blank_and_stay_out_of_the_mean() -> None:
    heat = HeatMap(["a", "b", "c"], CAP, columns=4)
    for start in range(0, 80, 10):
        still = start < 40
        heat.add(
            start,
            start + 10,
            np.array([8.0, np.nan if still else 5.0, 0.0]),
            np.zeros(3),
            np.array([10.0, 10.0, 0.0]),
            np.array([0.7, np.nan if still else 0.4, np.inf]),
        )
    state = heat.state_dict()
    assert state["span"] == 20
    assert state["steps"].tolist() == [[20, 0, 0]] * 2 + [[20, 20, 0]] * 2
    assert (state["totals"] / state["steps"])[2:, :2].allclose(torch.tensor([0.8, 0.5], dtype=torch.float64))
    assert state["lowest"][:, 1].tolist() == [np.inf, np.inf, 0.4, 0.4]
    heat.image()  # must not warn of nan


def test_state_of_another_number_of_columns_leaves_it_empty() -> None:
    heat, other = HeatMap(names(7), CAP), HeatMap(names(7), CAP, columns=8)
    for each in (heat, other):
        feed(each, quiet(100, 7), [50, 100])
    heat.load_state_dict(other.state_dict())
    assert np.array_equal(heat.image(), HeatMap(names(7), CAP).image())


@pytest.mark.parametrize("resumed", [False, True])
def test_layers_that_come_and_go_keep_their_columns(resumed: bool) -> None:
    """A checkpoint may have older layers; columns before a layer came and after it went are blank."""
    heat = HeatMap(["b", "head"], 0.5, columns=4)
    feed(heat, np.full((20, 2), [0.4, 0.3]), [10, 20])
    if resumed:
        heat, before = HeatMap(["a", "b", "head"], CAP, columns=4), heat
        heat.load_state_dict(before.state_dict())
    heat.cover(["a", "b", "head"], CAP)
    feed(heat, np.full((10, 3), [0.8, 0.6, 0.5]), [30], first=20)
    heat.cover(["head", "c"], 0.2)
    feed(heat, np.full((10, 2), [0.1, 0.2]), [40], first=30)
    assert (heat.layers, heat.cap) == (["head", "c", "a", "b"], CAP)
    inf = math.inf
    assert heat.state_dict()["lowest"].T.tolist() == [
        [0.3, 0.3, 0.5, 0.1],
        [inf, inf, inf, 0.2],
        [inf, inf, 0.8, inf],
        [0.4, 0.4, 0.6, inf],
    ]
    assert heat.state_dict()["steps"].sum(0).tolist() == [40, 10, 10, 30]


def test_layers_that_were_named_begin_again() -> None:
    heat = HeatMap(["0"], CAP)
    feed(heat, quiet(20, 1), [20])
    heat.cover(["a", "b"], CAP)
    feed(heat, quiet(20, 2), [40], first=20)
    assert heat.layers == ["a", "b"] and heat.state_dict()["first"] == 20


def test_size_of_the_file() -> None:
    """The file has at most 60 kB with 100 layers that differ in every cell, and the largest number of columns."""
    random = np.random.default_rng(0)
    betas = np.clip(CAP - random.exponential(0.02, (12_000, 100)), 0, CAP)
    betas[random.random(betas.shape) < 1e-3] = 0.3
    heat = HeatMap(names(100), CAP)
    feed(heat, betas, range(50, 12_001, 50))
    assert png(heat.image("am/beta")) <= 60_000


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install"):
        HeatMap(names(3), CAP).image()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": []}, "layers"),
        ({"cap": -0.1}, "cap"),
        ({"cap": float("nan")}, "cap"),
        ({"columns": 7}, "columns"),
        ({"columns": 402}, "columns"),
        ({"columns": 0}, "columns"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeatMap(**{"layers": ["a"], "cap": CAP, **arguments})


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100_000, [0, 20_000, 40_000, 60_000, 80_000, 100_000]),
        (123_400, 124_000, [123_400, 123_500, 123_600, 123_700, 123_800, 123_900, 124_000]),
        (0, 0.89, [0, 0.2, 0.4, 0.6, 0.8]),
    ],
)
def test_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert round_numbers(low, high, 8 if high > 1 else 6) == expected
