"""python -m recipes.gpu.page: the page contains what the answers contain, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from am_lightning.pretrain.commands.plan import measured
from am_lightning.recipes.__main__ import main as recipes_main
from recipes.gpu.page import DEFAULT, HEAD, NOT_MEASURED, main, page

pytest.importorskip("matplotlib")
COMMAND = "recipes/gpu/check.sh --minutes 9 --out /some/place"
FAILURE = "/some/place/test_fused.py:3: E  assert 1 == 2"
VERSIONS = {"python": "3.12.0", "torch": "2.11.0"}
ROOT = Path(__file__).resolve().parents[2]


def answer(name: str, result: Any, status: str = "done", why: str = "", *, rehearsal: bool = False) -> dict[str, Any]:
    more = {
        "device": "NVIDIA H100",
        "versions": VERSIONS,
        "command": "recipes/gpu/check.sh --minutes 9",
        "code": "ab12",
    }
    when = {"date": "2026-01-02T03:04:05+00:00", "seconds": 7.5}
    return {"part": name, "status": status, "why": why, "result": result, "rehearsal": rehearsal, **more, **when}


def step(optimizer: str, ms: float, **more: Any) -> dict[str, Any]:
    counts = {"launches": 12, "waits": 0, "operations": 60}
    return (
        {"optimizer": optimizer, "ms": ms, "x fused": ms, "limit": 1.5, "GB/s": 2000.0, "extra MiB": None}
        | counts
        | more
    )


def training_run(name: str, loss: float, kind: str = "am", **more: Any) -> dict[str, Any]:
    run = {"name": name, "lr": 1e-3, "kind": kind, "seed": 0}
    betas = {"rows": ["embed", "layers.0"], "edges": [0, 1, 2, 3], "values": [[0.8, 0.1, None], [0.5, 0.4, 0.3]]}
    text = {"files": 12000, "bytes": 200_000_000}
    result = {
        "run": run,
        "final loss": loss,
        "losses": [3.0, 2.5, None],
        "spikes": 2,
        "tokens/s": 1e6,
        "MFU": 0.41,
        "text": text,
    }
    return result | ({"beta_t": betas, "beta_t mean": 0.7} if kind == "am" else {}) | more


ANSWERS = [
    answer("facts", {"device": {"name": "NVIDIA H100", "GiB": 79.2}, "system": {"compilers": ["gcc"]},
                     "steps": {"AMAdamW fused, float32": {"seconds": 3.25, "words": "Triton for 4"}}}),
    answer("right/test_fused", {"passed": ["test_a"], "measured": {"launches default float32": "12"},
                                "skipped": [{"name": "test_c", "why": "needs | two GPUs"}],
                                "failed": [{"name": "test_b", "text": FAILURE, "alone": "passed"}]},
           "failed", "1 of 3 tests failed: test_b"),
    answer("fast/llama1b-float32", {"model": "llama1b", "dtype": "float32", "tensors": 147, "elements": 1_235_814_400,
                                    "0.1": {"rows": [step("AdamW fused", 1.0), step("AMAdamW default", 1.625)],
                                            "left out": {"schedule-free AdamW": "schedulefree is not installed"}},
                                    "0.0": {"rows": [step("AMAdamW default", 1.4375)], "left out": {}}}),
    answer("fast/train-130m", None, "failed", "no memory for 1 rows\nof 256 tokens"),
    answer("worth/60m/AM", training_run("AM 0.89", 2.25)),
    answer("worth/60m/AdamW", training_run("AdamW 0.9 warmup", 2.5, "adamw")),
]  # fmt: skip


def write(out: Path, answers: list[dict[str, Any]], *more: str) -> Path:
    out.mkdir(parents=True)
    by_name = {each["part"]: each for each in answers}
    results = {"planned": [*by_name, *more], "parts": by_name}
    (out / "results.json").write_text(json.dumps(results))
    return out


def cells(text: str, start: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start} "))
    return [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]


def test_what_was_measured_stands_on_the_page(tmp_path: Path) -> None:
    failed = answer("facts", ANSWERS[0]["result"], "failed", "AMSGD: RuntimeError: no")
    out, to = write(tmp_path / "out", [failed, *ANSWERS[1:]], "worth/130m/AM"), tmp_path / "docs" / "gpu.md"
    main([str(out), "--to", str(to)])
    text = to.read_text()
    assert text.startswith(HEAD) and "rehearsal" not in text.lower()
    for words in ("NVIDIA H100 (GiB 79.2)", "2026-01-02", "torch 2.11.0", "`recipes/gpu/check.sh --minutes 9`", "ab12"):
        assert words in text
    assert cells(text, "AMAdamW fused, float32")[1:] == ["3.25", "Triton for 4"]
    assert "Failed: AMSGD: RuntimeError: no" in text
    assert cells(text, "test_fused")[1:4] == ["1", "1", "1"] and "`test_b` (alone: passed)" in text
    assert cells(text, "launches default float32")[1] == "12"
    assert ".../test_fused.py:3: E  assert 1 == 2" in text and "/some" not in text and "1 x needs \\| two GPUs" in text
    assert cells(text, "AMAdamW default")[1:9] == ["1.625", "1.62", "1.50", "2000", "-", "12", "0", "60"]
    assert cells(text, "AMAdamW default")[9] == "1.438"
    assert "schedule-free AdamW is left out: schedulefree is not installed." in text
    assert "Failed: no memory for 1 rows of 256 tokens" in text
    assert cells(text, "AM 0.89")[1:9] == ["0.001", "0", "2.2500", "-0.2500", "2", "0.700", "1,000,000", "41.0%"]
    assert cells(text, "AdamW 0.9 warmup")[4] == "-"
    assert cells(text, "worth/130m/AM")[1] == "not measured" and NOT_MEASURED not in text
    pictures = {path.name for path in to.parent.glob("*.png")}
    assert pictures == {"gpu-losses-60m.png", "gpu-beta-60m-0.png"} and all(f"({name})" in text for name in pictures)


def test_what_is_missing_is_not_measured(tmp_path: Path) -> None:
    main([str(tmp_path), "--to", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert text.count(NOT_MEASURED) == 7 and not list(tmp_path.glob("*.png"))
    assert text == page({}, [], tmp_path / "page.md")


def training_steps(recipe: str, rate: float, *, compiled: bool = False) -> dict[str, Any]:
    more = {"share": 0.1, "TFLOP/s": 1.0, "MFU": None, "peak bytes": None, "kernels": "Triton", "s": 0.5}
    rows = [{"optimizer": name, "tokens/s": rate, **more} for name in ("AMAdamW default", "AdamW fused")]
    rows[1]["tokens/s"] = 9e9  # another optimizer's rate must not be used
    result = {"recipe": recipe, "compiled": compiled, "batch rows": 8, "seq_len": 256, "rows": rows, "left out": {}}
    return answer(f"fast/train-{recipe}", result | {"forward and backward": 0.4})


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return `planned(answers, arguments)`: what `plan` prints if the page of these answers was made last."""
    monkeypatch.setattr(measured, "FILE", tmp_path / "measured.json")

    def plan(answers: list[dict[str, Any]], *args: str) -> str:
        out = write(tmp_path / f"out{len(list(tmp_path.iterdir()))}", answers)
        main([str(out), "--to", str(tmp_path / "page.md"), "--measured", str(measured.FILE)])
        assert recipes_main(["plan", *args]) == 0
        return capsys.readouterr().out

    return plan


