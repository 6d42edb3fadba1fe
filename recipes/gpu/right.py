"""Part b: the tests of tests/gpu, a process for each file, and each failed test again in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from part import ROOT, Context, FailedError, NotMeasuredError, OutOfTimeError, Part

HERE = str(Path(__file__).parent)
TESTS = ROOT / "tests" / "gpu"
FIRST = ("test_kernels", "test_precision", "test_waits", "test_capture", "test_strategies")  # the other tests follow
FEW = 3
ALONE = 8  # failed tests that are run again alone, because an error on a GPU breaks later tests of the process
TEXT = 3000  # kept characters of a failure
WHOLE = (0, 1, 5)  # pytest's exit status: all passed, some failed, no tests
STOPPING = 12.0  # seconds that pytest has for its report when it is stopped


def parts(tiny: bool) -> list[Part]:
    names = {path.stem for path in TESTS.glob("test_*.py")} or {"tests"}
    ordered = [*(name for name in FIRST if name in names), *sorted(names - {*FIRST})]
    return [Part(f"right/{name}", "right", 10, 180 if tiny else 270) for name in ordered]


def run(name: str, context: Context) -> dict[str, Any]:
    """Return the results of the tests of one file.

    Raises:
        FailedError: if a test failed, or the time ran out before the last.
        OutOfTimeError: if the time ran out before the first.
        NotMeasuredError: if there are no tests here, or no pytest.
    """
    file = TESTS / f"{name.removeprefix('right/')}.py"
    if not file.exists():
        raise NotMeasuredError("tests/gpu is not here: it comes with a checkout")
    for module in ("pytest", "hypothesis"):
        if importlib.util.find_spec(module) is None:
            raise NotMeasuredError(f"{module} is not installed")
    report = context.work / "junit" / f"{file.stem}.xml"
    some = ["-p", "right"] if context.tiny else []  # this module as a plugin
    whole, output = _pytest([str(file), *some], report, context.left - 2 * STOPPING)
    if not report.exists() and context.left < 3 * STOPPING:
        raise OutOfTimeError
    if not report.exists():
        raise FailedError(f"pytest gave no report: {output[-TEXT:]}")
    result = read_report(report)
    for test in result["failed"][:ALONE]:
        if context.left > 4 * STOPPING and len(result["failed"]) > 1:
            again = report.with_suffix(".alone.xml")
            _pytest([f"{file}::{test['name']}"], again, context.left - 2 * STOPPING)
            found = read_report(again) if again.exists() else {"failed": [test]}
            test["alone"] = "failed" if test["name"] in [t["name"] for t in found["failed"]] else "passed"
    counts = {key: len(result[key]) for key in ("passed", "failed", "skipped")}
    if result["failed"]:
        names = ", ".join(test["name"] for test in result["failed"][:5])
        raise FailedError(f"{counts['failed']} of {sum(counts.values())} tests failed: {names}", result)
    if not whole:
        raise FailedError(f"pytest did not come to its end: {counts['passed']} tests passed so far", result)
    if not counts["passed"]:
        reasons = sorted({test["why"] for test in result["skipped"]})
        raise NotMeasuredError(f"all {counts['skipped']} tests were skipped: {'; '.join(reasons)}")
    return result


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Keep a few tests of a file, as a plugin of a rehearsal. The gates of tests/run.sh rehearse all of them."""
    items[:] = items[:: max(1, len(items) // FEW)][:FEW]


def _pytest(what: list[str], report: Path, seconds: float) -> tuple[bool, str]:
    """Return whether pytest finished, and its output. When its time is over, it is asked to stop and report."""
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    words = [
        sys.executable,
        "-m",
        "pytest",
        *what,
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        f"--junitxml={report}",
    ]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])}
    output = report.with_suffix(".txt")
    with open(output, "wb") as file:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=file, stderr=file)
        try:
            process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOPPING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    text = output.read_text(errors="replace")
    print(text)
    return process.returncode in WHOLE, text


def read_report(path: Path) -> dict[str, Any]:
    """Return the names of tests that passed, name and reason of skipped and name and text of failed tests.

    ``measured`` has what tests have recorded (``record_property``).
    """
    result: dict[str, Any] = {"passed": [], "failed": [], "skipped": [], "measured": {}, "seconds": 0.0}
    for case in ElementTree.parse(path).iter("testcase"):
        if not (name := case.get("name")):  # the test in which pytest was stopped
            continue
        result["seconds"] += float(case.get("time", 0))
        result["measured"] |= {each.get("name", ""): each.get("value") for each in case.iter("property")}
        wrong = [child for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped")
        if wrong:
            text = "\n".join(filter(None, [wrong[0].get("message"), wrong[0].text]))
            result["failed"].append({"name": name, "text": text[-TEXT:]})
        elif skipped is not None:
            result["skipped"].append({"name": name, "why": skipped.get("message", "")})
        else:
            result["passed"].append(name)
    result["seconds"] = round(result["seconds"], 1)
    return result
