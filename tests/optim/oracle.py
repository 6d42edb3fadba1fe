"""Plain numpy float64 reference of AM-AdamW and AM-SGD, written from the published formulas alone.

It evaluates the FIVE-sum form of beta_t (S1..S5), one tensor at a time, with no cleverness:

    v   = beta2 v + (1 - beta2) g^2          c = 1 - cap * prod_{i<t} beta_i
    P   = c (sqrt(v / (1 - beta2^t)) + eps)  M = 1 / (P (1 + lambda P))
    S1  = sum M (d-g)^2                      S2 = sum M (d-g)(g + lambda P d)
    S3  = sum g d / P                        S4 = sum g x             S5 = sum x (d-g)
    beta_t = clip([(1 + mu eta_t)(eta_{t-1}/eta_t)(S3 + mu S4) - S2 - mu S5] / S1, 0, cap)
    d'  = ((1 - beta_t) g + (lambda P + beta_t) d) / (1 + lambda P)
    x'  = (1 - mu eta_t) x - eta_t d'/P

AM-SGD is the same with P = 1; coupled weight decay goes into g and then mu = 0. The package evaluates a two-sum form,
so a slip in its algebra cannot be repeated here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass
class Slot:
    """One parameter tensor with its state; ``step == 0`` means that it took no part in a step."""

    x: Array
    group: int
    d: Array
    v: Array
    step: int = 0
    beta_prod: float = 1.0
    prev_lr: float = 0.0
    beta: float = float("nan")
    raw: float = float("nan")  # unclamped; nan if there is no raw value (first step, D == 0)


@dataclass
class Terms:
    """Return what one tensor adds to its scope (numerator and denominator of beta_t), and what the update needs."""

    g: Array
    p: Array
    v: Array
    first: bool
    still: bool  # the given gradient is zero everywhere
    num: float = 0.0
    den: float = 0.0


@dataclass
class Oracle:
    """Base of both references. ``groups`` are dicts with ``params`` (float64 arrays, copied) and options.

    Options of every group: lr, weight_decay, lambd, cap, maximize; AM-AdamW also beta2 and eps, AM-SGD also decoupled.
    """

    groups: list[dict[str, Any]]
    scope: str = "tensor"
    nonfinite: str = "skip"
    exact: bool = False
    slots: list[Slot] = field(init=False)
    skipped: bool = field(default=False, init=False)
    prev_loss: float | None = field(default=None, init=False)
    first_beta_is_cap: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.slots = []
        groups, self.groups = self.groups, []
        for group in groups:
            self.add_group(group)

    def add_group(self, group: dict[str, Any]) -> None:
        self.groups.append({k: v for k, v in group.items() if k != "params"})
        for x in group["params"]:
            x = np.array(x, dtype=np.float64)
            self.slots.append(Slot(x, len(self.groups) - 1, np.zeros_like(x), np.zeros_like(x)))

    # -- differences of the two algorithms -------------------------------------------------------------------------
    def gradient(self, slot: Slot, grad: Array) -> Array:
        raise NotImplementedError

    def metric(self, slot: Slot, g: Array) -> tuple[Array, Array]:
        """Return the new second moment and the metric P."""
        raise NotImplementedError

    def mu(self, group: dict[str, Any]) -> float:
        raise NotImplementedError

    # -- one step -------------------------------------------------------------------------------------------------
    def step(self, grads: list[Array | None], loss: float | None = None) -> None:
        """Make one step. ``grads`` has the order of the slots, None = absent. ``loss`` only with ``exact``."""
        present = {i: np.asarray(g, dtype=np.float64) for i, g in enumerate(grads) if g is not None}
        value = self.objective(loss) if self.exact else None
        bad = any(not np.isfinite(g).all() for g in present.values()) or (value is not None and not np.isfinite(value))
        self.skipped = bad and self.nonfinite == "skip"
        if self.skipped:
            return
        with np.errstate(all="ignore"):
            terms = {i: self.terms(self.slots[i], g) for i, g in present.items()}
            if self.is_phantom(terms):
                return
            betas = self.betas(terms, value)
            for i, (beta, raw) in betas.items():
                self.update(self.slots[i], terms[i], beta, raw)
        self.prev_loss = value

    def objective(self, loss: float | None) -> float:
        """Return the minimised loss: negated under maximize, with wd/2 |x|^2 if the decay is coupled."""
        assert loss is not None
        sign = -1.0 if self.groups[0]["maximize"] else 1.0
        coupled = [s for s in self.slots if self.mu(self.groups[s.group]) == 0.0]
        return sign * loss + sum(0.5 * self.groups[s.group]["weight_decay"] * float((s.x**2).sum()) for s in coupled)

    def is_phantom(self, terms: dict[int, Terms]) -> bool:
        """Return whether this is a checkpointer's first step at lr 0 with zero gradients, which leaves no trace."""
        return all(t.first and t.still and self.groups[self.slots[i].group]["lr"] == 0.0 for i, t in terms.items())

    def terms(self, slot: Slot, grad: Array) -> Terms:
        group = self.groups[slot.group]
        lam, mu, lr = group["lambd"], self.mu(group), group["lr"]
        g = self.gradient(slot, grad)
        v, p = self.metric(slot, g)
        out = Terms(g, p, v, slot.step == 0, not grad.any())
        if out.first:
            return out
        d, x = slot.d, slot.x
        m = 1.0 / (p * (1.0 + lam * p))
        s1 = float((m * (d - g) ** 2).sum())
        s2 = float((m * (d - g) * (g + lam * p * d)).sum())
        s3 = float((g * d / p).sum())
        s4 = float((g * x).sum())
        s5 = float((x * (d - g)).sum())
        ratio = slot.prev_lr / lr if lr != 0.0 and not self.exact else 0.0  # eta_t = 0: the Delta term is dropped
        out.num = (1.0 + mu * lr) * ratio * (s3 + mu * s4) - s2 - mu * s5
        out.den = s1
        return out

    def exact_delta(self, i: int, value: float | None) -> float:
        """Return (1 + mu eta) Delta / eta with the exact difference of losses; the model needs one lr and one mu."""
        if not self.exact or self.prev_loss is None or value is None:
            return 0.0
        group = self.groups[self.slots[i].group]
        lr, mu = group["lr"], self.mu(group)
        assert all(g["lr"] == lr and self.mu(g) == mu for g in self.groups), "the exact gap needs one lr and mu"
        return (1.0 + mu * lr) * (self.prev_loss - value) / lr if lr != 0.0 else 0.0

    def scope_key(self, i: int) -> int:
        return {"tensor": i, "group": self.slots[i].group, "global": 0}[self.scope]

    def betas(self, terms: dict[int, Terms], value: float | None) -> dict[int, tuple[float, float]]:
        """Map each slot to its (clipped, raw) beta_t: a scope shares the sums, each group clips with its own cap."""
        out = {}
        for i, own in terms.items():
            cap = float(self.groups[self.slots[i].group]["cap"])
            if own.first and self.first_beta_is_cap:
                out[i] = (cap, float("nan"))
                continue
            members = [t for j, t in terms.items() if self.scope_key(j) == self.scope_key(i)]
            den = sum(t.den for t in members)
            num = sum(t.num for t in members)
            if any(not t.first for t in members):
                num += self.exact_delta(i, value)
            if not (np.isfinite(num) and np.isfinite(den)):
                out[i] = (cap, float("nan"))  # "propagate": AdamW's own step with beta at the cap
            elif den == 0.0:
                out[i] = (0.0, float("nan"))
            else:
                out[i] = (min(max(num / den, 0.0), cap), num / den)
        return out

    def update(self, slot: Slot, t: Terms, beta: float, raw: float) -> None:
        group = self.groups[slot.group]
        lam, mu, lr = group["lambd"], self.mu(group), group["lr"]
        slot.d = ((1.0 - beta) * t.g + (lam * t.p + beta) * slot.d) / (1.0 + lam * t.p)
        slot.v = t.v
        slot.x = (1.0 - mu * lr) * slot.x - lr * slot.d / t.p
        slot.step += 1
        slot.beta_prod *= beta
        slot.prev_lr = lr
        slot.beta, slot.raw = beta, raw


