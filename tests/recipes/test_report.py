"""`am-lightning report`: the page that compares runs."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pretrain
import pytest
from matplotlib.image import imread
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from am_lightning.pretrain.commands.report.charts import charts
from am_lightning.pretrain.commands.report.page import ABSENT, differences, facts
from am_lightning.pretrain.commands.report.runs import find_runs
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.recipes.__main__ import main
from tests.ports import free_port
from tests.python import COLD

from .commands import RECIPES, arguments, load
from .pages import Page, intervals, read_curves, write_run

CHROMIUM = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> tuple[Path, str]:
    """Return a run of 20 steps with its two AdamW baselines, and its output."""
    root = tmp_path_factory.mktemp("compared") / "tiny"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        bare = "--model.warmup_fraction", "0", "--model.optimizer.lr", "1e-3"
        pretrain.main(arguments(root, corpus_folder, 20, "--compare", "true", "--monitor.peak_flops", "1e11", *bare))
    return root, printed.getvalue()


@pytest.fixture(scope="module")
def page(compared: tuple[Path, str]) -> Page:
    root, _ = compared
    assert main(["report", f"AM, no warmup={root}"]) == 0
    return Page((root / "report.html").read_text())


# ------------------------------------------------------------------ the comparison itself
@pytest.mark.slow
def test_the_comparison_trains_adamw_on_the_same_data(compared: tuple[Path, str]) -> None:
    root, printed = compared
    table = [line for line in printed.splitlines() if line.strip().startswith(("AM-AdamW ", "AdamW 0."))]
    names = [line.split("  ")[1].strip() for line in table]
    assert names == ["AM-AdamW", "AdamW 0.9, 5% warmup", "AdamW 0.8, 5% warmup"]
    assert len({line.split()[-2] for line in table}) == 3
    assert imread(root / "compare.png").shape[2] in (3, 4)
    assert len(list((root / "data").iterdir())) == 1
    for beta1 in (0.9, 0.8):
        folder = root / "compare" / f"adamw-{beta1}"
        curves = read_curves(folder / "logs")
        assert not [tag for tag in curves if tag.startswith("am/")]
        assert curves["lr-AdamW/pg1"].values[0] == pytest.approx(1e-3)  # 5 % of 20 steps is one
        group = load(folder / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"][0]
        assert tuple(group["betas"]) == (beta1, 0.95)
        assert "beta1_max" not in group
        # The first batch and the initial weights are the same, so the first loss is equal to the bit.
        assert curves["train/loss"].values[0] == read_curves(root / "logs")["train/loss"].values[0]
    assert not list(root.glob("compare/*/data"))


# ------------------------------------------------------------------ the page
def test_the_page_needs_nothing_else(page: Page, compared: tuple[Path, str]) -> None:
    assert [link for link in page.links if not link.startswith("data:")] == []
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|<link|<iframe|fetch\(|XMLHttpRequest|import\s*\(", page.text)
    assert set(re.findall(r"https?://[^\"'\s<]+", page.text)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, not an address
    assert imread(compared[0] / "report.png").shape[2] in (3, 4)


def test_the_summary_has_the_final_figures(page: Page, compared: tuple[Path, str]) -> None:
    _, printed = compared
    head, *rows = page.rows[:4]
    assert [row[0] for row in rows] == ["AM, no warmup", "adamw-0.8", "adamw-0.9"]
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    losses = {line.split("  ")[1].strip(): line.split() for line in printed.splitlines() if "AdamW" in line}
    printed_as = {"AM, no warmup": "AM-AdamW", "adamw-0.8": "AdamW 0.8, 5% warmup", "adamw-0.9": "AdamW 0.9, 5% warmup"}
    for name, ours in printed_as.items():
        assert [table[name]["validation loss"], table[name]["perplexity"]] == losses[ours][-2:]
        assert table[name]["steps"] == "20"
        assert table[name]["tokens"] == "5.12 k"  # 20 steps of 8 rows of 32 tokens
        assert table[name]["parameters"] == "37 k"
        assert re.fullmatch(r"[\d,]+", table[name]["tokens/s"]) and table[name]["MFU"].endswith("%")
    assert table["AM, no warmup"]["optimizer"] == "AMAdamW (lr 0.001, cap 0.8, beta2 0.95, no warmup)"
    assert table["adamw-0.9"]["optimizer"] == "AdamW (lr 0.001, beta1 0.9, beta2 0.95, 5% warmup)"
    assert [table[name]["skipped steps"] for name in printed_as] == ["0", ABSENT, ABSENT]


def test_the_charts_have_the_logged_points(page: Page, compared: tuple[Path, str]) -> None:
    root, _ = compared
    curves = read_curves(root / "logs")
    steps, values = page.series("loss")[0, "dots"]
    assert steps == [5, 10, 15, 20]
    assert values[:3] == pytest.approx(curves["val/loss"].values[:3].tolist(), rel=1e-4)
    assert values[3] == pytest.approx(curves["final/val_loss"].last, rel=1e-4)
    assert page.series("perplexity")[0, "dots"][1] == pytest.approx([math.exp(v) for v in values], rel=1e-3)
    steps, values = page.series("grad_norm")[1, "mean"]
    assert steps == list(range(1, 21)) and all(value > 0 for value in values)  # AdamW has one, too
    assert {run for run, _ in page.series("beta")} == {0}
    assert {run for run, _ in page.series("tokens")} == {run for run, _ in page.series("mfu")} == {0, 1, 2}
    assert page.series("lr")[2, "line"][1][0] == pytest.approx(1e-3)


def test_the_heatmap_has_the_layers(page: Page, compared: tuple[Path, str]) -> None:
    [heatmap] = page.data["heatmaps"]
    # In TensorBoard's map, too, parameters without weight decay come last.
    assert heatmap["rows"] == ["layers.0", "layers.1", "lm_head", "embed_tokens", "norm"]
    logged = read_curves(compared[0] / "logs")["am/beta/layer/layers.1/min"]
    assert heatmap["edges"] == list(range(21)) and heatmap["width"] == 1
    assert heatmap["values"][1] == pytest.approx(logged.values.tolist(), abs=1e-3)


def test_only_settings_that_differ_are_listed(page: Page) -> None:
    rows = [row for row in page.rows if "." in row[0]]
    assert {row[0]: row[1:] for row in rows if row[0].startswith(("model.", "data.", "trainer."))} == {
        "model.optimizer.class_path": ["am_lightning.AMAdamW", "torch.optim.AdamW", "torch.optim.AdamW"],
        "model.optimizer.init_args.betas": ["[0.8, 0.95]", "[0.8, 0.95]", "[0.9, 0.95]"],
        "model.optimizer.init_args.lambd": ["0.1", ABSENT, ABSENT],
        "model.optimizer.init_args.scope": ["tensor", ABSENT, ABSENT],
        "model.optimizer.init_args.nonfinite": ["skip", ABSENT, ABSENT],
        "model.optimizer.init_args.amsgrad": [ABSENT, "false", "false"],
        "model.optimizer.init_args.differentiable": [ABSENT, "false", "false"],
        "model.warmup_fraction": ["0", "0.05", "0.05"],
        "trainer.callbacks.AdaptiveMemory": ["yes", ABSENT, ABSENT],
    }


def test_differences_are_exact() -> None:
    one = {"a": {"b": 1, "same": [1, 2]}, "list": [{"class_path": "x.Both", "init_args": {"n": 1, "m": 2}}], "t": True}
    two = {"a": {"b": 1e-3, "same": [1, 2]}, "list": [{"class_path": "x.Both", "init_args": {"n": 3, "m": 2}}]}
    two |= {"t": False, "trainer": {"default_root_dir": "elsewhere"}, "new": None, "same": None}
    assert differences([one, two]) == {
        "a.b": ["1", "0.001"],
        "list.Both.n": ["1", "3"],
        "t": ["true", "false"],
    }
    moved = {**one, "list": [{"class_path": "x.First"}, *one["list"]]}
    assert differences([one, moved]) == {"list.First": [ABSENT, "yes"]}  # not shifted by the new entry


# ------------------------------------------------------------------ which runs, and in what state
@pytest.mark.slow
def test_a_resumed_run_has_each_step_once(tmp_path: Path, corpus_folder: Path) -> None:
    pretrain.main(arguments(tmp_path / "run", corpus_folder, 8))
    middle = tmp_path / "run" / "checkpoints" / "step-000004.ckpt"
    again = ["--ckpt_path", str(middle), "--trainer.val_check_interval", "3"]
    pretrain.main(arguments(tmp_path / "run", corpus_folder, 8, *again))
    assert len(list((tmp_path / "run" / "logs").glob("events*"))) >= 2
    [found] = find_runs([str(tmp_path / "run")])
    assert found.train_loss is not None
    assert found.train_loss.steps.tolist() == list(range(1, 9))
    assert found.momentum["layers.1"].steps.tolist() == list(range(1, 9))
    assert [step for step, _ in found.validation_points] == [6, 8]  # the validation at 5, before the resume, is removed


def test_lives_that_began_in_one_second_are_in_order(tmp_path: Path) -> None:
    """A process's tenth event file is called 9, its eleventh 10, which comes first in a sorted list of names."""
    for number, (first, value) in ((9, (1, 3.0)), (10, (2, 2.0))):
        life = write_run(tmp_path / str(number), {"train/loss": dict.fromkeys(range(first, 4), value)})
        [file] = (life / "logs").glob("events*")
        file.rename(tmp_path / f"events.out.tfevents.1700000000.host.1.{number}")
    (tmp_path / "events.out.tfevents.1700000000.host.1.11").touch()  # opened, nothing written
    assert read_curves(tmp_path)["train/loss"].values.tolist() == [3.0, 2.0, 2.0]


