"""Chooses the kernels of a step: which rows go through which tier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from am_lightning.optim.kernels import compiled, foreach, fused
from am_lightning.optim.kernels import single_tensor as reference
from am_lightning.optim.kernels.cpu import chunked as blocked
from am_lightning.optim.kernels.cpu import cpp as cpu_loop
from am_lightning.optim.kernels.cpu.chunked import Scratch
from am_lightning.optim.kernels.fused import COMPILED, LOOP, TRITON, fused_tier
from am_lightning.optim.kernels.inputs import Clip, Numbers, Piece, is_addressable, is_flat, scale_
from am_lightning.optim.kernels.transfer import Constants, is_fake, moved
from am_lightning.optim.kernels.triton import launch as triton_pair

REFERENCE, BLOCKED, FOREACH = "reference", "blocked", "foreach"


class Choice(NamedTuple):
    """A group's options ``foreach`` and ``fused``."""

    foreach: bool | None
    fused: bool | None

    @property
    def by_default(self) -> bool:
        """Neither is set."""
        return self.foreach is None and self.fused is None


class Workspace:
    """What kernels keep from step to step: buffers and tables, nothing that a checkpoint needs."""

    def __init__(self) -> None:
        self.scratch = Scratch()
        self.tables = triton_pair.Tables()
        self.agreed_on_cpu: str | None = None  # the fused kernels that all ranks have; None: chosen here alone
        self.triton_by_default = False  # it works on all ranks
        self.why_not_triton = ""  # the reason where it does not
        self.constants = Constants()
        self.gradient_clip: Clip | None = None  # of the next step
        self.gradient_factor: Tensor | None = None  # 0-dim, its factor where a kernel of this step gives it

    def taken_factor(self) -> Tensor | None:
        """0-dim, what this step multiplies its gradients by; no step after it does."""
        clip, factor = self.gradient_clip, self.gradient_factor
        self.gradient_clip = self.gradient_factor = None
        return clip.factor() if clip is not None and factor is None else factor

    def take_default(self, why_not_triton: str) -> None:
        """What the ranks have agreed on; one of several layouts for which Triton does not work decides for all."""
        self.why_not_triton = self.why_not_triton or why_not_triton
        self.triton_by_default = not self.why_not_triton


_SUPPORTS: dict[str, Callable[[Piece], bool]] = {
    TRITON: lambda piece: triton_pair.supports(piece),
    LOOP: cpu_loop.supports,
    COMPILED: compiled.supports,
    BLOCKED: lambda piece: is_flat(piece.tensors()),
    FOREACH: lambda piece: True,
    REFERENCE: lambda piece: True,
}
_FUSED = {TRITON, LOOP, COMPILED}


def tiers(device: torch.device, choice: Choice, workspace: Workspace) -> tuple[str, str]:
    """The tier of a group on a device, and the one for rows that it does not support.

    ``foreach=False`` is the reference, ``True`` torch._foreach_*; ``None`` the fastest tier that needs no compiler, or
    Triton where that works. The blocked and the fused tiers walk the storage, so tensors whose strides differ go to
    the other.

    Raises:
        RuntimeError: ``fused`` is True and what its kernels need is not installed.
    """
    on_cpu = device.type == "cpu"
    if is_fake():  # nothing to launch on, and no number for the host
        return FOREACH, FOREACH
    if choice.fused:
        agreed = workspace.agreed_on_cpu
        return agreed if on_cpu and agreed else fused_tier(device), REFERENCE if on_cpu else FOREACH
    if choice.by_default and workspace.triton_by_default and device.type in fused.TRITON_DEVICES:
        return TRITON, FOREACH
    if choice.foreach or (choice.foreach is None and not on_cpu):
        return FOREACH, FOREACH
    return BLOCKED if choice.foreach is None else REFERENCE, REFERENCE


class Launch(Protocol):
    """Both passes of one step over the pieces of one tier."""

    def sums(self, numbers: Numbers, accumulate: torch.dtype) -> Tensor:
        """Pass 1: ``[pieces, 2]``."""

    def update(self, numbers: Numbers, counts: Tensor) -> None:
        """Pass 2 of the rows where ``counts`` (``[rows]`` bool) is True."""


