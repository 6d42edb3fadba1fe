"""The Python that tests start programs with."""

from __future__ import annotations

import os
import sys

from tests.forkserver import COLD_VARIABLE, VARIABLE

COLD = os.environ.get(COLD_VARIABLE, sys.executable)  # a fresh process that imports everything itself
PYTHON = os.environ.get(VARIABLE, COLD)  # in a test session, the fork server's client (tests/forkserver)