def test_a_run_that_is_still_going(tmp_path: Path) -> None:
    config = {"trainer": {"max_steps": 100}, "data": {"batch_size": 4, "seq_len": 8}}
    scalars = {"train/loss": dict.fromkeys(range(50), 3.0), "val/loss": {24: 3.5}}
    write_run(tmp_path / "going", scalars, config)
    assert main(["report", str(tmp_path / "going"), "-o", str(tmp_path / "out.html")]) == 0
    page = Page((tmp_path / "out.html").read_text())
    row = dict(zip(*page.rows[:2], strict=True))
    assert row["validation loss"] == "3.5000 (at step 25)"
    assert row["steps"] == "50 of 100" and row["tokens"] == "1.6 k"


def test_other_programs_tags_and_steps_are_understood(tmp_path: Path) -> None:
    """The HF Trainer's callback writes `train/` before every tag, and counts the steps that are done."""
    tags = {"train/loss": 2.0, "train/grad_norm": 0.5, "train/am/beta/mean": 0.7, "train/am/beta/mlp/min": 0.6}
    tags |= {"eval/loss": 2.5, "train/am/clamp/at_max": 0.9, "train/learning_rate": 1e-3, "train/am/skipped_steps": 2.0}
    folder = tmp_path / "hf" / "runs" / "Nov26_host"
    with SummaryWriter(str(folder)) as writer:
        for tag, value in tags.items():
            for step in (10, 20):
                writer.add_scalar(tag, value, step)
    [run] = find_runs([str(tmp_path / "hf")])
    assert run.config == {} and run.parameters is None and run.tokens is None
    assert run.train_loss is not None and run.train_loss.steps.tolist() == [10, 20]
    lasts = [run.val_loss, run.grad_norm, run.beta_mean, run.at_max, run.learning_rate, run.skipped]
    assert [curve.last for curve in lasts if curve] == pytest.approx([2.5, 0.5, 0.7, 0.9, 1e-3, 2.0])
    assert list(run.momentum) == ["mlp"]
    assert main(["report", str(tmp_path / "hf")]) == 0
    [heatmap] = Page((tmp_path / "hf" / "report.html").read_text()).data["heatmaps"]
    assert heatmap["by"].startswith("the lowest beta_t of a layer's tensors, by layer group")


