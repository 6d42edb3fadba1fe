"""Count the spikes of a training loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SPIKE, SPIKE_WINDOW, SPIKE_FROM = 0.5, 20, 60  # nats, steps, the first step that counts


def count_spikes(losses: Sequence[float | None]) -> int:
    """Return the number of steps whose loss is more than SPIKE above the mean of the SPIKE_WINDOW steps before. A
    divergence counts once."""
    values = np.array([math.inf if loss is None else loss for loss in losses])
    return sum(
        int(not values[step] <= values[step - SPIKE_WINDOW : step].mean() + SPIKE)
        for step in range(SPIKE_FROM, len(values))
    )
