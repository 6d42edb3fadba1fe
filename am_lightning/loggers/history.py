"""The history of beta_t by layer over a whole run: its heat map and its summary in one sentence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from am_lightning.loggers.metrics import in_a_sentence, shortened
from am_lightning.optim.intervals import Interval

if TYPE_CHECKING:
    from am_lightning.loggers.heatmap import HeatMap
    from am_lightning.loggers.images import Image

_REDRAWS = 18  # number in a run of known length; with the first and the last picture 20
_MOST = 39  # pictures before the last one
_GROWTH = 1.4  # growth of the step from one picture to the next in a run of unknown length
_DIPS = 3  # layers that the sentence names


class Dip(NamedTuple):
    """The lowest beta_t of a layer, and the interval of steps in which it was seen."""

    lowest: float
    after: int  # number of steps before the interval
    until: int  # last step of the interval

    def __str__(self) -> str:
        when = f"step {self.until}" if self.until == self.after + 1 else f"steps {self.after + 1} to {self.until}"
        return f"{self.lowest:.3f} in {when}"


class RunHistory:
    """Keep beta_t of each layer since the run began. Its size does not grow with the steps.

    Attributes:
        step: last step of the history.
    """

    def __init__(self) -> None:
        self.step = 0
        self._map: HeatMap | None = None
        self._dips: dict[str, Dip] = {}
        self._sums = [0.0] * 3  # over all tensors, in the order of HeatMap.sums
        self._loaded = False
        self._drawn = -1  # number of the last picture
        self._pictures = 0
        self._failed = False

    def begin(self, step: int) -> None:
        """Continue the run from ``step``; a history from a checkpoint still ends at its own last reading.

        A return to an earlier step removes the later steps, as exactly as the columns of the map allow. Without a map,
        the whole history is removed.

        Args:
            step: number of steps before the next interval.
        """
        if step < self.step and self._sums[-1]:
            self._forget_after(step)
        if step < self.step or not (self._loaded or self._sums[-1]):
            self.step = step

    def _forget_after(self, step: int) -> None:
        remaining = {layer: dip for layer, dip in self._dips.items() if dip.until <= step}
        if self._map is None:
            self._sums, self._dips = [0.0] * 3, {}
            return
        self._map.forget_after(step)
        self._sums = self._map.sums()
        self._dips = {layer: Dip(*dip) for layer, dip in self._map.dips().items()} | remaining

    def add(self, step: int, layers: Sequence[str], by_layer: Interval, cap: float) -> None:
        """Add an interval.

        Args:
            step: last step of the interval.
            layers: paths of the layers.
            by_layer: interval of beta_t, whose fields have the shape ``[layers]`` and are on the CPU.
            cap: the largest cap of beta_t.
        """
        after, self.step = min(self.step, step), step
        columns = (by_layer.total, by_layer.at_max, by_layer.steps)
        self._sums = [before + float(column.sum()) for before, column in zip(self._sums, columns, strict=True)]
        for layer, value in zip(layers, by_layer.lowest.tolist(), strict=True):
            if value < self._dips.get(layer, Dip(math.inf, 0, 0)).lowest:
                self._dips[layer] = Dip(value, after, step)
        heat_map = self._map_of(layers, cap)
        if heat_map is not None and step > after:
            heat_map.add(after, step, *(column.double().numpy() for column in (*columns, by_layer.lowest)))

    def _map_of(self, layers: Sequence[str], cap: float) -> HeatMap | None:
        """Return the heat map, or None without numpy. Every logger that accepts pictures depends on numpy."""
        if self._map is None and layers:
            try:
                from am_lightning.loggers.heatmap import HeatMap
            except ImportError:
                return None
            self._map = HeatMap(layers, cap)
        if self._map is not None:
            self._map.cover(layers, cap)
        return self._map

    def picture_is_due(self, total: int | None = None) -> bool:
        """Return whether the picture is to be drawn now: 20 times in a run of known length, and at most 40 times.

        Args:
            total: number of steps of the run. None: the number is unknown, and the steps between two pictures grow as
                the run gets longer.
        """
        if self._map is None or not self._sums[-1] or self._pictures >= _MOST:
            return False
        number = _REDRAWS * self.step // total if total else int(math.log(max(self.step, 1)) / math.log(_GROWTH))
        due, self._drawn = number > self._drawn, max(number, self._drawn)
        return due

    def picture(self, title: str) -> Image | None:
        """Return the heat map as uint8 ``[height, width, 3]``, or None before the first interval.

        An error while drawing, such as a missing Pillow, gives one warning and None, because a picture must not end a
        run.
        """
        if self._map is None or not self._sums[-1]:
            return None
        self._pictures += 1
        try:
            picture: Image = self._map.image(title)
            return picture
        except Exception as error:
            if not self._failed:
                warnings.warn(f"no picture of the layers: {type(error).__name__}: {error}", stacklevel=2)
            self._failed = True
            return None

    def sentence(self) -> str:
        """Return the mean, the share at the cap and the deepest dips with their steps; "" before the first interval."""
        total, at_max, steps = self._sums
        if not steps:
            return ""
        deepest = sorted(self._dips.items(), key=lambda item: item[1].lowest)[:_DIPS]
        names = dict(zip(self._dips, shortened(list(self._dips)), strict=True))
        dips = ", ".join(f"{in_a_sentence(names[layer])} {dip}" for layer, dip in deepest)
        at_cap = f"at the cap in {at_max / steps:.0%} of the tensors' steps"
        return f"mean beta_t {total / steps:.3f}, {at_cap}; lowest: {dips}"

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return {
            "step": self.step,
            "sums": self._sums,
            "pictures": [self._drawn, self._pictures],
            "dips": {layer: list(dip) for layer, dip in self._dips.items()},
            "map": None if self._map is None else self._map.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the history that ``state_dict()`` returned."""
        self.step, self._sums = int(state_dict["step"]), list(state_dict["sums"])
        self._drawn, self._pictures = state_dict["pictures"]
        self._dips = {layer: Dip(float(low), int(a), int(b)) for layer, (low, a, b) in state_dict["dips"].items()}
        saved, self._map, self._loaded = state_dict["map"], None, True
        heat_map = None if saved is None else self._map_of(saved["layers"], saved["cap"])
        if heat_map is not None:
            heat_map.load_state_dict(saved)