@pytest.mark.parametrize(
    ("scalars", "steps"), [({"am/beta/mean": {50: 0.8, 5950: 0.8}}, "5,950"), ({"other": {1: 0}}, ABSENT)]
)
def test_a_run_without_a_loss_has_the_steps_of_its_momentum(
    tmp_path: Path, scalars: dict[str, dict[int, float]], steps: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An Accelerate loop that logs nothing itself makes such a run."""
    write_run(tmp_path / "run", scalars)
    (tmp_path / "run" / "logs" / "hparams.yaml").unlink()
    [run] = find_runs([str(tmp_path / "run")])
    assert facts(run)["steps"] == steps
    assert main(["report", str(tmp_path / "run")]) == 0
    assert ("has no loss and no momentum; its curves are other" in capsys.readouterr().err) is ("other" in scalars)


def test_the_momentum_has_its_lowest_and_its_cap(tmp_path: Path) -> None:
    [run] = find_runs(intervals(tmp_path, cap=0.89))
    [chart] = [chart for chart in charts([run]) if chart["id"] == "beta"]
    assert chart["reach"] == pytest.approx(0.89) and chart["floor"] == 0
    assert chart["unit"] == "beta_t, cap 0.89, running mean"
    [band] = [series for series in chart["series"] if series["style"] == "band"]
    assert band["values"] == pytest.approx([0.2, 0.4, 0.6]) and band["upper"] == pytest.approx([0.85] * 3)
    assert list(run.momentum) == ["mlp"]  # mlp/min is the lowest of mlp, not another group
    assert run.momentum["mlp"].values.tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_a_run_without_curves_of_layers_shows_its_last_picture(tmp_path: Path) -> None:
    folders = [intervals(tmp_path / str(cap), cap=cap)[0] for cap in (0.89, None)]
    assert main(["report", *folders, "-o", str(tmp_path / "report.html")]) == 0
    page = Page((tmp_path / "report.html").read_text())
    [(picture, alt)] = re.findall(r'<img class="layers" src="data:image/png;base64,(.*?)" alt="(.*?)"', page.text)
    shown = Image.open(io.BytesIO(base64.b64decode(picture)))
    assert shown.size == (6, 4) and shown.getpixel((0, 0)) == (60, 60, 60)
    assert alt.startswith("Momentum of 0.89: layers from top to bottom")
    captions = re.findall(r"<h3>(.*?)</h3><span>(.*?)</span>", page.text)
    first, second = (dict(captions)[run] for run in page.data["runs"])
    assert "its own picture" in first and "by layer group" in second


@pytest.mark.slow
def test_the_programs_agree_in_one_report(tmp_path: Path, corpus_folder: Path) -> None:
    """Lightning, Accelerate and the HF Trainer give the same recipe the same steps and the same values."""
    root = tmp_path / "runs"
    pretrain.main(arguments(root / "pretrain", corpus_folder, 6))
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for program in ("pretrain_accelerate", "pretrain_hf_trainer"):
        command = [COLD, str(RECIPES / f"{program}.py"), *arguments(root / program, corpus_folder, 6)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **alone, "MASTER_PORT": str(free_port())}
        result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
    assert main(["report", str(root)]) == 0
    page = Page((root / "report.html").read_text())
    head, *rows = page.rows[:4]
    assert [row[0] for row in rows] == page.data["runs"] == ["pretrain", "pretrain_accelerate", "pretrain_hf_trainer"]
    for name in ("optimizer", "parameters", "steps", "tokens", "skipped steps"):
        assert len({row[head.index(name)] for row in rows}) == 1, name
    for chart in ("loss", "beta", "at_max", "lr"):
        curves = [values for (_, style), values in page.series(chart).items() if style in ("mean", "line")]
        assert [steps for steps, _ in curves] == [[1, 2, 3, 4, 5, 6]] * 3, chart
        assert [values for _, values in curves] == [pytest.approx(curves[0][1], rel=1e-3)] * 3, chart
    assert "No settings differ except the output folders" in page.text


def test_a_folder_of_runs_stands_for_all_of_them(tmp_path: Path) -> None:
    for place in ("a/run", "b/run", "b/run/compare/adamw-0.9", "b/run/earlier/1"):
        write_run(tmp_path / place, {"train/loss": {0: 1.0}})
    runs = find_runs([str(tmp_path)])
    assert [run.name for run in runs] == ["a/run", "b/run", "adamw-0.9"]
    one, other = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert [run.name for run in find_runs([f"A={one}", f"B={other}", str(one)])] == ["A", "B", "adamw-0.9"]
    in_order = [f"B={other}", f"A={one}", f"baseline={other / 'compare' / 'adamw-0.9'}"]
    assert [run.name for run in find_runs(in_order)] == ["B", "A", "baseline"]


def test_runs_of_one_folder_are_named_alike(tmp_path: Path) -> None:
    """Lightning's `version_1` is a unique name, but it gets the longer form because `version_0` beside it needs it."""
    for place in ("once/logs_of/version_0", "twice/logs_of/version_0", "twice/logs_of/version_1"):
        write_run(tmp_path / place, {"train/loss": {0: 1.0}})
    names = [run.name for run in find_runs([str(tmp_path / "once"), str(tmp_path / "twice")])]
    assert names == ["once/logs_of/version_0", "twice/logs_of/version_0", "twice/logs_of/version_1"]


def test_a_name_is_text_and_not_markup(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"train/loss": {0: 1.0, 1: math.nan, 2: math.inf}})
    name = "</script><b>\"quoted\" & 'x'"
    assert main(["report", f"{name}={tmp_path / 'run'}"]) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "<b>" not in text
    assert Page(text).data["runs"] == [name]