@pytest.mark.slow
def test_plan_takes_what_was_measured(planned: Any) -> None:
    """plan uses this GPU and the nearest size. 130m has 134,259,456 parameters, at 3.0e5 tokens a second."""
    answers = [training_steps("130m", 300_000.0), training_steps("1b", 40_000.0)]
    # Operations per token: six per parameter except the embedding's, and 12 x 12 layers x 768 wide x 256 long.
    mfu = 300_000 * (6 * (134_259_456 - 32_100 * 768) + 12 * 12 * 768 * 256) / 989e12
    text = planned(answers, "130m", "--gpus", "1")
    assert f"at a measured MFU of {mfu:.3g}\n" in text and "300,000 tokens/s" in text
    assert "measured on NVIDIA H100 (130m, 1 GPU; training steps, 2026-01-02)\n" in text
    other = "(1b, 1 GPU; training steps, 2026-01-02); this is another size or number of GPUs: measure some steps"
    assert other in planned(answers, "llama-8b", "--gpus", "64")
    assert "(130m, 1 GPU; training steps, 2026-01-02); this is another" in planned(answers, "60m", "--gpus", "1")
    assert "an assumed MFU of 0.4" in planned(answers, "130m", "--gpus", "1", "--gpu", "A100")
    assert "an assumed MFU of 0.4" in planned(answers, "130m", "--gpus", "1", "--peak-tflops", "500")
    assert "an assumed MFU of 0.4" in planned(answers, "130m", "--gpus", "1", "--trainer.precision", "32-true")
    assert "an assumed MFU of 0.4" in planned(answers, "130m", "--gpus", "1", "--model.compile", "true")
    assert "a given MFU of 0.3\n" in planned(answers, "130m", "--gpus", "1", "--mfu", "0.3")
    assert "an assumed MFU of 0.4" in planned([], "130m", "--gpus", "1"), "nothing measured takes the file away"


