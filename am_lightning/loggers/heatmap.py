"""A heat map of beta_t of every layer over the whole run, whose memory and picture do not grow with the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from am_lightning.loggers.heatmap_image import PANEL_WIDTH, Cells, draw
from am_lightning.loggers.metrics import in_a_sentence, shortened

_SUMS = "totals", "at_max", "steps"
_MOST_ROWS = 150  # rows of a panel, at 2 pixels each


class HeatMap:
    """Keep beta_t of each layer over the steps, and draw it, at a size that does not grow with the run.

    The steps since the first reading are divided into columns of ``span`` steps. When the last column is full, each
    pair of neighbouring columns is merged and ``span`` doubles. A column keeps the mean and the lowest beta_t, so a dip
    of one step stays visible for the whole run.

    A reading that covers several columns gives each of them its share of the sums, and its lowest beta_t to all of
    them, because the reading does not tell which of them had it. A column stays blank if no reading covers it or the
    layer did not step.

    Args:
        layers: paths of the layers, from the first layer to the last.
        cap: the largest cap of beta_t so far, which is the light end of the colours.
        columns: largest number of columns, an even number from 2 to 400. Default: 240.

    Raises:
        ValueError: if ``layers`` is empty, ``cap`` is below 0, or ``columns`` is odd or out of range.
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
        """Set the layers and the cap of the readings that follow.

        A layer that was known keeps its columns, a new layer starts blank, and a layer that no longer exists moves to
        the end. If no layer was known, for instance because the parameters have just been named, the map is cleared.

        Args:
            layers: paths of the layers, from the first layer to the last.
            cap: the largest cap of beta_t. A smaller cap than before has no effect.
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
        self._first, self._last, self._span = 0, 0, 0  # steps before the first column, last step, steps of a column
        self._blank()

    def _blank(self) -> None:
        shape = self.columns, len(self.layers)
        self._sums, self._lowest = np.zeros((len(_SUMS), *shape)), np.full(shape, np.inf)

    @property
    def _used(self) -> int:
        """Number of columns from the first reading to the end of the last one."""
        return -((self._first - self._last) // self._span) if self._span else 0

    def add(
        self, start: int, end: int, totals: np.ndarray, at_max: np.ndarray, steps: np.ndarray, lowest: np.ndarray
    ) -> None:
        """Add one reading of the optimizer steps ``start + 1`` to ``end``.

        A reading that starts before the end of the last one, for instance after a return to an earlier checkpoint,
        replaces everything after ``start``. The column that contains ``start`` keeps the lowest beta_t of both.

        Args:
            start: number of steps before the reading.
            end: last step of the reading. A reading without steps is ignored.
            totals: ``[layers]`` sum of beta_t over all steps and tensors of the layer, for the layers of the last
                ``cover``. A layer whose sum is not finite counts as a layer that did not step.
            at_max: ``[layers]`` number of summands at their cap.
            steps: ``[layers]`` number of summands, 0 if the layer did not step.
            lowest: ``[layers]`` lowest summand, inf if the layer did not step.
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
        """Remove the steps after ``start``. The column that contains ``start`` keeps its share of the sums."""
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
        """Return the picture, uint8 ``[height, width, 3]``. Its size (about 1000 x 720) depends on the layers only.

        Two panels show the mean and the lowest beta_t of each column. A row is one layer, or several neighbouring
        layers if there are more than 150. The steps so far fill the width. Grey cells were not measured.

        Raises:
            ImportError: if Pillow, which draws the text, is not installed.
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
            self.cap or 1.0,  # a cap of 0 leaves all cells at the dark end
            title=title,
            caption=f"{caption}; grey: not measured",
            remarks=self._deepest(names),
        )

    def sums(self) -> list[float]:
        """Return the sum of beta_t over all layers and steps, the number of summands at their cap, and their number."""
        found: list[float] = self._sums.sum(axis=(1, 2)).tolist()
        return found

    def dips(self) -> dict[str, tuple[float, int, int]]:
        """Map each layer that has stepped to its lowest beta_t, the steps before its column, and the column's end."""
        if not self._used:
            return {}
        found = {}
        for row, column in enumerate(self._lowest.argmin(axis=0).tolist()):
            first = self._first + column * self._span
            if np.isfinite(lowest := float(self._lowest[column, row])):
                found[self.layers[row]] = lowest, first, min(first + self._span, self._last)
        return found

    def _deepest(self, names: Sequence[str], most: int = 3) -> list[tuple[str, str]]:
        """Return the ``most`` layers with the lowest beta_t, each with the value and its steps as text."""
        name, deepest = dict(zip(self.layers, names, strict=True)), []
        for layer, (lowest, first, last) in sorted(self.dips().items(), key=lambda item: item[1][0])[:most]:
            when = f"step {last:,}" if last == first + 1 else f"steps {first + 1:,} to {last:,}"
            deepest.append((in_a_sentence(name[layer]), f"{lowest:.3f} in {when}"))
        return deepest

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, names and tensors ``[columns so far, layers]``, safe for ``weights_only=True``."""
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
        """Load the layers, the cap and the columns of ``state``.

        The map is left empty if ``state`` has another number of columns.
        """
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