class Passes:
    """Both passes of one step over pieces that may need different tiers."""

    def __init__(self, pieces: Sequence[Piece], choices: Sequence[Choice], workspace: Workspace) -> None:
        self._workspace = workspace
        self._scale = workspace.taken_factor()
        chosen: dict[tuple[torch.device, Choice], tuple[str, str]] = {}
        by_tier: dict[tuple[str, str], list[Piece]] = {}
        for piece, choice in zip(pieces, choices, strict=True):
            device = piece.x.device
            if (device, choice) not in chosen:
                chosen[device, choice] = tiers(device, choice, workspace)
            name, other = chosen[device, choice]
            supports = _SUPPORTS[name]
            if not supports(piece):
                piece = _with_gradient_like_parameter(piece) if name in _FUSED else piece
                name = name if supports(piece) else other
                if name == REFERENCE and choice.fused and not is_addressable(piece.tensors()):
                    name = BLOCKED if is_flat(piece.tensors()) else name
            by_tier.setdefault((name, device.type), []).append(piece)
        self._unscaled: list[Piece] = []  # of kernels that cannot multiply in registers
        if self._scale is not None:
            self._unscaled = [p for (name, _), members in by_tier.items() if name != TRITON for p in members]
        self.tiers = {name: len(members) for (name, _), members in by_tier.items()}
        self._launches = [
            (tuple(piece.row for piece in members), _launch(name, device, members, workspace, self._scale))
            for (name, device), members in by_tier.items()
        ]

    def sums(self, numbers: Numbers, rows: int, device: torch.device, accumulate: torch.dtype) -> Tensor:
        """Pass 1: ``[rows, 2]``, N and D; zero for rows without a gradient here."""
        self._scale_in_memory()
        everything = tuple(range(rows))
        out: Tensor | None = None
        for here, launch in self._launches:
            pairs = moved(launch.sums(numbers, accumulate), device)
            if here == everything:
                return pairs
            if out is None:
                out = torch.zeros(rows, 2, dtype=accumulate, device=device)
            out.index_copy_(0, self._workspace.constants.vector(here, device), pairs)
        # None where a pipeline stage, or a rank, has no parameters
        return torch.zeros(rows, 2, dtype=accumulate, device=device) if out is None else out

    def _scale_in_memory(self) -> None:
        if self._unscaled:
            scale_([piece.g for piece in self._unscaled], cast(Tensor, self._scale))
            self._unscaled = []

    def update(self, numbers: Numbers, counts: Tensor) -> None:
        """Pass 2: write the rows where ``counts`` (``[rows]`` bool) is True.

        On the CPU this is read on the host, once; elsewhere nothing waits for the device.
        """
        for _, launch in self._launches:
            launch.update(numbers, counts)


class EagerPasses:
    """Both passes of one step with torch's own operators."""

    def __init__(self, name: str, device_type: str, pieces: Sequence[Piece], scratch: Scratch) -> None:
        self._name, self._pieces, self._scratch = name, pieces, scratch
        self._waits = device_type == "cpu"  # for the numbers, which are there

    def sums(self, numbers: Numbers, accumulate: torch.dtype) -> Tensor:
        """Pass 1: ``[pieces, 2]``."""
        if self._name == BLOCKED:
            return torch.stack(blocked.sums(self._pieces, numbers, accumulate, self._scratch))
        return torch.stack(
            [pair.to(self._pieces[0].x.device) for pair in reference.sums(self._pieces, numbers, accumulate)]
        )

    def update(self, numbers: Numbers, counts: Tensor) -> None:
        """Pass 2 of the rows where ``counts`` (``[rows]`` bool) is True."""
        if not self._waits:
            kept = [moved(counts[p.row], p.x.device) for p in self._pieces]
            reference.update(self._pieces, numbers, kept)
            return
        host = counts.tolist()
        pieces = [p for p in self._pieces if host[p.row]]
        if self._name == BLOCKED:
            blocked.update(pieces, numbers, self._scratch)
        else:
            reference.update(pieces, numbers, None)


def _launch(name: str, device_type: str, pieces: Sequence[Piece], workspace: Workspace, scale: Tensor | None) -> Launch:
    if name == TRITON:
        return triton_pair.TritonPasses(pieces, workspace.tables, scale)
    if name == LOOP:
        return cpu_loop.LoopPasses(pieces)
    if name == COMPILED:
        return compiled.CompiledPasses(pieces)
    if name == FOREACH:
        return foreach.ForeachPasses(pieces, workspace.constants)
    return EagerPasses(name, device_type, pieces, workspace.scratch)


def _with_gradient_like_parameter(piece: Piece) -> Piece:
    """Where only the gradient has other strides, a copy of it that the fused kernels can walk along with the rest."""
    if piece.g.stride() == piece.x.stride() or not is_flat([t for t in piece.tensors() if t is not piece.g]):
        return piece
    like_parameter = torch.empty_like(piece.x, dtype=piece.g.dtype, memory_format=torch.preserve_format)
    return replace(piece, g=like_parameter.copy_(piece.g))
