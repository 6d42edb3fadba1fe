"""Pages of `am-lightning report` as a reader sees them, and event files as their source."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch.utils.tensorboard import SummaryWriter

from am_lightning.pretrain.commands.report.events import PATTERN, Curve, read_files


class Page(HTMLParser):
    """The report as its reader sees it: links, tables, and the data behind the charts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self._inside: list[str] = []
        self.feed(text)
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
        assert found
        self.data: dict[str, Any] = json.loads(found[1])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "poster")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "td" in self._inside or "th" in self._inside:
            self.rows[-1][-1] += data.strip()

    def series(self, chart: str) -> dict[tuple[int, str], tuple[list[int], list[float]]]:
        """Return (run, style) -> steps, values."""
        found = next(c for c in self.data["charts"] if c["id"] == chart)
        return {(s["run"], s["style"]): (s["steps"], s["values"]) for s in found["series"]}


def write_run(folder: Path, scalars: dict[str, dict[int, float]], config: dict[str, Any] | None = None) -> Path:
    """Write event files and a configuration where the programs put them."""
    with SummaryWriter(str(folder / "logs")) as writer:
        for tag, points in scalars.items():
            for step, value in points.items():
                writer.add_scalar(tag, value, step)
    (folder / "logs" / "hparams.yaml").write_text("{}")  # Lightning's
    if config is not None:
        (folder / "logs" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def read_curves(log_dir: Path) -> dict[str, Curve]:
    """Return all scalars in a folder's event files by tag."""
    return read_files(log_dir.glob(PATTERN))


def intervals(folder: Path, *, cap: float | None) -> list[str]:
    """Write a run whose points cover intervals of two steps, with a picture of its layers but no curves of them."""
    with SummaryWriter(str(folder / "logs")) as writer:
        for step in (2, 4, 6):
            points = {"train/loss": 2.0, "am/beta/mean": 0.7, "am/beta/min": 0.1 * step}
            points |= {"am/beta/max": 0.99 if cap is None else 0.85}
            points |= {"am/beta/mlp": 0.6, "am/beta/mlp/min": 0.05 * step, "am/beta/mlp/max": 0.8, "am/beta/floor": 0.0}
            points |= {"am/beta/effective_steps": 4.0} | ({} if cap is None else {"am/beta/cap": cap})
            for tag, value in points.items():
                writer.add_scalar(tag, value, step)
            if cap is not None:
                picture = np.full((4, 6, 3), 10 * step, dtype=np.uint8)
                writer.add_image("am/beta/layers", picture, step, dataformats="HWC")
    return [str(folder)]
