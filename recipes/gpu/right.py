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
FIRST = ("test_kernels", "test_precision", "test_waits", "test_capture", "test_strategies")  # the others after them
FEW = 3
ALONE = 8  # failed tests that are run again alone: an error on a GPU spoils what comes after it in the process
TEXT = 3000  # letters of a failure that are kept
WHOLE = (0, 1, 5)  # pytest's exit status: all passed, some failed, there are none
STOPPING = 12.0  # seconds that pytest has for its report when it is stopped


def parts(tiny: bool) -> list[Part]:
    names = {path.stem for path in TESTS.glob("test_*.py")} or {"tests"}
    ordered = sorted(names, key=lambda name: (name not in FIRST, FIRST.index(name) if name in FIRST else 0, name))
    return [Part(f"right/{name}", "right", 10, 180 if tiny else 270) for name in ordered]


def run(name: str, context: Context) -> dict[str, Any]:
    """What pytest said of one file.

    Raises:
        FailedError: a test failed, or there was no time for all.
        OutOfTimeError: there was none for any.
        NotMeasuredError: there are no tests here, or no pytest.
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
        raise FailedError(f"{counts['failed']} of {sum(counts.values())} tests failed: {_names(result)}", result)
    if not whole:
        raise FailedError(f"pytest did not come to its end: {counts['passed']} tests passed so far", result)
    if not counts["passed"]:
        reasons = sorted({test["why"] for test in result["skipped"]})
        raise NotMeasuredError(f"all {counts['skipped']} tests were skipped: {'; '.join(reasons)}")
    return result


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """A rehearsal runs a few tests of a file; the gates of tests/run.sh rehearse them all."""
    items[:] = items[:: max(1, len(items) // FEW)][:FEW]


def _names(result: dict[str, Any]) -> str:
    return ", ".join(test["name"] for test in result["failed"][:5])


def _pytest(what: list[str], report: Path, seconds: float) -> tuple[bool, str]:
    """Whether it came to its end, and its output; what has no time left is asked to stop, and still reports."""
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
    """Tests by outcome: names of those that passed, name and reason of skipped, name and text of failed ones; and what
    tests have measured on the way (``record_property``)."""
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
