"""``python -m tests.mutations [NAME-SUBSTRING ...] [--jobs N] [--json FILE] [--no-check]``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutations.children import preload
from tests.mutations.runner import ERROR, NOT_SEEN, SEEN, STALE, Result, Runner
from tests.mutations.tables import AREAS, select

_WIDTH = 100  # width of a printed reason


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the faults; return 0 if every one is detected."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description="Plant faults; do tests see them?")
    parser.add_argument("words", nargs="*", metavar="NAME-SUBSTRING", help="faults, or whole areas; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--no-check", action="store_true", help="do not run the tests without a fault first")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; allowed: a whole number >= 1")
    try:
        chosen = select(options.words)
    except ValueError as error:
        parser.error(str(error))
    preload()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # children and copies are removed
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        runner = Runner(Path(folder).resolve(), min(options.jobs, len(chosen)))
        if not options.no_check and not _check(runner, [test for _, mutation in chosen for test in mutation.tests]):
            return 1
        results = runner.run(chosen, _tell)
    print(_table(results))
    if options.json is not None:
        options.json.write_text(json.dumps([_as_dict(result) for result in results], indent=1) + "\n")
    return 0 if all(result.good for result in results) else 1


def _check(runner: Runner, tests: Sequence[str]) -> bool:
    """Return whether all named tests pass without a fault."""
    distinct, began = list(dict.fromkeys(tests)), time.monotonic()
    failures = runner.check(distinct)
    seconds = time.monotonic() - began
    if failures:
        print("without any fault these fail already, so that they would prove nothing:", *failures, sep="\n  ")
        return False
    print(f"without any fault {len(distinct)} named tests pass ({seconds:.0f} s)", flush=True)
    return True


def _tell(result: Result) -> None:
    reason = result.by if result.verdict in (STALE, ERROR) else result.by[:_WIDTH]
    print(f"{result.verdict:8} {result.seconds:5.1f} s  {result.area}: {result.mutation.name}  [{reason}]", flush=True)


def _table(results: Sequence[Result]) -> str:
    """Print counts by area."""
    lines = [f"{'area':12} {'planted':>8} {'seen':>8} {'not seen':>8} {'stale':>8} {'error':>8}"]
    areas = [area for area in AREAS if any(result.area == area for result in results)]
    for area in [*areas, "all"]:
        mine = [result.verdict for result in results if area in (result.area, "all")]
        counts = [len(mine), *(mine.count(verdict) for verdict in (SEEN, NOT_SEEN, STALE, ERROR))]
        lines.append(f"{area:12} " + " ".join(f"{count:8}" for count in counts))
    return "\n".join(lines)


def _as_dict(result: Result) -> dict[str, object]:
    mutation = result.mutation
    return {
        "area": result.area,
        "name": mutation.name,
        "file": mutation.file,
        "tests": list(mutation.tests),
        "verdict": result.verdict,
        "seconds": round(result.seconds, 1),
        "by": result.by,
    }


if __name__ == "__main__":
    sys.exit(main())
