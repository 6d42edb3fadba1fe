"""recipes/gpu/check.sh without a GPU: where it runs, what it keeps, and how it resumes; the parts at toy sizes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.ports import free_port
from tests.processes import wait_for_end, wait_until
from tests.python import COLD

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "recipes" / "gpu"
CHECK = GPU / "check.sh"


def command(out: Path, *more: str) -> list[str]:
    return ["bash", str(CHECK), "--device", "cpu", "--tiny", "--out", str(out), *more]


def run(out: Path, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"AM_PYTHON": COLD, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command(out, *more), env=env, capture_output=True, text=True, timeout=300)


def answer(name: str, status: str = "done", **more: Any) -> dict[str, Any]:
    common = {"why": "", "date": "2026-01-01T00:00:00+00:00", "code": "x", "rehearsal": True, "result": {}}
    return {"part": name, "status": status, **common, **more}


def answers(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())["parts"]
    return found


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Return the modules beside check.sh, which import each other by their short names."""
    names = ("part", "right", "worth", "check")
    monkeypatch.syspath_prepend(str(GPU))
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name)


def wheel(folder: Path) -> None:
    """Build a wheel of one module."""
    folder.mkdir()
    info = "am_extra-1.0.dist-info"
    with zipfile.ZipFile(folder / "am_extra-1.0-py3-none-any.whl", "w") as file:
        file.writestr("am_extra.py", "")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: am-extra\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
