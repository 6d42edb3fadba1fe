"""`am-lightning report RUN...`: one HTML file, and a PNG beside it, that compare runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from am_lightning.pretrain.runtime.errors import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.description = (
        "Compare runs in one self-contained HTML file and a PNG: losses, momentum by layer, clamps, gradient norm, "
        "throughput, skipped steps, and the settings that differ."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run, or of several runs; NAME=FOLDER names a run. The runs of --compare are included",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="the HTML file; default: report.html in the first RUN")


def run(args: argparse.Namespace) -> int:
    """Write the report and print its path."""
    # These import matplotlib and TensorBoard, which the other commands do not need.
    from am_lightning.pretrain.commands.report.page import write_page
    from am_lightning.pretrain.commands.report.plot import report_figure, save
    from am_lightning.pretrain.commands.report.runs import find_runs, split_name

    output = Path(args.output) if args.output else split_name(args.runs[0])[1] / "report.html"
    require(output.suffix in (".html", ".htm"), "--output", str(output), "a file name that ends in .html")
    output = output.expanduser().resolve()
    picture = output.with_suffix(".png")
    runs = find_runs(args.runs)
    save(report_figure(runs), picture)
    write_page(output, runs, picture)
    for found in runs:
        print(f"  run      {found.name} ({found.folder})")
        if not any((found.train_loss, found.val_loss, found.beta_mean)):
            tags = ", ".join(sorted(found.curves)[:5])
            print(f"warning: {found.name} has no loss and no momentum; its curves are {tags}", file=sys.stderr)
    print(f"  report   {output}\n  picture  {picture}")
    return 0