def test_settings_and_tags_are_text_and_not_markup(tmp_path: Path) -> None:
    for number in range(2):
        run = tmp_path / f"run{number}"
        write_run(run, {"train/loss": {0: 1.0}, "am/beta/layer/<b>../../x</b>/min": {0: 0.5}})
        config = {"<b>key": f"<b onload=x>{number}", "trainer": {"default_root_dir": f"../../../<b>{number}"}}
        (run / "logs" / "config.yaml").write_text(json.dumps(config))
    assert main(["report", str(tmp_path / "run0"), str(tmp_path / "run1")]) == 0
    text = (tmp_path / "run0" / "report.html").read_text()
    assert "&lt;b onload=x&gt;1" in text
    assert "<b>" not in text and "<b onload" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run0", "run1"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing"], "missing is not a folder"),
        (["empty"], r"empty holds no run: no event file"),
        (["run", "empty"], r"empty holds no run"),
        (["run", "-o", "report.pdf"], r"--output is '.*report.pdf'; allowed: .*\.html"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run", {"train/loss": {0: 1.0}})
    with pytest.raises(SystemExit, match=says):
        main(["report", *arguments])
    assert not list(tmp_path.rglob("report.*"))


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"train/loss": {0: 1.0}})
    (tmp_path / "run" / "logs" / "config.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match=r"config\.yaml is not YAML"):
        find_runs([str(tmp_path / "run")])


# ------------------------------------------------------------------ in a browser
_LOOK = """<!DOCTYPE html><body><iframe style="width:390px;height:900px;border:0" src="report.html"></iframe><script>
const frame = document.querySelector("iframe");
addEventListener("load", () => {
  const page = frame.contentDocument.body;
  const drawn = page.scrollHeight;
  page.querySelectorAll(".plot").forEach((plot) => plot.replaceChildren());
  frame.style.height = `${(drawn + page.scrollHeight) / 2}px`; // a scrollbar appears when the charts are drawn
  frame.addEventListener("load", look);
  frame.contentWindow.location.reload();
});
function look() {
  const page = frame.contentDocument;
  const charts = [...page.querySelectorAll(".chart svg")];
  const outside = charts.filter((svg) => [...svg.querySelectorAll("text")].some((text) => {
    const box = text.getBBox();
    return box.x < 0 || box.x + box.width > svg.clientWidth + 1;
  })).length;
  const paths = charts.map((svg) => svg.querySelectorAll("path").length);
  const tip = page.getElementById("tip");
  const momentum = charts.find((svg) => svg.ariaLabel.startsWith("Momentum, mean"));
  const above = [...momentum.querySelectorAll("path")].filter((path) => path.getBBox().y < 0).length;
  charts.at(-1).dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  const column = tip.innerText;
  momentum.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  const told = tip.innerText;
  const finger = { pointerType: "touch", clientX: 1000, clientY: 0 };
  momentum.dispatchEvent(new PointerEvent("pointerdown", finger));
  momentum.dispatchEvent(new PointerEvent("pointerleave", finger)); // it is lifted
  const kept = tip.hidden ? null : tip.innerText;
  momentum.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" }));
  page.querySelector("#legend button").click();
  const blank = page.querySelector(".chart svg").querySelectorAll("path").length;
  document.body.textContent = JSON.stringify({ charts: charts.length, outside, above, blank, paths, column, told, kept,
    gone: tip.hidden, overflow: page.body.scrollWidth,
    labels: charts.every((svg) => svg.ariaLabel && svg.tabIndex === 0) });
}
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.slow
def test_a_browser_draws_it_on_a_phone(compared: tuple[Path, str], tmp_path: Path) -> None:
    """One of the runs has no cap, and its highest beta_t is above the cap of the other runs."""
    older = intervals(tmp_path / "older", cap=None)
    assert main(["report", str(compared[0]), *older, "-o", str(tmp_path / "report.html")]) == 0
    page = Page((tmp_path / "report.html").read_text())
    (tmp_path / "look.html").write_text(_LOOK)
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    result = subprocess.run(
        [str(CHROMIUM), *flags, f"file://{tmp_path}/look.html"], capture_output=True, text=True, timeout=120
    )
    found = re.search(r"\{.*\}", result.stdout)
    assert found, result.stderr
    seen = json.loads(found[0])
    assert seen["charts"] == len(page.data["charts"]) + 2 and seen["labels"]
    assert all(count > 0 for count in seen["paths"])
    assert seen["outside"] == 0 and seen["above"] == 0  # no label or band is cut off
    assert seen["overflow"] <= 390
    assert seen["column"].startswith("steps 1 to 2\n")  # the older run logged its layers in every second step
    low, high = (page.data["charts"][2]["series"][0][end] for end in ("values", "upper"))
    assert seen["told"].startswith("step 1\n") and f"{low[0]:.4g} to {high[0]:.4g}" in seen["told"]
    assert seen["kept"].startswith("step 20\n") and f"{low[-1]:.4g} to {high[-1]:.4g}" in seen["kept"] and seen["gone"]
    assert seen["blank"] == len(page.series("loss")) - 2  # the hidden run's training and validation are gone
