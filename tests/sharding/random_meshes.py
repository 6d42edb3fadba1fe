"""Functions that each rank runs for a drawn example: tensors placed at random, beside an optimizer of whole tensors."""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from tests.sharding.layouts import mesh, spread
from tests.sharding.model import CAPS, make_optimizer, raw_betas
from tests.sharding.steps import raw_error

DIMS = ("a", "b", "c")
OTHER_ROOT = ("world",)  # a separate mesh over all ranks


@dataclass(frozen=True)
class Drawn:
    """A tensor.

    Attributes:
        shape: shape of the whole tensor.
        dims: dimensions of its mesh; () for a plain tensor that each rank holds.
        splits: for each of ``dims`` the tensor dimension that it splits, None for copies.
        present: for each step, whether there is a gradient.
        partial: whether the gradient comes as Partial sums where the tensor is copied.
        none_if_empty: whether a rank that holds no element gets no gradient, as under FSDP1.
        group: index of its parameter group.
    """

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    splits: tuple[int | None, ...]
    present: tuple[bool, ...]
    partial: bool
    none_if_empty: bool
    group: int


@dataclass(frozen=True)
class Example:
    """A mesh over all ranks, tensors on it, and the run."""

    mesh_shape: tuple[int, ...]
    tensors: tuple[Drawn, ...]
    kind: str
    scope: str
    rates: tuple[float, ...]  # lr of each step
    seed: int


@functools.cache
def mesh_of(mesh_shape: tuple[int, ...], dims: tuple[str, ...]) -> DeviceMesh:
    if dims == OTHER_ROOT:
        return mesh(math.prod(mesh_shape), names=OTHER_ROOT)
    whole = mesh(*mesh_shape, names=DIMS)
    return whole if dims == DIMS[: len(mesh_shape)] else whole[dims]


def placements_of(drawn: Drawn) -> list[Placement]:
    return [Replicate() if d is None else Shard(d) for d in drawn.splits]


def place(drawn: Drawn, example: Example, full: Tensor) -> Tensor:
    if not drawn.dims:
        return full.clone()
    where = mesh_of(example.mesh_shape, drawn.dims)
    return spread(full, where, placements_of(drawn))


def gradient(drawn: Drawn, example: Example, full: Tensor) -> Tensor | None:
    """Place ``full`` like its tensor. If Partial, rank k of a dimension holds 2^-(k+1) of it, which adds up exactly."""
    placed = place(drawn, example, full)
    if not isinstance(placed, DTensor):
        return placed
    local, where = placed.to_local(), placed.device_mesh
    if not drawn.partial:
        return None if drawn.none_if_empty and local.numel() == 0 < full.numel() else placed
    for size, rank, d in zip(where.shape, where.get_coordinate(), drawn.splits, strict=True):
        if d is None:
            local = local * 0.5 ** min(rank + 1, size - 1)
    placements = [Partial() if d is None else Shard(d) for d in drawn.splits]
    return DTensor.from_local(local, where, placements, run_check=False, shape=full.shape, stride=full.stride())


def optimizer_over(example: Example, params: list[Tensor]) -> Any:
    groups = [
        {"params": [(f"t{i}", p) for i, p in enumerate(params) if example.tensors[i].group == g], "weight_decay": decay}
        for g, decay in enumerate((0.1, 0.0))
    ]
    return make_optimizer(example.kind, [group for group in groups if group["params"]], example.scope)


def whole(param: Tensor) -> Tensor:
    if isinstance(param, DTensor) and not param.numel():  # torch 2.6 cannot gather some of these
        return torch.empty(param.shape, dtype=param.dtype)
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach()


class Twins:
    """The same tensors whole and placed, each with its optimizer."""

    def __init__(self, example: Example) -> None:
        self.example = example
        self.generator = torch.Generator().manual_seed(example.seed)
        full = [self._noise(drawn) for drawn in example.tensors]
        self.goals = [self._noise(drawn) for drawn in example.tensors]
        self.alone = [nn.Parameter(f.clone()) for f in full]
        self.placed = [nn.Parameter(place(d, example, f)) for d, f in zip(example.tensors, full, strict=True)]
        self.single, self.many = optimizer_over(example, self.alone), optimizer_over(example, self.placed)

    def _noise(self, drawn: Drawn) -> Tensor:
        return torch.randn(drawn.shape, generator=self.generator, dtype=torch.float64)

    def give_gradients(self, step: int) -> None:
        """Set the gradients of a noisy bowl around the goals, at the weights of the one process."""
        for optimizer in (self.single, self.many):
            for group in optimizer.param_groups:
                group["lr"] = self.example.rates[step]
        for i, drawn in enumerate(self.example.tensors):
            full = 2 * (self.alone[i].detach() - self.goals[i]) + 0.2 * self._noise(drawn)
            self.alone[i].grad = full if drawn.present[step] else None
            self.placed[i].grad = gradient(drawn, self.example, full) if drawn.present[step] else None


def run(example: Example) -> dict[str, Any]:
    """Return largest errors of raw beta_t, beta_t and weights and what ranks must share, or why it was refused."""
    twins = Twins(example)
    before = [whole(p).clone() for p in twins.placed]
    seen, off, betas = [], [0.0], []
    with raw_betas(example.scope) as raw, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # plain tensors on all ranks are not declared as copies
        for step in range(len(example.rates)):
            twins.give_gradients(step)
            twins.single.step()
            try:
                twins.many.step()
            except ValueError as error:
                moved = any(not torch.equal(whole(p), b) for p, b in zip(twins.placed, before, strict=True))
                return {"refused": str(error), "moved": moved or bool(twins.many.state)}
            expected, found = twins.single.momentum(), twins.many.momentum()
            off += [raw_error(float(found[name]), float(beta)) for name, beta in expected.items()]
            betas += [float(found[f"t{i}"]) for i, d in enumerate(example.tensors) if step and d.present[step]]
            seen.append({name: float(beta).hex() for name, beta in found.items()})
    errors = [
        raw_error(o, e)
        for alone, placed in zip(raw[::2], raw[1::2], strict=True)
        for o, e in zip(placed, alone, strict=True)
    ]
    pairs = [(whole(p), a.detach()) for p, a in zip(twins.placed, twins.alone, strict=True)]
    return {
        "raw": max(errors),
        "beta": max(off),
        "weights": max([float((p - a).abs().max() / a.abs().max()) for p, a in pairs if a.numel()], default=0.0),
        "bits": seen,
        "weight_bits": [hashlib.sha256(p.numpy().tobytes()).hexdigest() for p, _ in pairs],
        "collectives": twins.many.current_layout().collectives,
        "betas": len(betas),
        "interior": sum(1e-6 < beta < CAPS[example.kind] - 1e-6 for beta in betas),
    }
