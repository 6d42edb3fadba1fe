"""The page that a study writes: what was run on what, its tables and figures."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch


def write_page(path: Path, title: str, command: str, protocol: str, parts: Sequence[str]) -> str:
    """Write Markdown to `path`: a title, the command, device, versions and date, the protocol, then the parts.

    Args:
        path: of the page; its folder is made.
        title: of the page.
        command: that makes it.
        protocol: what was run, seeds included.
        parts: tables and figures, with their headings.

    Returns:
        What was written.
    """
    made = (
        f"Made by `{command}` on {date.today().isoformat()}; {_device()}, torch {torch.__version__.partition('+')[0]},"
        f" Python {platform.python_version()}. {protocol}"
    )
    text = "\n\n".join([f"# {title}", made, *parts]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return text


def figure(name: str, says: str) -> str:
    """A picture that lies beside the page."""
    return f"![{says}]({name})"


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, one thread a run"


def _processor() -> str:
    """As Linux names it; platform.processor() is empty on many machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
