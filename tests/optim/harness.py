"""Run a real optimizer and the oracle side by side and compare every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from am_lightning import AMSGD, AMAdamW
from am_lightning.optim.kernels import agreement, registry
from tests.optim.oracle import Oracle, OracleAdamW, OracleSGD

# Values of `foreach`: the chunked kernel (None on the CPU), single_tensor, the bucketed lists.
KERNELS = (None, False, True)
SCOPES = ("tensor", "group", "global")
BETA_TOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
STATE_TOL = {torch.float64: 1e-12, torch.float32: 1e-5}
# Relative bound of low precision: one rounding of the stored value (half a unit in the last place), and a little of
# float32's rounding.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def compile_on_cpu(patch: Any) -> None:
    """Use torch.compile for ``fused=True`` on the CPU, as on other devices that have no kernels of ours."""
    compiled = registry.COMPILED._replace(device_types=frozenset({"cpu"}))
    patch.setattr(registry, "FUSED", (registry.TRITON, compiled))


def triton_on_cpu(patch: Any, **changes: Any) -> None:
    """Let the CPU pass for a GPU. ``changes`` are fields of Triton's entry in the table of kernels."""
    triton = registry.TRITON._replace(device_types=frozenset({"cpu"}), **changes)
    for module in (registry, agreement):
        patch.setattr(module, "TRITON", triton)
    patch.setattr(registry, "FUSED", (triton, registry.COMPILED))
    patch.setattr(registry, "FUSED_BY_DEFAULT", frozenset({"cpu"}))


def to_numpy(t: torch.Tensor) -> np.ndarray:
    return t.detach().to(torch.float64).cpu().numpy().copy()


def oracle_options(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """Return the oracle's options from what the user passed, never from what the optimizer derived."""
    out = {k: float(group[k]) for k in ("lr", "weight_decay", "lambd")}
    out["maximize"] = group["maximize"]
    if isinstance(optimizer, AMAdamW):
        out |= {"cap": float(group["betas"][0]), "beta2": float(group["betas"][1]), "eps": float(group["eps"])}
    else:
        out |= {"cap": float(group["beta_max"]), "decoupled": group["decoupled_weight_decay"]}
    return out


def make_oracle(optimizer: torch.optim.Optimizer, **kwargs: Any) -> Oracle:
    groups = [
        {"params": [to_numpy(p) for p in g["params"]], **oracle_options(optimizer, g)} for g in optimizer.param_groups
    ]
    cls = OracleAdamW if isinstance(optimizer, AMAdamW) else OracleSGD
    return cls(groups, **kwargs)


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for g in optimizer.param_groups for p in g["params"]]


def assert_close(actual: Any, expected: Any, tol: float, what: str) -> None:
    """Compare absolutely below 1 and relatively above; nan equals nan. ``tol`` bounds the largest error."""
    a, e = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert a.shape == e.shape, f"{what}: shape {a.shape}, expected {e.shape}"
    if a.size == 0:
        return
    assert (np.isnan(a) == np.isnan(e)).all(), f"{what}: nan pattern {a} against {e}"
    error = np.nan_to_num(np.abs(a - e) / np.maximum(1.0, np.abs(e)), nan=0.0)
    assert error.max() <= tol, f"{what}: error {error.max():.3e} > {tol:.1e} at {int(error.argmax())}"


@dataclass
class Twin:
    """The optimizer under test and its oracle; ``sync`` gives the oracle the optimizer's rounded state at each step."""

    optimizer: torch.optim.Optimizer
    oracle: Oracle
    sync: bool = False
    betas: list[float] = field(default_factory=list)  # clipped betas with D > 0
    interior: int = 0

    @property
    def params(self) -> list[torch.Tensor]:
        return params_of(self.optimizer)

    def set_lr(self, *lrs: float) -> None:
        for group, mirror, lr in zip(self.optimizer.param_groups, self.oracle.groups, lrs, strict=True):
            group["lr"] = lr
            mirror["lr"] = lr

    def pull_state(self) -> None:
        for p, slot in zip(self.params, self.oracle.slots, strict=True):
            slot.x = to_numpy(p)
            state = self.optimizer.state.get(p, {})
            if not state or slot.step == 0:
                continue
            slot.d = to_numpy(state["exp_avg" if "exp_avg" in state else "momentum_buffer"])
            slot.v = to_numpy(state["exp_avg_sq"]) if "exp_avg_sq" in state else slot.v
            slot.beta_prod = float(state["beta_prod"])

    def step(self, grads: list[torch.Tensor | None], loss: torch.Tensor | None = None) -> None:
        """Make one step of both on these gradients, which keep their strides, and compare everything."""
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        if self.sync:
            self.pull_state()
        arrays = [None if g is None else to_numpy(g) for g in grads]
        self.oracle.step(arrays, None if loss is None else float(loss))
        self.optimizer.step(None if loss is None else lambda: loss)
        self.compare(arrays)

    def compare(self, grads: list[np.ndarray | None]) -> None:
        reported = list(self.optimizer.momentum().items())
        assert bool(self.optimizer.last_step_skipped) == self.oracle.skipped
        pairs = zip(self.params, self.oracle.slots, reported, grads, strict=True)
        for p, slot, (name, beta), grad in pairs:
            assert beta.dim() == 0
            assert_close(float(beta), slot.beta, self.beta_tol(p), f"beta of {name}")
            self.compare_stored(p, slot.x, f"weights of {name}")
            if slot.step:
                state = self.optimizer.state[p]
                assert float(state["step"]) == slot.step, name
                memory = state["exp_avg" if "exp_avg" in state else "momentum_buffer"]
                self.compare_stored(memory, slot.d, f"direction of {name}")
                if "exp_avg_sq" in state:
                    self.compare_stored(state["exp_avg_sq"], slot.v, f"second moment of {name}")
            if grad is not None and not np.isnan(slot.raw):
                self.betas.append(slot.beta)
                self.interior += 0.0 < slot.raw < self.oracle.groups[slot.group]["cap"]

    def compare_stored(self, stored: torch.Tensor, expected: np.ndarray, what: str) -> None:
        if stored.dtype in ROUNDING:
            actual, limit = to_numpy(stored), ROUNDING[stored.dtype] * np.abs(expected) * 1.01 + 1e-6
            error = np.abs(actual - expected) - limit
            assert not error.size or error.max() <= 0, f"{what}: {actual} against {expected}"
        else:  # a float32 tensor in the same scope limits beta, and so all else, to float32's accuracy
            assert_close(to_numpy(stored), expected, max(STATE_TOL[stored.dtype], self.beta_tol(stored)), what)

    def beta_tol(self, p: torch.Tensor) -> float:
        dtypes = {q.dtype for q in self.params}
        if self.oracle.scope == "tensor" or len(dtypes) == 1:
            return BETA_TOL[p.dtype]
        return max(BETA_TOL[t] for t in dtypes)

    def assert_not_vacuous(self, share: float = 0.25) -> None:
        """Require that enough betas lie strictly between 0 and the cap, because a clipped beta hides a wrong one."""
        assert self.betas, "no beta was ever computed from sums"
        got = self.interior / len(self.betas)
        assert got >= share, f"only {got:.0%} of {len(self.betas)} betas are inside the clip"


