"""The number of hypothesis' examples: few and always the same by day, many and new ones in the nightly gate."""

from __future__ import annotations

import os

from hypothesis import settings

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def examples(nightly: int) -> settings:
    """Return ``nightly`` in the nightly gate, and a sixth of that (at least 10) elsewhere."""
    return settings(max_examples=nightly if NIGHTLY else max(10, nightly // 6))
