"""Tables and figures of the convex study, from its ledger."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recipes.studies.convex import quadratic
from recipes.studies.convex.figures import draw_curves, draw_sensitivity
from recipes.studies.convex.gaps import Gaps
from recipes.studies.convex.methods import METHODS
from recipes.studies.convex.problems import LOGISTIC
from recipes.studies.convex.protocol import STEP_SIZES
from recipes.studies.ledger import Ledger
from recipes.studies.page import figure, write_page
from recipes.studies.tables import markdown

RESOLVED = 1e-12  # gaps below are rounding: they count as equal
OURS = "am_first_order"


def report(ledger: Ledger, folder: Path, *, steps: int, command: str) -> str:
    """Write ``convex.md`` and the figures into `folder`; the text of the former."""
    gaps = Gaps(ledger, steps)
    folder.mkdir(parents=True, exist_ok=True)
    draw_curves(folder / "convex-curves.png", gaps)
    draw_sensitivity(folder / "convex-step-sizes.png", gaps)
    parts = [
        "## Logistic regression",
        _duels(gaps),
        figure("convex-curves.png", "f - f* over the steps"),
        figure("convex-step-sizes.png", "f - f* after the last step over the step size"),
        *(_table(gaps, data) for data in LOGISTIC),
        "## Quadratics",
        _quadratic(),
    ]
    protocol = "Full batches in float64 from x_0 = 0: deterministic, so no seeds and no intervals."
    return write_page(folder / "convex.md", "Convex problems", command, ledger.made(), protocol, parts)


def _table(gaps: Gaps, data: str) -> str:
    rows = []
    for method, beta, name in gaps.lines():
        rows.append([name, *(_number(value) for value in gaps.last(data, method, beta))])
    header = ["step size x L", *(f"{size:g}" for size in STEP_SIZES)]
    return f"f - f* after {gaps.steps} steps, {data}:\n\n{markdown(header, rows)}"


def _number(gap: float) -> str:
    if not np.isfinite(gap):
        return "diverged"
    return f"{gap:.0e}" if gap > RESOLVED else "0"


def _duels(gaps: Gaps) -> str:
    """How often our first-order form ends lower than each of the others, over data sets and step sizes."""
    rows = []
    ours = np.array([gaps.last(data, OURS, None) for data in LOGISTIC])
    for method, beta, name in gaps.lines():
        if method == OURS:
            continue
        theirs = np.array([gaps.last(data, method, beta) for data in LOGISTIC])
        a, b = np.maximum(ours, RESOLVED), np.maximum(theirs, RESOLVED)
        best = [_number(value) for value in theirs.min(axis=1)]
        rows.append([name, *map(str, (int((a < b).sum()), int((a == b).sum()), int((a > b).sum()))), *best])
    rows.append([METHODS[OURS], "", "", "", *(_number(value) for value in ours.min(axis=1))])
    header = ["against", "AM first-order lower", "equal", "higher", *(f"best, {data}" for data in LOGISTIC)]
    cells = len(LOGISTIC) * len(STEP_SIZES)
    return (
        f"Which ends lower after {gaps.steps} steps, over {cells} pairs of a data set and a step size; and the least"
        f" f - f* at the best step size:\n\n{markdown(header, rows)}"
    )


def _quadratic() -> str:
    rows = []
    for size in (0.5, 1.0, 1.9):
        for method, beta, name in Gaps.lines():
            if beta == "tuned":
                continue
            assert not isinstance(beta, str)
            found = quadratic.overshoot(method, beta, size)
            rows.append([f"{size:g}", name, str(found.crossings), f"{found.furthest:.2f}", f"{found.gap:.0e}"])
    header = ["step size x L", "method", "sign changes", "furthest overshoot", "f at the end"]
    overshoot = f"Quadratic with 20 curvatures from 0.01 to 1, x_0 = 1, {quadratic.STEPS} steps:\n\n"
    return overshoot + markdown(header, rows) + "\n\n" + _greedy()


def _greedy() -> str:
    rows = []
    for size in (0.5, 1.0, 1.9):
        for method in ("am_exact", OURS):
            found = np.array(quadratic.next_step_regret(size, method))
            means, regret = found[:, :2].mean(axis=0), np.median(found[:, 2])
            rows.append([f"{size:g}", METHODS[method], f"{means[0]:.2f}", f"{means[1]:.2f}", f"{regret:.1%}"])
    header = ["step size x L", "method", "mean beta_t", "mean best beta for one step", "median f excess over it"]
    return f"beta_t and the beta that would be best for the very next step, same quadratic:\n\n{markdown(header, rows)}"
