"""Optimizers of other packages, with their own defaults and AdamW's options."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from am_lightning.bench.contenders import Contender

LR = 1e-6
# Their learning rate is lr times a distance that they estimate, which begins at LR and is kept there.
_ADAPTIVE: dict[str, Any] = {"lr": 1.0, "d0": LR, "decouple": True, "use_bias_correction": True}


@dataclass(frozen=True)
class Peer:
    """An optimizer of another package.

    Attributes:
        name: name in the table.
        package: name of the package on PyPI.
        path: module and class.
        same: name of the AdamW that it is compared with.
        words: words that a step reads and writes for each element, in as few passes as the method allows.
        more_below_float32: further words in half precision.
        options: options except ``weight_decay``.
        shares, overwrites: attributes of its Contender.
        extra: extra of am-lightning that installs the package.
    """

    name: str
    package: str
    path: tuple[str, str]
    same: str
    words: int = 7
    more_below_float32: int = 0
    options: dict[str, Any] = field(default_factory=lambda: {"lr": LR})
    shares: bool = True
    overwrites: bool = False
    extra: str = "studies"

    def make(self, params: list[torch.nn.Parameter], decay: float) -> Contender:
        """Return the optimizer, ready to train.

        Raises:
            ImportError: if its package is not installed.
        """
        from am_lightning.bench.contenders import Contender  # imports torch, which the names of PEERS do not need

        kind = getattr(import_module(self.path[0]), self.path[1])
        size, elements = params[0].element_size(), sum(p.numel() for p in params)
        words = self.words + (self.more_below_float32 if size < 4 else 0)
        with redirect_stdout(io.StringIO()):  # some print their options
            contender = Contender.timed(
                self.name, self.same, lambda: kind(params, weight_decay=decay, **self.options), words * size * elements
            )
        if hasattr(contender.optimizer, "train"):  # schedule-free steps in this mode only
            contender.optimizer.train()
        contender.shares, contender.overwrites = self.shares, self.overwrites
        return contender


# optimi: AdamW's 7 words; below float32 it adds a compensation (Kahan), read and written.
# schedule-free: reads p g z v, writes p z v.
# Prodigy: reads p g m v s and the first p, writes m v s; then p m v to write p, with epsilon times the new distance.
# DAdaptAdam: reads p g m v s, writes p m v s; the new distance serves the next step.
PEERS = (
    Peer(
        name="RAdam foreach",
        package="torch",
        path=("torch.optim", "RAdam"),
        same="AdamW foreach",
        options={"lr": LR, "decoupled_weight_decay": True, "foreach": True},
    ),
    Peer(
        name="optimi AdamW",
        package="torch-optimi",
        path=("optimi", "AdamW"),
        same="AdamW default",
        more_below_float32=2,
        options={"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8},
    ),
    Peer(
        name="schedule-free AdamW",
        package="schedulefree",
        path=("schedulefree", "AdamWScheduleFree"),
        same="AdamW foreach",
        overwrites=True,
    ),
    Peer(
        name="Prodigy",
        package="prodigyopt",
        path=("prodigyopt", "Prodigy"),
        same="AdamW default",
        words=13,
        options=_ADAPTIVE | {"d_coef": 0.0},
        shares=False,
    ),
    Peer(
        name="DAdaptAdam",
        package="dadaptation",
        path=("dadaptation", "DAdaptAdam"),
        same="AdamW default",
        words=9,
        options=_ADAPTIVE | {"growth_rate": 1.0},
        shares=False,
    ),
)


# The optimizer of DeepSpeed's ZeRO-Offload, measured on request only, because its first use builds it in about 40 s.
OFFLOAD = Peer(
    name="DeepSpeedCPUAdam",
    package="deepspeed",
    path=("deepspeed.ops.adam", "DeepSpeedCPUAdam"),
    same="AdamW fused",
    options={"lr": LR, "adamw_mode": True},
    extra="deepspeed",
)


def make_peers(
    params: list[torch.nn.Parameter], *, decay: float, peers: Sequence[Peer] = PEERS
) -> tuple[list[Contender], dict[str, str]]:
    """Return all that are installed, and the reason for each name that is missing."""
    result, missing = [], {}
    for peer in peers:
        try:
            result.append(peer.make(params, decay))
        except Exception as error:  # any kind, because one package compiles its optimizer here
            missing[peer.name] = (
                f"needs {peer.package} ({error}): pip install 'am-lightning[{peer.extra}]', or '.[{peer.extra}]' in a "
                "checkout"
            )
    return result, missing