def test_plan_takes_a_run_before_steps(planned: Any) -> None:
    """plan uses the median of the AM-AdamW runs."""
    runs = [
        answer(f"worth/130m/{rate}", training_run("AM 0.89", 2.0, **{"tokens/s": float(rate)}))
        for rate in (10**5, 2 * 10**5, 10**6)
    ]
    adamw = answer("worth/130m/AdamW", training_run("AdamW 0.9 warmup", 2.5, "adamw"))
    text = planned([training_steps("130m", 3e5), *runs, adamw], "130m", "--gpus", "1")
    assert "200,000 tokens/s" in text and "(130m, 1 GPU; training run, 2026-01-02)\n" in text


def test_names_of_devices_are_the_gpus_of_plan() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "H100",
        "NVIDIA H200": "H200",
        "NVIDIA GH200 480GB": None,
        "NVIDIA A100-SXM4-40GB": "A100-40",
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA L40S": "L40S",
        "AMD Instinct MI300X": "MI300X",
        "CPU, 2 threads": None,
    }
    assert {name: measured.gpu_of(name) for name in names} == names


def test_a_file_of_plans_speed_that_is_broken_is_named(planned: Any) -> None:
    measured.FILE.write_text("[{}]")
    with pytest.raises(SystemExit, match=r"measured.json: not what python -m recipes.gpu.page writes .*; remove it"):
        recipes_main(["plan", "130m", "--gpus", "1"])


def test_a_rehearsal_is_marked_and_is_never_docs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = write(tmp_path / "out", [answer("facts", {"steps": {}}, rehearsal=True)])
    main([str(out), "--to", str(tmp_path / "page.md")])
    assert "A rehearsal" in (tmp_path / "page.md").read_text()
    docs = tmp_path / "docs" / "gpu.md"
    with pytest.raises(SystemExit):
        main([str(out), "--to", str(docs)])
    assert "does not become docs/gpu.md" in capsys.readouterr().err and not docs.exists()
    with pytest.raises(SystemExit):
        main([str(out), "--to", str(tmp_path / "page.md"), "--measured", str(tmp_path / "measured.json")])
    assert "does not become plan's speed. Leave out --measured" in capsys.readouterr().err
    assert not (tmp_path / "measured.json").exists()


def test_what_check_did_not_write_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "absent")])
    assert "is not a folder" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(SystemExit, match="did not write"):
        main([str(tmp_path), "--to", str(tmp_path / "page.md")])


def test_the_page_of_the_docs_is_made_by_this_program() -> None:
    text = (ROOT / DEFAULT).read_text()
    assert text.startswith(HEAD) and "A rehearsal" not in text
