"""The report as one HTML file: tables of figures and settings, and curves as data that its own script draws."""

from __future__ import annotations

import base64
import itertools
import json
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
from am_lightning.pretrain.commands.report.plot import COLOUR_MAP, COLOURS, HINT, OPTION
from am_lightning.pretrain.commands.report.runs import RunData
from am_lightning.pretrain.runtime.atomic_files import replacing

# The runs' colours on a dark page, in the order of plot.COLOURS.
_DARK = ("#56B4E9", "#F28E4B", "#35C79A", "#E39AC7", "#E0B23C", "#BDBDBD", "#8FD3FF", "#B9A3F2")
_SHADES = 32
# Folders always differ and tell nothing about a run.
_FOLDERS = ("trainer.default_root_dir", "checkpoint.dirpath", "data.cache_dir", "config", "ckpt_path", "compare")
# These follow the model's settings, and not every program writes them.
_LINKED = ("data.seq_len", "data.vocab_size")
_SECTIONS = ("model", "data", "seed_everything", "trainer")
ABSENT = "–"  # noqa: RUF001
_LISTED = "yes"  # the value of a class in a list


def write_page(path: Path, runs: Sequence[RunData], picture: Path) -> None:
    """Write the report, which needs no other file and no network.

    Args:
        path: the HTML file.
        runs: at least one.
        picture: a PNG that is shown if scripts are switched off.

    Raises:
        RecipeError: if the file cannot be written.
    """
    rows = [facts(run) for run in runs]
    shown = [name for name in rows[0] if any(row[name] != ABSENT for row in rows)]
    shades = matplotlib.colormaps[COLOUR_MAP].resampled(_SHADES)
    loader = jinja2.PackageLoader("am_lightning.pretrain.commands.report", "template")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    pages.filters["base64"] = lambda data: base64.b64encode(data).decode()
    text = pages.get_template("report.html.j2").render(
        runs=runs,
        facts=[{name: row[name] for name in shown} for row in rows],
        differences=differences([run.config for run in runs]) if len(runs) > 1 else {},
        data={  # the page's script draws these
            "runs": [run.name for run in runs],
            "charts": [chart for chart in charts(runs) if chart["series"]],
            "heatmaps": heatmaps(runs),
            "shades": [to_hex(shades(i)) for i in range(_SHADES)],
        },
        picture=picture.read_bytes(),
        colours={"light": COLOURS, "dark": _DARK},
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    with replacing(path, HINT, OPTION) as file:
        file.write(text.encode())


def facts(run: RunData) -> dict[str, str]:
    """Return a row of the summary table: heading -> text, or ABSENT."""
    planned = run.setting("trainer.max_steps")
    planned = planned if isinstance(planned, int) else 0
    validation = perplexity = ABSENT
    if run.validation_points:
        step, loss = run.validation_points[-1]
        validation = f"{loss:.4f}" + (f" (at step {step:,})" if step < max(run.steps, planned) else "")
        perplexity = f"{math.exp(min(loss, 700)):.2f}"
    return {
        "optimizer": _optimizer(run),
        "parameters": ABSENT if run.parameters is None else short(run.parameters, " "),
        "steps": (f"{run.steps:,}" + (f" of {planned:,}" if run.steps < planned else "")) if run.steps else ABSENT,
        "tokens": ABSENT if run.tokens is None else short(run.tokens, " "),
        "validation loss": validation,
        "perplexity": perplexity,
        "tokens/s": f"{run.tokens_per_second.median:,.0f}" if run.tokens_per_second else ABSENT,
        "MFU": f"{run.mfu.median:.1%}" if run.mfu else ABSENT,
        "skipped steps": f"{run.skipped.last:.0f}" if run.skipped else ABSENT,
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
    warmup = run.setting("model.warmup_fraction")
    parts.append(f"{warmup:.0%} warmup" if warmup else "no warmup")
    return f"{name}{', converted to AMAdamW' if swapped else ''} ({', '.join(parts)})"


def differences(configs: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return dotted path -> the value in each configuration, or ABSENT, of all settings that differ.

    The model's settings come first. The arguments of a class that only some configurations list are left out, and so is
    a key that is null in some and absent in the others.
    """

    def section(key: str) -> int:
        first = key.partition(".")[0]
        return (*_SECTIONS, first).index(first)

    flat: list[dict[str, str]] = [{} for _ in configs]
    for config, found in zip(configs, flat, strict=True):
        _flatten(config, "", found)
    keys = sorted(dict.fromkeys(key for values in flat for key in values), key=section)
    rows = {key: [values.get(key, ABSENT) for values in flat] for key in keys if key not in _FOLDERS + _LINKED}
    rows = {key: values for key, values in rows.items() if len(set(values)) > 1 and set(values) != {"null", ABSENT}}
    unlisted = tuple(f"{key}." for key, values in rows.items() if set(values) == {_LISTED, ABSENT})
    return {key: values for key, values in rows.items() if not key.startswith(unlisted)}


def _flatten(value: Any, path: str, flat: dict[str, str]) -> None:
    """Add dotted path -> value as text. An entry of a list of classes is called `Class`, its second one `Class#2`."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _flatten(inner, f"{path}.{key}" if path else str(key), flat)
    elif isinstance(value, list) and any(isinstance(entry, dict) and "class_path" in entry for entry in value):
        for entry in value:
            made = entry if isinstance(entry, dict) else {"class_path": entry}
            name = f"{path}.{str(made.get('class_path')).rpartition('.')[2]}"
            places = itertools.chain([name], (f"{name}#{number}" for number in itertools.count(2)))
            place = next(place for place in places if place not in flat)
            flat[place] = _LISTED
            if made.get("init_args"):
                _flatten(made["init_args"], place, flat)
    else:
        flat[path] = _text(value)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