def test_it_needs_no_network_no_cache_and_no_home(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels")
    nowhere = {"HOME": "/dev/null/home", "XDG_CACHE_HOME": "/dev/null/cache", "PIP_CACHE_DIR": str(tmp_path / "empty")}
    nowhere |= {
        "PIP_INDEX_URL": f"http://127.0.0.1:{free_port()}/simple",
        "PIP_RETRIES": "0",
        "PIP_CONFIG_FILE": os.devnull,
    }
    out = tmp_path / "out"
    done = run(out, "--only", "facts", "--wheels", str(tmp_path / "wheels"), **nowhere)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = answers(out)["facts"]
    assert (facts["status"], facts["rehearsal"]) == ("done", True)
    assert facts["result"]["steps"].keys() >= {"AMAdamW fused, float32", "the callback in Lightning's Trainer"}
    python = next((out / "work" / "env" / "bin").glob("python3"))
    code = "import am_extra, torch; print(am_extra.__file__)"  # without a PYTHONPATH, as programs of tests start
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert found.stdout.startswith(str(out)), found.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out", "wheels"}


@pytest.mark.slow
def test_a_cut_off_loses_one_part_and_the_next_call_continues(tmp_path: Path, modules: dict[str, ModuleType]) -> None:
    out, last = tmp_path / "out", "fast/many-tiny-float32"
    known = {part.name: answer(part.name) for part in modules["check"].all_parts(True) if part.name != last}
    out.mkdir()
    modules["part"].keep(out, *known.values())  # all that another machine has left
    env = os.environ | {"AM_PYTHON": COLD, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(out), env=env, stdout=subprocess.PIPE, text=True)
    log = out / "work" / "logs" / "fast.many-tiny-float32.log"
    deadline = time.monotonic() + 60
    wait_until(lambda: process.poll() is not None or (log.exists() and bool(children(process.pid))), "no part", 60)
    assert process.poll() is None
    started = children(process.pid)
    process.kill()  # this is how a machine is taken away
    process.communicate()
    wait_for_end(started, deadline - time.monotonic())  # the part does not outlive the call that started it
    assert last not in answers(out)
    again = run(out)
    assert again.returncode == 0, again.stdout + again.stderr
    ran = [line for line in again.stdout.splitlines() if line.split()[0] in {*known, last}]
    assert [line.split()[0] for line in ran] == [last]
    now = answers(out)
    assert {name: now[name] for name in known} == known
    rows = {row["optimizer"]: row for row in now[last]["result"]["0.1"]["rows"]}
    assert rows["AMAdamW default"]["ms"] > 0 and rows["RAdam foreach"]["operations"] > 0


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_what_is_missing_comes_before_what_failed(tmp_path: Path, modules: dict[str, ModuleType]) -> None:
    check = modules["check"]
    names = [part.name for part in check.all_parts(False)]
    assert names[0] == "facts" and names[1].startswith("right/") and len(set(names)) == len(names)
    pair = [name for name in names if name.startswith("worth/60m/")][:2]
    assert pair == ["worth/60m/AM-0.89-lr-0.001", "worth/60m/AdamW-0.9-warmup-lr-0.001"]
    options = check.argparse.Namespace(tiny=False, only=None)
    known = {names[0]: answer(names[0], "failed"), names[1]: answer(names[1])}
    known[names[2]] = answer(names[2], "not measured")
    assert [part.name for part in check.chosen(options, known)] == [*names[3:], names[0], names[2]]
    options.only = "right"
    assert all(part.name.startswith("right/") for part in check.chosen(options, known))


def refused(*words: str) -> str:
    """Return check.sh's message after it has found an interpreter."""
    done = subprocess.run([COLD, str(GPU / "check.py"), *words], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    return done.stderr


def test_an_interpreter_without_torch_is_not_taken(tmp_path: Path) -> None:
    for name in ("python", "python3"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin", "AM_PYTHON": "nonsense"}
    done = subprocess.run(["bash", str(CHECK)], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "no Python here can import torch: tried nonsense, python3, python" in done.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--only", "nonsense"], "--only nonsense is not a part. Parts: facts, right/"),
        (["--wheels", "."], "holds no wheel: recipes/gpu/wheels.sh"),
        (["--minutes", "0"], "--minutes must be > 0"),
    ],
)
def test_wrong_arguments(more: list[str], words: str, tmp_path: Path) -> None:
    done = refused("--device", "cpu", "--tiny", "--out", str(tmp_path / "out"), *more)
    assert words in done


def test_a_rehearsal_and_measurements_are_not_mixed(tmp_path: Path, modules: dict[str, ModuleType]) -> None:
    modules["part"].keep(tmp_path, answer("facts", rehearsal=False))
    said = refused("--device", "cpu", "--tiny", "--out", str(tmp_path))
    assert "holds measurements, and this call makes a rehearsal" in said
    assert "it needs --tiny" in refused("--device", "cpu")
    (tmp_path / "results.json").write_text('{"parts": {')
    said = refused("--device", "cpu", "--tiny", "--out", str(tmp_path))
    assert "results.json is damaged" in said and "remove it, or give another --out" in said
    assert (tmp_path / "results.json").read_text() == '{"parts": {'


def test_a_part_without_an_answer_failed(tmp_path: Path, modules: dict[str, ModuleType]) -> None:
    """The part was killed by a signal, or exceeded its own time or the call's."""
    check, part = modules["check"], modules["part"]
    options = check.argparse.Namespace(out=tmp_path, device="cpu", tiny=True, python=COLD)
    short, log = part.Part("short", "facts", 0, 1.0), tmp_path / "work" / "logs" / "short.log"

    def ended(words: list[str], seconds: float) -> int | None:
        with open(tmp_path / "log", "wb") as file:
            status: int | None = check._status(words, dict(os.environ), file, seconds)
        return status

    assert ended([COLD, "-c", "import os; os.kill(os.getpid(), 9)"], 30) == -signal.SIGKILL
    assert ended(["sh", "-c", f"sleep 60 & echo $! >{tmp_path}/pid; wait"], 0.5) is None
    wait_for_end([int((tmp_path / "pid").read_text())], 20)
    assert check.run_part(short, options, time.monotonic() + 0.1, {}, "x") is None  # not started
    assert not log.exists()
    found = check.run_part(short, options, time.monotonic() + 60, {"PATH": "/nowhere"}, "x")
    assert (found["status"] == "failed" and "took more than its 1 s" in found["why"]) or "status" in found["why"]
    assert answers(tmp_path) == {"short": found}


TESTS = """
import os, time, pytest
def test_good(record_property): record_property('launches', 12)
@pytest.mark.skip(reason="no GPU here")
def test_absent(): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_long(): time.sleep({seconds})
def test_never(): pass
"""


def test_reports_of_pytest(tmp_path: Path, modules: dict[str, ModuleType]) -> None:
    right = modules["right"]
    file, report = tmp_path / "test_toy.py", tmp_path / "report.xml"
    file.write_text(TESTS.format(seconds=0))
    options = ["--rootdir", str(tmp_path), "-c", os.devnull, "-o", "junit_family=xunit1"]
    whole, _ = right._pytest([str(file), *options], report, 60)
    found = right.read_report(report)
    assert found["measured"] == {"launches": "12"}
    assert whole and found["passed"] == ["test_good", "test_long", "test_never"]
    assert found["skipped"] == [{"name": "test_absent", "why": "no GPU here"}]
    assert [test["name"] for test in found["failed"]] == ["test_bad"] and "one is not two" in found["failed"][0]["text"]


@pytest.mark.slow
def test_a_file_of_tests_that_is_stopped_says_what_it_had(tmp_path: Path, modules: dict[str, ModuleType]) -> None:
    right = modules["right"]
    file, report = tmp_path / "test_toy.py", tmp_path / "report.xml"
    file.write_text(TESTS.replace("time.sleep({seconds})", "raise KeyboardInterrupt"))
    whole, _ = right._pytest([str(file), "--rootdir", str(tmp_path), "-c", os.devnull], report, 60)
    found = right.read_report(report)
    assert not whole and found["passed"] == ["test_good"] and len(found["failed"]) == 1
    items = list(range(100))
    right.pytest_collection_modifyitems(items)
    assert items == [0, 33, 66]
    file.write_text("import time; time.sleep(60)")
    start = time.monotonic()
    assert not right._pytest([str(file), "--rootdir", str(tmp_path), "-c", os.devnull], report, 1)[0]
    assert time.monotonic() - start < 50


def test_training_runs_are_what_they_are_called(tmp_path: Path, modules: dict[str, ModuleType]) -> None:
    """The recipes' own parser reads the options of each run."""
    pytest.importorskip("jsonargparse")
    from am_lightning.pretrain.runtime.run_config import read_run_config

    worth, part = modules["worth"], modules["part"]
    context = part.Context(tmp_path, "cuda", False, 0.0)
    for name, (recipe, which) in list(worth._table(False).items())[:4]:
        values = worth.settings(recipe, which, context, tmp_path / "run", tmp_path)
        values["data.tokenizer"] = "bytes"
        words = ["--config", recipe]
        for key, value in values.items():
            words += [f"--{key}", json.dumps(value) if isinstance(value, list) else str(value)]
        settings = read_run_config(words)
        optimizer = settings.check_optimizer()
        group = optimizer.param_groups[0]
        assert type(optimizer).__name__ == ("AMAdamW" if name.startswith("worth/60m/AM") else "AdamW")
        assert (group["lr"], tuple(group["betas"])) == (which.lr, (which.beta1, 0.95))
        assert settings.data.batch_size * settings.shape.seq_len == 512 * 256 and settings.steps == 1000
        assert settings.config["model"]["warmup_fraction"] == which.warmup and settings.accumulate == 4


@pytest.mark.slow
def test_a_training_run_from_the_sources_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    name = "worth/60m/AM-0.89-lr-0.001"
    done = run(tmp_path, "--only", name)
    assert done.returncode == 0, done.stdout + done.stderr
    result = answers(tmp_path)[name]["result"]
    assert len(result["losses"]) == 6 and 4 < result["final loss"] < 8
    assert result["beta_t"]["rows"] and result["text"]["bytes"] > 300_000
