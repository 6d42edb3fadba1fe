"""Draw a heat map with numpy and Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from am_lightning.optional_imports import cause_of

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

    Fonts = Mapping[int, ImageFont.FreeTypeFont | ImageFont.ImageFont]

# matplotlib's magma, whose lightness rises evenly, also for colour-blind readers. 0 is black and the cap is cream.
_ANCHORS = (
    (0, 0, 4), (16, 11, 45), (44, 17, 95), (81, 18, 124), (114, 31, 129), (147, 43, 128), (183, 55, 121),
    (216, 69, 108), (241, 96, 93), (252, 137, 97), (254, 176, 120), (254, 215, 153), (252, 253, 191),
)  # fmt: skip
_FEW_ROWS = 32
_SHADES = 255, 32  # up to _FEW_ROWS, and above: 100 rows of noise in 255 shades make a file of 150 kB
_BLANK, _PAPER, _INK, _SOFT = 205, 255, 0, 85  # greys
_GREYS = 85

PANEL_WIDTH = 800
_LEFT, _RIGHT = 128, 72
_BAR, _BAR_WIDTH = _LEFT + PANEL_WIDTH + 14, 14
_PANEL_HEIGHT, _THICKEST = 300, 48  # height of a panel, largest height of a row
_ABOVE, _BETWEEN, _BELOW = 56, 32, 56
_LINE_APART = 17  # smallest distance of two names in pixels
_NAME_IN_REMARK = 150


class Cells(NamedTuple):
    """The values of a heat map.

    Attributes:
        rows: names of the rows.
        mean: ``[rows, columns]`` mean beta_t, nan where nothing was measured.
        lowest: ``[rows, columns]`` lowest beta_t, nan where nothing was measured.
        first: number of steps before the first column.
        last: last step measured, which may lie before the end of the last column.
        span: steps of a column, 0 if nothing was measured.
    """

    rows: Sequence[str]
    mean: np.ndarray
    lowest: np.ndarray
    first: int
    last: int
    span: int


def draw(cells: Cells, cap: float, *, title: str, caption: str, remarks: Sequence[tuple[str, str]]) -> np.ndarray:
    """Draw the panel "mean" above the panel "lowest", with axes and a colour bar, as uint8 ``[height, width, 3]``.

    Args:
        cells: values of the panels.
        cap: beta_t at the light end of the colours, above 0. The dark end is 0.
        title: first line of the picture.
        caption: last line of the picture.
        remarks: pairs of a name and a text, written at the right above the lower panel. Pairs without room are left
            out, the last ones first.

    Raises:
        ImportError: if Pillow is not installed or older than 10.1.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont

        fonts = {size: ImageFont.load_default(size) for size in (12, 15)}
    except (ImportError, TypeError) as error:  # TypeError: the font of an older Pillow has one size
        cause = cause_of(error, "PIL") if isinstance(error, ImportError) else None
        raise ImportError("the heat map needs Pillow 10.1 or newer: pip install --upgrade pillow") from cause
    row = max(2, min(_THICKEST, round(_PANEL_HEIGHT / len(cells.rows))))
    panel = row * len(cells.rows)
    tops = (_ABOVE, _ABOVE + panel + _BETWEEN)
    bottom = tops[1] + panel
    shades = _SHADES[len(cells.rows) > _FEW_ROWS]
    image = Image.new("L", (_LEFT + PANEL_WIDTH + _RIGHT, bottom + _BELOW), 255)
    pen = _Pen(ImageDraw.Draw(image), fonts)
    pen.text(_LEFT, 16, pen.shorten(title, 0.8 * PANEL_WIDTH), size=15)  # measured at size 12
    for top, name in zip(tops, ("mean", "lowest"), strict=True):
        pen.frame(_LEFT, top, PANEL_WIDTH, panel)
        pen.text(_LEFT, top - 11, f"{name} beta_t")
        _draw_names(pen, cells.rows, top, row)
        _draw_steps(pen, cells, top + panel, labels=top == tops[1])
    _draw_remarks(pen, remarks, tops[1] - 11)
    _draw_scale(pen, cap, _ABOVE, bottom)
    pen.text(_LEFT, bottom + 41, caption, grey=_SOFT)
    # Few greys in the edges of letters make files a third smaller.
    pixels = (np.array(image, dtype=int) + _GREYS // 2) // _GREYS * _GREYS
    picture: np.ndarray = np.minimum(pixels, 255).astype(np.uint8)[..., None].repeat(3, axis=-1)
    for top, values in zip(tops, (cells.mean, cells.lowest), strict=True):
        picture[top : top + panel, _LEFT : _LEFT + PANEL_WIDTH] = _panel(values, cells, cap, row, shades)
    picture[_ABOVE:bottom, _BAR : _BAR + _BAR_WIDTH] = _colours(np.linspace(1, 0, bottom - _ABOVE), shades)[:, None]
    return picture


def _colours(share: np.ndarray, shades: int) -> np.ndarray:
    """Return the colours of values from 0 to 1 as uint8 ``[..., 3]``."""
    anchors = np.array(_ANCHORS, dtype=float)
    share = (np.clip(share, 0, 1) * shades).round() / shades * (len(anchors) - 1)
    channels = [np.interp(share, np.arange(len(anchors)), channel) for channel in anchors.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _panel(values: np.ndarray, cells: Cells, cap: float, row: int, shades: int) -> np.ndarray:
    """Return the pixels of a panel as uint8 ``[rows * row, PANEL_WIDTH, 3]``."""
    pixels = np.full((len(cells.rows), PANEL_WIDTH, 3), _BLANK, dtype=np.uint8)
    if cells.span:
        # Every column is wider than two pixels, so the centre of at least one pixel lies in it.
        steps = (np.arange(PANEL_WIDTH) + 0.5) * (cells.last - cells.first) / PANEL_WIDTH
        columns = (steps // cells.span).astype(int)
        pixels = np.where(np.isnan(values)[..., None], pixels[:, :1], _colours(np.nan_to_num(values) / cap, shades))[
            :, columns
        ]
    pixels = pixels.repeat(row, axis=0)
    if row >= 8:
        pixels[row - 1 : -1 : row] = _PAPER
    return pixels


def _draw_names(pen: _Pen, names: Sequence[str], top: int, row: int) -> None:
    every = -(-_LINE_APART // row)
    shown = list(range(0, len(names), every))
    if len(names) > 1 and shown[-1] != len(names) - 1:
        shown[-1 if len(shown) > 1 else len(shown) :] = [len(names) - 1]
    for index in shown:
        y = top + index * row + row / 2
        pen.text(_LEFT - 8, y, pen.shorten(names[index], _LEFT - 14), align="r")
        pen.line(_LEFT - 5, y, _LEFT - 1, y)


def _draw_steps(pen: _Pen, cells: Cells, y: int, *, labels: bool) -> None:
    if not cells.span:
        return
    ticks = [tick for tick in round_numbers(cells.first, cells.last, 8) if tick.is_integer()]
    unit, letter = (1e6, "M") if cells.last >= 1e6 else (1e3, "k") if cells.last >= 1e4 else (1, "")
    for tick in ticks:
        x = _LEFT + (tick - cells.first) / (cells.last - cells.first) * (PANEL_WIDTH - 1)
        pen.line(x, y, x, y + 4)
        if labels:
            pen.text(x, y + 14, f"{tick / unit:.9g}{letter if tick else ''}", align="m")
    if labels:
        pen.text(_LEFT - 32, y + 14, "step", align="r", grey=_SOFT)


def _draw_remarks(pen: _Pen, remarks: Sequence[tuple[str, str]], y: int) -> None:
    texts = [f"{pen.shorten(name, _NAME_IN_REMARK)} {text}" for name, text in remarks]
    while texts:
        line = "deepest: " + ";  ".join(texts)
        if pen.width(line) <= PANEL_WIDTH - 60:
            pen.text(_LEFT + PANEL_WIDTH, y, line, align="r", grey=_SOFT)
            return
        texts.pop()


def _draw_scale(pen: _Pen, cap: float, top: int, bottom: int) -> None:
    x = _BAR + _BAR_WIDTH
    pen.frame(_BAR, top, _BAR_WIDTH, bottom - top)
    ticks = [tick for tick in round_numbers(0, cap, 6) if tick < 0.96 * cap]
    for tick in [*ticks, cap]:
        y = bottom - 1 - tick / cap * (bottom - top - 1)
        pen.line(x, y, x + 3, y)
        pen.text(x + 6, y, f"{tick:.3g}")


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Return about ``most`` multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``."""
    least = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    return [round(float(index * step), 9) for index in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


class _Pen:
    """Draw text and lines on an image. ``y`` of a text is the vertical middle of its line."""

    def __init__(
        self, image: ImageDraw.ImageDraw, fonts: Mapping[int, ImageFont.FreeTypeFont | ImageFont.ImageFont]
    ) -> None:
        self._image, self._fonts = image, fonts

    def text(self, x: float, y: float, text: str, *, align: str = "l", size: int = 12, grey: int = _INK) -> None:
        self._image.text((round(x), round(y)), text, fill=grey, font=self._fonts[size], anchor=f"{align}m")

    def width(self, text: str) -> float:
        return self._image.textlength(text, font=self._fonts[12])

    def shorten(self, text: str, width: float) -> str:
        """Return ``text``, with its middle replaced by ".." if it is wider than ``width`` pixels."""
        short, kept = text, len(text) - 2
        while self.width(short) > width and kept > 2:
            short = f"{text[: kept // 2]}..{text[len(text) - kept + kept // 2 :]}"
            kept -= 1
        return short

    def line(self, *ends: float) -> None:
        self._image.line([round(end) for end in ends], fill=_SOFT)

    def frame(self, left: int, top: int, width: int, height: int) -> None:
        """Draw a line around an area of ``width`` x ``height`` pixels."""
        self._image.rectangle((left - 1, top - 1, left + width, top + height), outline=_SOFT)
