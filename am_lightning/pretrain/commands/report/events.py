"""The scalars of a run, read back from its TensorBoard event files."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PATTERN = "events.out.tfevents.*"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """History of a scalar: increasing steps (n,), values (n,)."""

    steps: NDArray[np.int64]
    values: Floats

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])

    @property
    def median(self) -> float:
        """Median, which a pause of the run does not change."""
        return float(np.median(self.values))


def read_files(files: Iterable[Path], *, first_step: int = 0) -> dict[str, Curve]:
    """Return all scalars of one run by tag; a point at n is after n steps.

    A resumed run has one file for each start. A later file replaces what the earlier ones logged from its own first
    step on (of its longest curve), so that every step occurs once.

    Args:
        files: event files, in any order.
        first_step: number that the writer gives its first step; 0 for Lightning.
    """
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports every resume
    points: dict[str, dict[int, float]] = {}
    for events in _loaded(files):
        newer = {tag: {e.step: float(e.value) for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        if not newer:
            continue
        longest = max(newer, key=lambda tag: len(newer[tag]))
        start = min(newer[longest])
        for tag in [*points, *(tag for tag in newer if tag not in points)]:
            own = newer.get(tag, {})
            first = min([start, *own])
            points[tag] = {step: value for step, value in points.get(tag, {}).items() if step < first} | own
    return {tag: _curve(found, 1 - first_step) for tag, found in points.items() if found}


def last_picture(files: Iterable[Path], tag: str) -> bytes | None:
    """Return the newest PNG under ``tag``, which may have a prefix; None if there is no such picture."""
    for events in reversed(_loaded(files)):
        for own in events.Tags()["images"]:
            if own == tag or own.endswith(f"/{tag}"):
                return bytes(events.Images(own)[-1].encoded_image_string)
    return None


def _loaded(files: Iterable[Path]) -> list[EventAccumulator]:
    """Return the files in the order of their first events. A name holds whole seconds, and a number from 9 to 10."""
    limits = {"scalars": 0, "histograms": 1, "tensors": 1, "images": 1}
    found = []
    for file in files:
        events = EventAccumulator(str(file), size_guidance=limits).Reload()
        with contextlib.suppress(ValueError):  # nothing has been written yet
            found.append((events.FirstEventTimestamp(), events.path, events))
    return [events for *_, events in sorted(found)]


def _curve(points: dict[int, float], shift: int) -> Curve:
    steps = sorted(points)
    return Curve(np.array(steps, dtype=np.int64) + shift, np.array([points[step] for step in steps]))
