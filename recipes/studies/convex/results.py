"""Tables and figures of the convex study, from its ledger."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from recipes.studies.convex import quadratic
from recipes.studies.convex.methods import METHODS
from recipes.studies.convex.protocol import LOGISTIC, STEP_SIZES, Gaps
from recipes.studies.figures import COLOURS, new_figure, save, style
from recipes.studies.ledger import Ledger
from recipes.studies.page import markdown, write_page

RESOLVED = 1e-12  # smaller gaps are rounding errors: they count as equal and are drawn here
OURS = "am_first_order"
SHOWN_STEP_SIZES = (0.5, 2.0, 16.0)
_QUADRATIC_STEP_SIZES = (0.5, 1.0, 1.9)


def report(ledger: Ledger, folder: Path, *, steps: int, command: str) -> str:
    """Write ``convex.md`` and the figures into `folder`, and return the text of the page."""
    gaps = Gaps(ledger, steps)
    folder.mkdir(parents=True, exist_ok=True)
    _draw_curves(folder / "convex-curves.png", gaps)
    _draw_sensitivity(folder / "convex-step-sizes.png", gaps)
    parts = [
        "## Logistic regression",
        _duels(gaps),
        "![f - f* over the steps](convex-curves.png)",
        "![f - f* after the last step over the step size](convex-step-sizes.png)",
        *(_table(gaps, data) for data in LOGISTIC),
        "## Quadratics",
        _quadratic(),
    ]
    protocol = "Full batches in float64 from x_0 = 0: deterministic, so no seeds and no intervals."
    return write_page(folder / "convex.md", "Convex problems", command, ledger.made(), protocol, parts)


def _table(gaps: Gaps, data: str) -> str:
    rows = [[name, *map(_number, gaps.last(data, method, beta))] for method, beta, name in gaps.lines()]
    header = ["step size x L", *(f"{size:g}" for size in STEP_SIZES)]
    return f"f - f* after {gaps.steps} steps, {data}:\n\n{markdown(header, rows)}"


def _number(gap: float) -> str:
    if not np.isfinite(gap):
        return "diverged"
    return f"{gap:.0e}" if gap > RESOLVED else "0"


def _duels(gaps: Gaps) -> str:
    """Return how often our first-order form ends lower than each other method, over data sets and step sizes."""
    rows = []
    ours = np.array([gaps.last(data, OURS, None) for data in LOGISTIC])
    for method, beta, name in gaps.lines():
        if method == OURS:
            continue
        theirs = np.array([gaps.last(data, method, beta) for data in LOGISTIC])
        a, b = np.maximum(ours, RESOLVED), np.maximum(theirs, RESOLVED)
        counts = (str(int(pairs.sum())) for pairs in (a < b, a == b, a > b))
        rows.append([name, *counts, *map(_number, theirs.min(axis=1))])
    rows.append([METHODS[OURS], "", "", "", *map(_number, ours.min(axis=1))])
    header = ["against", "AM first-order lower", "equal", "higher", *(f"best, {data}" for data in LOGISTIC)]
    cells = len(LOGISTIC) * len(STEP_SIZES)
    return (
        f"Counts of which method ends lower after {gaps.steps} steps, over {cells} pairs of a data set and a step size,"
        f" and the lowest f - f* at the best step size:\n\n{markdown(header, rows)}"
    )


def _quadratic() -> str:
    rows = []
    for size in _QUADRATIC_STEP_SIZES:
        for method, beta, name in Gaps.lines():
            if not isinstance(beta, str):  # "tuned"
                crossings, furthest, gap = quadratic.overshoot(method, beta, size)
                rows.append([f"{size:g}", name, str(crossings), f"{furthest:.2f}", f"{gap:.0e}"])
    header = ["step size x L", "method", "sign changes", "furthest overshoot", "f at the end"]
    overshoot = f"Quadratic with 20 curvatures from 0.01 to 1, x_0 = 1, {quadratic.STEPS} steps:\n\n"
    return overshoot + markdown(header, rows) + "\n\n" + _greedy()


def _greedy() -> str:
    rows = []
    for size in _QUADRATIC_STEP_SIZES:
        for method in ("am_exact", OURS):
            found = np.array(quadratic.next_step_regret(size, method))
            means, regret = found[:, :2].mean(axis=0), np.median(found[:, 2])
            rows.append([f"{size:g}", METHODS[method], f"{means[0]:.2f}", f"{means[1]:.2f}", f"{regret:.1%}"])
    header = ["step size x L", "method", "mean beta_t", "mean best beta for one step", "median f excess over it"]
    return f"beta_t and the best beta for the next step, on the same quadratic:\n\n{markdown(header, rows)}"


def _draw_curves(path: Path, gaps: Gaps) -> None:
    """Draw f - f* over steps: a row for each of three step sizes, a column for each data set."""
    figure, axes = new_figure(len(SHOWN_STEP_SIZES), len(LOGISTIC), width=3.0, height=2.4)
    for row, size in enumerate(SHOWN_STEP_SIZES):
        for column, data in enumerate(LOGISTIC):
            panel = axes[row][column]
            for number, line in enumerate(gaps.lines()):
                curve = np.maximum(gaps.curve(data, *line[:2], size), RESOLVED)
                _line(panel, np.arange(len(curve)), curve, number, line)
            start = gaps.curve(data, "gd", None, size)[0]
            panel.set_ylim(RESOLVED, 30 * start)
            style(panel, title=f"{data}, step {size:g} / L", xlabel="step" if row == len(axes) - 1 else "")
        axes[row][0].set_ylabel("f - f*")
    save(figure, path, legend_of=axes[0][0])


def _draw_sensitivity(path: Path, gaps: Gaps) -> None:
    """Draw f - f* after the last step over the step size, a panel for each data set."""
    figure, axes = new_figure(1, len(LOGISTIC), width=3.0, height=2.8)
    for column, data in enumerate(LOGISTIC):
        panel = axes[0][column]
        for number, line in enumerate(gaps.lines()):
            _line(panel, np.array(STEP_SIZES), np.maximum(gaps.last(data, *line[:2]), RESOLVED), number, line)
        panel.set_xscale("log", base=2)
        panel.set_ylim(RESOLVED, 10)
        style(panel, title=data, xlabel="step size x L")
    axes[0][0].set_ylabel(f"f - f* after {gaps.steps} steps")
    save(figure, path, legend_of=axes[0][0])


def _line(panel: Axes, x: np.ndarray, y: np.ndarray, number: int, line: tuple[str, float | str | None, str]) -> None:
    method, beta, name = line
    ours = method.startswith("am_")
    look = {"linewidth": 2.0, "zorder": 3} if ours else {"linewidth": 1.2, "zorder": 2}
    panel.semilogy(x, y, "--" if beta == "tuned" else "-", color=COLOURS[number], label=name, **look)
