"""`am-lightning report RUN...`: one HTML file, and a PNG beside it, that compare runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from am_lightning.pretrain.runtime.errors import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.description = (
        "Write one self-contained HTML file, and a PNG, that compare runs: losses, momentum by layer, clamps, "
        "gradient norm, throughput, skipped steps, and the settings that differ."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run, or of several; NAME=FOLDER calls it NAME. What --compare trained beside it comes along",
    )
    parser.add_argument("-o", "--output", default=None, help="the HTML file; default: report.html in the first RUN")


def run(args: argparse.Namespace) -> int:
    """Write the report and say where it is.

    Raises:
        RecipeError: a folder holds no run, or a file cannot be written.
    """
    # matplotlib and TensorBoard, which the other subcommands do not need.
    from am_lightning.pretrain.commands.report.page import write_page
    from am_lightning.pretrain.commands.report.plot import draw_report
    from am_lightning.pretrain.commands.report.runs import find_runs, folder_of

    output = Path(args.output) if args.output else folder_of(args.runs[0]) / "report.html"
    require(output.suffix in (".html", ".htm"), "--output", str(output), "a file name that ends in .html")
    output = output.expanduser().resolve()
    picture = output.with_suffix(".png")
    runs = find_runs(args.runs)
    draw_report(picture, runs)
    write_page(output, runs, picture)
    for found in runs:
        print(f"  run      {found.name} ({found.folder})")
    print(f"  report   {output}\n  picture  {picture}")
    return 0
