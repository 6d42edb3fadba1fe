"""HeatMap: beta_t of every layer over the whole run, in a memory and a picture that do not grow with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from am_lightning.loggers.heatmap_image import PANEL_WIDTH, Cells, draw
from am_lightning.loggers.metrics import in_a_sentence, shortened

_SUMS = "totals", "at_max", "steps"
_MOST_ROWS = 150  # of a panel: 2 pixels each


class HeatMap:
    """beta_t of each layer over the steps, in memory and as a picture, both of a size that does not grow with the run.

    The steps from the first reading on are divided into columns of ``span`` steps. When the last column is full, each
    pair of neighbours becomes one and ``span`` doubles. A column keeps the mean and the lowest beta_t, so a dip of one
    step stays visible for the whole run.

    A reading of several columns gives each of them its share of the sums, and its lowest beta_t to all of them: which
    one had it is not known. A column that a reading does not cover, or where a layer did not step, stays blank.

    Args:
        layers: paths, from the first layer to the last.
        cap: the largest beta_t so far, which is the light end of the colours.
        columns: how many at most, an even number up to 400.

    Raises:
        ValueError: ``layers`` is empty, ``cap`` is below 0, or ``columns`` is not such a number.
    """

    def __init__(self, layers: Sequence[str], cap: float, *, columns: int = 240) -> None:
        if not layers:
            raise ValueError("Invalid layers: there must be at least one")
        if not cap >= 0:
            raise ValueError(f"Invalid cap: {cap} (cap must be at least 0)")
        if columns % 2 or not 2 <= columns <= PANEL_WIDTH // 2:
            raise ValueError(f"Invalid columns: {columns} (columns must be even, 2 to {PANEL_WIDTH // 2})")
        self.layers, self.cap, self.columns = list(layers), cap, columns
        self._clear()

    def cover(self, layers: Sequence[str], cap: float) -> None:
        """From now on readings are of ``layers``, under ``cap``.

        A layer of before keeps its columns, a new one begins blank, and one that is no more comes last. Where all are
        others, as after they were named, the map begins anew.
        """
        self.cap = max(self.cap, cap)
        if list(layers) == self.layers[: len(layers)]:
            return
        before, sums, lowest = self.layers, self._sums, self._lowest
        gone = [layer for layer in before if layer not in set(layers)]
        self.layers = [*layers, *(gone if len(gone) < len(before) else [])]
        if len(gone) == len(before):
            self._clear()
            return
        kept = [self.layers.index(layer) for layer in before]
        self._blank()
        self._sums[..., kept], self._lowest[:, kept] = sums, lowest

    def _clear(self) -> None:
        self._first, self._last, self._span = 0, 0, 0  # steps before the first column, step of the last reading
        self._blank()

    def _blank(self) -> None:
        shape = self.columns, len(self.layers)
        self._sums, self._lowest = np.zeros((len(_SUMS), *shape)), np.full(shape, np.inf)

    @property
    def _used(self) -> int:
        """Columns from the first reading to the end of the last one."""
        return -((self._first - self._last) // self._span) if self._span else 0

    def add(
        self, start: int, end: int, totals: np.ndarray, at_max: np.ndarray, steps: np.ndarray, lowest: np.ndarray
    ) -> None:
        """Take one reading: the optimizer steps ``start + 1`` to ``end``.

        A reading that starts before the end of the last one, as after a return to an earlier checkpoint, takes the
        place of everything after ``start``. In the column that ``start`` lies in, the lowest beta_t of both remains.

        Args:
            start: steps before the reading.
            end: its last step. A reading without steps is ignored.
            totals: ``[layers]``, those of the last ``cover``, sum of beta_t over the steps of each tensor of the layer.
                A layer whose sum is not finite counts as one that did not step.
            at_max: ``[layers]`` how many numbers of that sum are at their cap.
            steps: ``[layers]`` how many numbers that sum has; 0 where the layer did not step.
            lowest: ``[layers]`` lowest of those numbers; inf where there are none.
        """
        if end <= start:
            return
        if start < self._last:
            self.forget_after(start)
        if not self._span:
            self._first, self._span = start, end - start
        while end - self._first > self._span * self.columns:
            self._merge_pairs()
        valid = np.isfinite(totals) & (steps > 0)
        begin, stop = (start - self._first) // self._span, -((self._first - end) // self._span)
        edges = np.arange(begin, stop + 1) * self._span + self._first
        edges[0], edges[-1] = start, end
        shares = np.diff(edges)[:, None] / (end - start)
        for of, numbers in zip(self._sums, (totals, at_max, steps), strict=True):
            of[begin:stop, : len(valid)] += np.where(valid, numbers, 0.0) * shares
        cells = self._lowest[begin:stop, : len(valid)]
        np.minimum(cells, np.where(valid, lowest, np.inf), out=cells)
        self._last = end

    def forget_after(self, start: int) -> None:
        """The steps after ``start`` are not of the run; of the column that it lies in, its share remains."""
        if start >= self._last:
            return
        if start <= self._first:
            self._clear()
            return
        column, kept = divmod(start - self._first, self._span)
        if kept:
            share = kept / min(self._span, self._last - self._first - column * self._span)
            self._sums[:, column] *= share
            column += 1
        self._sums[:, column:] = 0.0
        self._lowest[column:] = np.inf
        self._last = start

    def _merge_pairs(self) -> None:
        half = self.columns // 2
        for values, merge, blank in (*((of, np.add, 0.0) for of in self._sums), (self._lowest, np.minimum, np.inf)):
            values[:half] = merge(values[::2], values[1::2])
            values[half:] = blank
        self._span *= 2

    def image(self, title: str = "") -> np.ndarray:
        """The picture: uint8 ``[height, width, 3]``, of one size for a number of layers (about 1000 x 720).

        Two panels, the mean and the lowest beta_t of each column, have a row for each layer, or for several
        neighbours where there are more than 150. The steps so far fill the width. Grey is not measured.

        Raises:
            ImportError: Pillow, which writes the text, is not installed.
        """
        names = shortened(self.layers)
        together = -(-len(self.layers) // _MOST_ROWS)
        rows = np.arange(0, len(self.layers), together)
        totals, _, steps = np.add.reduceat(self._sums[:, : self._used], rows, axis=2)
        lowest = np.minimum.reduceat(self._lowest[: self._used], rows, axis=1)
        mean = np.divide(totals, steps, out=np.full_like(totals, np.nan), where=steps > 0)
        lowest = np.where(np.isfinite(lowest), lowest, np.nan)
        caption = f"beta_t, 0 to cap {self.cap:.6g}"
        if self._span:
            caption += f"; one column = {_count(self._span, 'step')}"
        if together > 1:
            caption += f"; one row = {together} layers"
        return draw(
            Cells([names[row] for row in rows], mean.T, lowest.T, self._first, self._last, self._span),
            self.cap or 1.0,  # of 0 all is at the dark end
            title=title,
            caption=f"{caption}; grey: not measured",
            remarks=self._deepest(names),
        )

    def sums(self) -> list[float]:
        """Of all layers and steps: beta_t, how often it was at its cap, and how many numbers these are."""
        found: list[float] = self._sums.sum(axis=(1, 2)).tolist()
        return found

    def dips(self) -> dict[str, tuple[float, int, int]]:
        """Layer -> the lowest beta_t, and its column: the steps before it, and its last; without those of no step."""
        if not self._used:
            return {}
        found = {}
        for row, column in enumerate(self._lowest.argmin(axis=0).tolist()):
            first = self._first + column * self._span
            if np.isfinite(lowest := float(self._lowest[column, row])):
                found[self.layers[row]] = lowest, first, min(first + self._span, self._last)
        return found

    def _deepest(self, names: Sequence[str], most: int = 3) -> list[tuple[str, str]]:
        """The layers with the lowest beta_t, each with what to say of it."""
        name, deepest = dict(zip(self.layers, names, strict=True)), []
        for layer, (lowest, first, last) in sorted(self.dips().items(), key=lambda item: item[1][0])[:most]:
            when = f"step {last:,}" if last == first + 1 else f"steps {first + 1:,} to {last:,}"
            deepest.append((in_a_sentence(name[layer]), f"{lowest:.3f} in {when}"))
        return deepest

    def state_dict(self) -> dict[str, Any]:
        """Numbers, names and tensors ``[columns so far, layers]`` that ``torch.load(weights_only=True)`` takes."""
        return {
            "layers": list(self.layers),
            "cap": self.cap,
            "columns": self.columns,
            "first": self._first,
            "last": self._last,
            "span": self._span,
            **{name: torch.from_numpy(values[: self._used].copy()) for name, values in self._arrays()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, with its layers and cap; one of another number of columns leaves the map empty."""
        self.layers, self.cap = list(state["layers"]), float(state["cap"])
        self._clear()
        if state["columns"] != self.columns:
            return
        self._first, self._last, self._span = int(state["first"]), int(state["last"]), int(state["span"])
        for name, values in self._arrays():
            values[: self._used] = state[name].cpu().numpy()

    def _arrays(self) -> list[tuple[str, np.ndarray]]:
        return [*zip(_SUMS, self._sums, strict=True), ("lowest", self._lowest)]


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
