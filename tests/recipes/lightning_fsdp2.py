"""pretrain.py, with an end that is safe on CPU processes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import pretrain

from tests.recipes.leaving import leave

if __name__ == "__main__":
    pretrain.main()
    leave()
