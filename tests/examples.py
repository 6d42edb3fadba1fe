"""How many examples hypothesis tries: few and always the same by day, many and new ones in the nightly gate."""

from __future__ import annotations

import os

from hypothesis import settings

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def examples(nightly: int) -> settings:
    """``nightly`` of them in the nightly gate, a sixth of that (at least 10) elsewhere."""
    return settings(max_examples=nightly if NIGHTLY else max(10, nightly // 6))
