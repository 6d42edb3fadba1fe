"""Relative errors of float32 states and beta_t, because an absolute bound hides errors of small numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.optim.harness import Bowl, Twin, build, compile_on_cpu, make_oracle, named_params, run_bowl, to_numpy

SHAPES = [(33, 7), (16_385,)]
UNIT = 2.0**-24  # float32's relative rounding error
TIERS: list[Any] = ["single_tensor", "eager", "foreach", "cpp", pytest.param("compile", marks=pytest.mark.slow)]
OPTIONS: dict[str, dict[str, Any]] = {"single_tensor": {"foreach": False}, "eager": {}, "foreach": {"foreach": True}}


class Relative(Twin):
    """A twin that also requires v' to two units of float32, and beta_t to 1e-6."""

    def beta_tol(self, p: torch.Tensor) -> float:
        return 1e-6

    def compare(self, grads: list[np.ndarray | None]) -> None:
        super().compare(grads)
        for p, slot in zip(self.params, self.oracle.slots, strict=True):
            error = np.abs(to_numpy(self.optimizer.state[p]["exp_avg_sq"]) / slot.v - 1).max()
            assert error <= 4 * UNIT, f"second moment is off by {error / UNIT:.1f} units"


@pytest.mark.parametrize("beta2", [0.999, 0.9999])
@pytest.mark.parametrize("tier", TIERS)
def test_a_slow_second_moment_is_right_to_its_last_bits(
    tier: str, beta2: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 - beta2 is formed in float64; in float32 it would be off by up to 3e-4, and v' with it."""
    if tier == "compile":
        compile_on_cpu(monkeypatch)
    options = OPTIONS.get(tier, {"fused": True})
    params = named_params(SHAPES, torch.float32)
    optimizer = build("adamw", params, lr=0.1, weight_decay=0.01, betas=(0.89, beta2), **options)
    twin = Relative(optimizer, make_oracle(optimizer), sync=True)
    run_bowl(twin, Bowl.around(SHAPES, seed=3), [(0.1,), (0.3,), (0.2,), (0.1,)])
