"""am_lightning.clients.torchtitan with torchtitan's own classes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.clients import client
from tests.python import PYTHON

pytestmark = [pytest.mark.nightly("clients"), pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_a_config_trains_logs_and_resumes(tmp_path: Path) -> None:
    client("torchtitan")
    command = [PYTHON, "-m", "tests.clients.torchtitan_run", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["kind"] == "AMAdamW" and seen["names"] and seen["bitwise"]
    assert seen["kept"].items() >= seen["expected"].items()
    assert seen["kept"]["beta1_max"] == pytest.approx(0.9 - 0.1 * 0.2) and seen["kept"]["lambd"] == 0.2
    assert seen["metrics"].keys() >= {"lr", "am/beta/mean", "am/beta/attn.qkv", "am/clamp/at_max", "am/skipped_steps"}
    assert sum(0 < beta < 0.88 for beta in seen["betas"]) > len(seen["betas"]) / 4
    assert seen["adamw_steps"] == 3


def test_what_cannot_be_converted_is_named() -> None:
    client("torchtitan")
    from torchtitan.models.llama3 import config_registry

    from am_lightning.clients.torchtitan import AMOptimizersContainer, adaptive_memory

    config = adaptive_memory(config_registry.llama3_debugmodel())
    with pytest.raises(TypeError, match=r"config.optimizer is a AMOptimizersContainer.Config, not OptimizersContainer"):
        adaptive_memory(config)
    config.optimizer.implementation = "fused_opt_states_bf16"
    with pytest.raises(ValueError, match="'fused_opt_states_bf16' creates AdamW's state itself"):
        AMOptimizersContainer(config.optimizer, model_parts=[])
