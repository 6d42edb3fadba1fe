"""Write saved runs of the bench into a page, between its two markers.

    python -m am_lightning.bench.page RUN.json ... --to docs/performance.md

A run is the output of ``python -m am_lightning.bench --json``. Runs of one configuration become one table with medians
over the runs and the lowest and highest ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from am_lightning.bench.table import COLUMNS, LEGEND, Row, cells_of

Run = dict[str, Any]
BEGIN = "<!-- results: python -m am_lightning.bench.page writes from here -->"
END = "<!-- to here -->"
NOTHING = "Not measured by these commands yet."
RATIOS = ("x fused", "x same")
# Runs with equal values of all these keys have the same configuration.
KEYS = ("model", "device", "threads", "dtype", "weight_decay", "scope", "cpu_time", "hardware", "torch")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page. The process ends with an error if a run or the page is invalid."""
    parser = argparse.ArgumentParser(prog="python -m am_lightning.bench.page", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN.json", help="saved runs; none: nothing measured")
    parser.add_argument("--to", type=Path, required=True, help="the page; the text between its markers is replaced")
    options = parser.parse_args(arguments)
    try:
        text = written(options.to.read_text(encoding="utf-8"), read_runs(options.runs))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    options.to.write_text(text, encoding="utf-8")
    print(options.to)


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Return the runs that the bench has printed.

    Raises:
        ValueError: if a file is not such a run.
    """
    runs = []
    for path in paths:
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            missing = {*KEYS, "rows", "date", "command", "repeats", "left out"} - run.keys()
            missing |= {key for row in run["rows"] for key in {"optimizer", "mark", *COLUMNS} - row.keys()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is not the output of python -m am_lightning.bench --json: {error!r}") from error
        if missing or not run["rows"]:
            raise ValueError(f"{path} is a run without {', '.join(sorted(missing)) or 'rows'}")
        runs.append(run)
    return runs


def written(page: str, runs: Sequence[Run]) -> str:
    """Return the page with the runs between its markers.

    Raises:
        ValueError: if it does not have each marker once, in their order.
    """
    before, begun, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended) or BEGIN in rest or END in before + after:
        raise ValueError(f"the page must have {BEGIN} once, and {END} once after it")
    return f"{before}{BEGIN}\n\n{results(runs)}\n\n{END}{after}"


def results(runs: Sequence[Run]) -> str:
    """Return a section for each configuration. The order of the runs does not matter."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in KEYS), []).append(run)
    sections = [_section(groups[key]) for key in sorted(groups)]
    return "\n\n".join([*sections, f"```text\n{LEGEND}\n```"]) if sections else NOTHING


def _section(runs: Sequence[Run]) -> str:
    run = runs[0]
    where = f"{run['threads']} thread{'s' * (run['threads'] > 1)}" if run["device"] == "cpu" else run["device"]
    clock = "CPU seconds of all threads" if run["cpu_time"] else "seconds on the clock"
    rounds = _range(each["repeats"] for each in runs)
    sizes = f"{run['elements']:,} elements in {run['tensors']:,} tensors, {run['dtype']}"
    made = f"{run['hardware']}, torch {run['torch']}, {_range(each['date'] for each in runs)}"
    words = [f"{sizes}, weight decay {run['weight_decay']:g}, scope {run['scope']}. {made}."]
    if len(runs) == 1:
        words.append(f"One run of {rounds} rounds, {clock}.")
    else:
        words.append(f"{len(runs)} runs of {rounds} rounds, {clock}: medians over the runs (lowest to highest).")
    left_out: dict[str, str] = {}
    for each in runs:
        left_out |= each["left out"]
    words += [f"{name} is left out: {' '.join(why.split())}." for name, why in left_out.items()]
    commands = "\n".join(f"    {command}" for command in sorted({each["command"] for each in runs}))
    return "\n\n".join([f"### {run['model']}, {where}", commands, " ".join(words), _table(runs)])


def _table(runs: Sequence[Run]) -> str:
    found: dict[str, list[Row]] = {}
    for run in runs:
        for row in run["rows"]:
            found.setdefault(row["optimizer"], []).append(row)
    middles = sorted(((_middle(rows), rows) for rows in found.values()), key=lambda pair: float(pair[0]["ms"] or 0))
    lines = [["", *COLUMNS], ["---", *("---:" for _ in COLUMNS)]]
    for middle, rows in middles:
        name = f"**{middle['optimizer']}**" if middle["mark"] else str(middle["optimizer"])
        named = zip(COLUMNS, cells_of(middle), strict=True)
        lines.append([name, *(cell + _spread(key, rows) for key, cell in named)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _middle(rows: Sequence[Row]) -> Row:
    """Return the medians of the known values."""
    middle = dict(rows[0])
    for key in COLUMNS:
        values = [float(row[key]) for row in rows if row[key] is not None]  # type: ignore[arg-type]
        middle[key] = statistics.median(values) if values else None
    return middle


def _spread(key: str, rows: Sequence[Row]) -> str:
    """Return the range of a ratio over several runs if their texts differ."""
    texts = [COLUMNS[key].format(value) for value in sorted(float(row[key] or 0) for row in rows)]
    return f" ({texts[0]} to {texts[-1]})" if key in RATIOS and texts[0] != texts[-1] else ""


def _range(values: Iterable[Any]) -> str:
    found = sorted(set(values))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


if __name__ == "__main__":
    main()