@dataclass
class Bowl:
    """Return gradients of overshooting quadratics 1/2 sum h (x - c)^2 at the oracle's float64 weights."""

    curvature: list[np.ndarray]
    centre: list[np.ndarray]
    noise: float
    rng: np.random.Generator

    @classmethod
    def around(cls, shapes: list[tuple[int, ...]], *, seed: int, noise: float = 0.05, top: float = 1.0) -> Bowl:
        rng = np.random.default_rng(seed)
        curvature = [rng.uniform(0.2, top, s) for s in shapes]
        return cls(curvature, [rng.normal(size=s) for s in shapes], noise, rng)

    def grads(self, xs: list[np.ndarray]) -> list[np.ndarray]:
        return [
            h * (x - c) + self.noise * self.rng.normal(size=np.shape(x))
            for x, h, c in zip(xs, self.curvature, self.centre, strict=True)
        ]


def as_grads(arrays: list[np.ndarray], params: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return torch gradients of the parameters' dtypes and devices, contiguous whatever the parameters' strides are."""
    return [torch.tensor(a, dtype=p.dtype, device=p.device) for a, p in zip(arrays, params, strict=True)]


def run_bowl(
    twin: Twin, bowl: Bowl, lrs: list[tuple[float, ...]], edit: Callable[[int, list[Any]], None] | None = None
) -> None:
    """Step the twin once per entry of ``lrs`` (one lr per group). ``edit(step, grads)`` may change the gradients."""
    for i, lr in enumerate(lrs):
        twin.set_lr(*lr)
        sign = [-1.0 if twin.oracle.groups[s.group]["maximize"] else 1.0 for s in twin.oracle.slots]
        arrays = bowl.grads([s.x for s in twin.oracle.slots])
        grads = as_grads([s * a for s, a in zip(sign, arrays, strict=True)], twin.params)
        if edit is not None:
            edit(i, grads)
        twin.step(grads)


def named_params(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
) -> list[tuple[str, torch.Tensor]]:
    gen = torch.Generator().manual_seed(seed)
    return [
        (f"w{i}", torch.nn.Parameter(torch.randn(s, generator=gen, dtype=torch.float64).to(device, dtype)))
        for i, s in enumerate(shapes)
    ]


def build(name: str, params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """Build an optimizer. ``foreach=None`` selects the chunked kernel; by default AMAdamW uses the C++ loop."""
    if name == "adamw" and "foreach" in kwargs and kwargs["foreach"] is None:
        kwargs.setdefault("fused", False)
    return {"adamw": AMAdamW, "sgd": AMSGD}[name](params, **kwargs)


def snapshot(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return clones of all weights and state tensors in a fixed order."""
    out = []
    for p in params_of(optimizer):
        out.append(p.detach().clone())
        out += [v.detach().clone() for _, v in sorted(optimizer.state.get(p, {}).items()) if torch.is_tensor(v)]
    return out


def assert_bitwise(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    """Require the same dtypes, shapes and bits; nan equals nan."""
    assert len(a) == len(b)
    for i, (s, t) in enumerate(zip(a, b, strict=True)):
        assert s.dtype == t.dtype and s.shape == t.shape, f"tensor {i}: {s.dtype} {s.shape} against {t.dtype} {t.shape}"
        assert torch.equal(s.nan_to_num(nan=12345.0), t.nan_to_num(nan=12345.0)), f"tensor {i} differs: {s} {t}"
