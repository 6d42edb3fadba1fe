"""Draw the two-plane model: python -m recipes.studies.two_planes PICTURE.png

The picture has a quadratic loss on a line, the gradient plane and the memory plane after a good step and after a step
that went too far, the proximal model, and the momentum that it gives, computed by AMSGD itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from am_lightning import AMSGD
from recipes.studies.figures import COLOURS, new_figure, save, style

LR = 0.35
CASES = {"the gradient agrees with the memory": (-3.0, -2.6), "the last step went too far": (-1.0, 0.9)}


def loss(x: float) -> float:
    return x * x / 2


def momentum(before: float, now: float) -> tuple[float, float]:
    """Return beta_t at `now`, reached from `before` in one step of length LR, and the memory d there."""
    x = torch.nn.Parameter(torch.tensor([before], dtype=torch.float64))
    optimizer = AMSGD([x], LR, beta_max=0.9, lambd=0.0, loss_gap="exact")
    memory = (before - now) / LR  # a step along it leads from `before` to `now`
    x.grad = torch.tensor([memory], dtype=torch.float64)
    optimizer.step(lambda: loss(before))
    x.grad = x.detach().clone()
    optimizer.step(lambda: loss(float(x.detach())))
    return float(optimizer.state[x]["beta"]), memory


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    figure, axes = new_figure(1, len(CASES), width=5.0, height=3.6)
    for panel, (title, (before, now)) in zip(axes[0], CASES.items(), strict=True):
        beta, memory = momentum(before, now)
        points = np.linspace(-3.4, 2.4, 400)
        gradient_plane = loss(now) + now * (points - now)
        memory_plane = loss(before) + memory * (points - now)
        proximal = np.maximum(gradient_plane, memory_plane) + (points - now) ** 2 / (2 * LR)
        panel.plot(points, points**2 / 2, color="black", linewidth=1.6, label="loss")
        panel.plot(points, gradient_plane, color=COLOURS[5], label="gradient plane")
        panel.plot(points, memory_plane, color=COLOURS[6], label="memory plane")
        panel.plot(points, proximal, "--", color=COLOURS[4], label="their maximum + |u|² / (2 eta)")
        direction = beta * memory + (1 - beta) * now
        for x, name, offset in ((before, "before", 6), (now, "x", 6), (now - LR * direction, "next", -12)):
            panel.plot([x], [loss(x)], "o", color="black", markersize=4)
            panel.annotate(name, (x, loss(x)), textcoords="offset points", xytext=(5, offset), fontsize=8)
        panel.set_ylim(-4.5, 7)
        style(panel, title=f"{title}: beta_t = {beta:.2f}", xlabel="x")
    save(figure, Path(sys.argv[1]), legend_of=axes[0][0])


if __name__ == "__main__":
    main()
