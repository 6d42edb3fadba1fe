"""The report as one HTML file: figures and settings in tables, curves as data that its own script draws."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.colors import to_hex

from am_lightning.pretrain.commands.list import short
from am_lightning.pretrain.commands.report.charts import charts, heatmaps
from am_lightning.pretrain.commands.report.differences import ABSENT, differences
from am_lightning.pretrain.commands.report.plot import COLOUR_MAP, COLOURS
from am_lightning.pretrain.commands.report.runs import RunData
from am_lightning.pretrain.runtime.atomic_files import replacing

# The runs' colours on a dark page, in the order of plot.COLOURS.
_DARK = ("#56B4E9", "#F28E4B", "#35C79A", "#E39AC7", "#E0B23C", "#BDBDBD", "#8FD3FF", "#B9A3F2")
_SHADES = 32
_CURE = "Free some space, or give another place with --output."


def write_page(path: Path, runs: Sequence[RunData], picture: Path) -> None:
    """Write the report; it needs no other file and no network.

    Args:
        path: the HTML file.
        runs: at least one.
        picture: a PNG of the same, shown where scripts are switched off.

    Raises:
        RecipeError: the file cannot be written.
    """
    text = (
        _environment()
        .get_template("report.html.j2")
        .render(
            runs=runs,
            facts=summary(runs),
            differences=differences([run.config for run in runs]) if len(runs) > 1 else {},
            unconfigured=[run.name for run in runs if not run.config],
            folders=[str(run.folder) for run in runs],
            data=page_data(runs),
            picture=picture.read_bytes(),
            colours={"light": COLOURS, "dark": _DARK},
            made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        )
    )
    with replacing(path, _CURE) as file:
        file.write(text.encode())


def page_data(runs: Sequence[RunData]) -> dict[str, Any]:
    """What the page's script draws."""
    shades = matplotlib.colormaps[COLOUR_MAP].resampled(_SHADES)
    return {
        "runs": [run.name for run in runs],
        "charts": charts(runs),
        "heatmaps": heatmaps(runs),
        "shades": [to_hex(shades(i)) for i in range(_SHADES)],
    }


def summary(runs: Sequence[RunData]) -> list[dict[str, str]]:
    """The summary table: a row of facts for each run, without the columns that no run has."""
    rows = [facts(run) for run in runs]
    empty = {name for name in rows[0] if all(row[name] == ABSENT for row in rows)}
    return [{name: text for name, text in row.items() if name not in empty} for row in rows]


def facts(run: RunData) -> dict[str, str]:
    """A row of the summary table: heading -> text."""
    found = run.newest_val_loss
    loss = None if found is None else found[1]
    return {
        "optimizer": _optimizer(run),
        "parameters": _count(run.parameters),
        "steps": _steps(run),
        "tokens": _count(run.tokens),
        "validation loss": _validation(run),
        "perplexity": ABSENT if loss is None else f"{math.exp(min(loss, 700)):.2f}",
        "tokens/s": _last(run.tokens_per_second.median if run.tokens_per_second else None, "{:,.0f}"),
        "MFU": _last(run.mfu.median if run.mfu else None, "{:.1%}"),
        "skipped steps": _last(run.skipped.last if run.skipped else None, "{:.0f}"),
    }


def _optimizer(run: RunData) -> str:
    made = run.setting("model.optimizer") or {}
    if not isinstance(made, dict) or not made.get("class_path"):
        return "adaptive memory" if run.momentum else ABSENT
    name, arguments = str(made["class_path"]).rpartition(".")[2], made.get("init_args") or {}
    swapped = name == "AdamW" and bool(run.momentum)
    parts = [f"lr {arguments['lr']:g}"] if isinstance(arguments.get("lr"), float | int) else []
    if betas := arguments.get("betas"):
        parts.append(f"{'cap' if name.startswith('AM') else 'beta1'} {betas[0]:g}, beta2 {betas[1]:g}")
    if warmup := run.setting("model.warmup_fraction"):
        parts.append(f"{warmup:.0%} warmup")
    else:
        parts.append("no warmup")
    return f"{name}{' made AMAdamW' if swapped else ''} ({', '.join(parts)})"


def _steps(run: RunData) -> str:
    if not run.steps:
        return ABSENT
    planned = run.setting("trainer.max_steps")
    unfinished = isinstance(planned, int) and 0 < run.steps < planned
    return f"{run.steps:,} of {planned:,}" if unfinished else f"{run.steps:,}"


def _validation(run: RunData) -> str:
    """The newest loss; with its step, where that was not the run's last one."""
    if (found := run.newest_val_loss) is None:
        return ABSENT
    step, loss = found
    unfinished = step < max(run.steps, run.setting("trainer.max_steps") or 0)
    return f"{loss:.4f}" + (f" (at step {step:,})" if unfinished else "")


def _count(number: int | None) -> str:
    return ABSENT if number is None else short(number, " ")


def _last(value: float | None, form: str) -> str:
    return ABSENT if value is None else form.format(value)


def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("am_lightning.pretrain.commands.report", "template")
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    made.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return made