class OracleAdamW(Oracle):
    """AM-AdamW: d_0 = 0, v_0 = 0, beta_1 = cap, decoupled weight decay."""

    def gradient(self, slot: Slot, grad: Array) -> Array:
        return -grad if self.groups[slot.group]["maximize"] else grad

    def metric(self, slot: Slot, g: Array) -> tuple[Array, Array]:
        group = self.groups[slot.group]
        beta2, t = group["beta2"], slot.step + 1
        v = beta2 * slot.v + (1.0 - beta2) * g**2
        c = 1.0 - group["cap"] * slot.beta_prod
        return v, c * (np.sqrt(v / (1.0 - beta2**t)) + group["eps"])

    def mu(self, group: dict[str, Any]) -> float:
        return float(group["weight_decay"])


class OracleSGD(Oracle):
    """AM-SGD: d_0 = g_0 (so beta of a first step changes nothing), P = 1, coupled decay unless ``decoupled``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.first_beta_is_cap = False

    def gradient(self, slot: Slot, grad: Array) -> Array:
        group = self.groups[slot.group]
        g = -grad if group["maximize"] else grad
        return g if group["decoupled"] else g + group["weight_decay"] * slot.x

    def metric(self, slot: Slot, g: Array) -> tuple[Array, Array]:
        return slot.v, np.ones_like(g)

    def mu(self, group: dict[str, Any]) -> float:
        return float(group["weight_decay"]) if group["decoupled"] else 0.0

    def update(self, slot: Slot, t: Terms, beta: float, raw: float) -> None:
        if t.first:
            slot.d = t.g.copy()
        super().update(slot, t, beta, raw)
