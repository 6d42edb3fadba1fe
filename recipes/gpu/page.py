"""``python -m recipes.gpu.page OUT`` makes docs/gpu.md, and the speed that ``plan`` reads, from results of check.sh."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from am_lightning.pretrain.commands.plan.measured import FILE, Measured
from am_lightning.pretrain.commands.report.charts import smooth
from am_lightning.pretrain.commands.report.events import Curve
from am_lightning.pretrain.model.shape import count_parameters, flops_per_token
from am_lightning.pretrain.runtime.paths import recipe_files
from am_lightning.pretrain.runtime.run_config import read_run_config
from recipes.gpu.part import read_json
from recipes.studies.page import markdown

Answer = dict[str, Any]
Answers = dict[str, Answer]

NOT_MEASURED = "Not measured on a GPU."
DEFAULT = Path("docs/gpu.md")
REHEARSAL = """\
!!! warning "A rehearsal"
    Toy sizes on a CPU: the numbers on this page mean nothing, and it is not a part of the docs."""
HEAD = """\
# Measured on a GPU

`recipes/gpu/check.sh` runs everything that only a GPU can answer, and `python -m recipes.gpu.page OUT` writes this page
from its answers. Nothing here is written by hand. [How to run it](gpu_check.md);
[what is counted and checked without a GPU](performance_gpu.md)."""
BASE = "AdamW 0.9 warmup"  # the run that the others are compared with
DRAWN = ("AM 0.89", "AM 0.89 warmup")  # runs whose beta_t is shown
SKIPPED_SHOWN, FAILED_LINES = 12, 12


def main(arguments: list[str] | None = None) -> None:
    """Write the page. The process ends with an error if OUT cannot be read, or if a rehearsal would become docs."""
    parser = argparse.ArgumentParser(prog="python -m recipes.gpu.page", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of check.sh; an empty folder: nothing measured")
    parser.add_argument("--to", type=Path, default=DEFAULT, help="file of the page; pictures are written beside it")
    speed = f"file of plan's speed; by default that of the package if the page is {DEFAULT}, and else none"
    parser.add_argument("--measured", type=Path, help=speed)
    options = parser.parse_args(arguments)
    if not options.out.is_dir():
        parser.error(f"{options.out} is not a folder")
    try:
        results = read_json(options.out / "results.json")
        answers: Answers = dict(results.get("parts", {}))
        planned = list(results.get("planned", answers))
    except (ValueError, AttributeError) as error:
        sys.exit(f"error: {options.out} holds a results.json that check.sh did not write: {error}")
    rehearsal = any(each.get("rehearsal") for each in answers.values())
    if rehearsal and (options.to.resolve().parts[-2:] == DEFAULT.parts or options.measured):
        what = "plan's speed. Leave out --measured" if options.measured else f"{DEFAULT}. Give another --to"
        parser.error(f"{options.out} holds a rehearsal: it does not become {what}")
    options.to.parent.mkdir(parents=True, exist_ok=True)
    options.to.write_text(page(answers, planned, options.to, rehearsal=rehearsal), encoding="utf-8")
    print(options.to)
    path = FILE if options.measured is None and options.to == DEFAULT else options.measured
    if path is not None:
        _write_measured(measured(answers), path)
        print(path)


def _write_measured(found: list[Measured], path: Path) -> None:
    """Write the file that `plan` reads; an empty list removes it."""
    if found:
        path.write_text(json.dumps([dataclasses.asdict(each) for each in found], indent=1) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def measured(answers: Answers) -> list[Measured]:
    """Return training speeds of AM-AdamW, from training steps of the default and as the median of a recipe's runs."""
    found = []
    for name, each in answers.items():
        if name.startswith("fast/train-") and each["status"] == "done":
            result = each["result"]
            rates = [row["tokens/s"] for row in result["rows"] if row["optimizer"] == "AMAdamW default"]
            found += [_measured(result["recipe"], each, rate, "training steps", result["compiled"]) for rate in rates]
    for recipe in _recipes(answers):
        done = [each for each in _of_kind(answers, f"worth/{recipe}/").values() if each["status"] == "done"]
        runs = [each for each in done if each["result"]["run"]["kind"] == "am" and each["result"]["tokens/s"]]
        if runs:
            rate = statistics.median(each["result"]["tokens/s"] for each in runs)
            found.append(_measured(recipe, runs[0], rate, "training run"))
    return found


def _measured(recipe: str, each: Answer, tokens_per_second: float, kind: str, compiled: bool = False) -> Measured:
    """Return a speed on one GPU, on which all parts train, in the recipes' bf16-mixed."""
    shape = read_run_config(["--config", str(recipe_files()[recipe])]).shape
    tflops = tokens_per_second * flops_per_token(shape) / 1e12
    parameters, date = count_parameters(shape), each["date"][:10]
    return Measured(each["device"], 1, recipe, parameters, "bf16-mixed", compiled, tflops, kind, date)


def page(answers: Answers, planned: list[str], to: Path, *, rehearsal: bool = False) -> str:
    """Return the Markdown, and write its pictures beside ``to``."""
    sections = [HEAD, *([REHEARSAL] if rehearsal else []), _made(answers)]
    sections += ["## First steps", _first_steps(answers.get("facts"))]
    sections += ["## Tests", *_tests(_of_kind(answers, "right/"))]
    steps = {k: v for k, v in _of_kind(answers, "fast/").items() if not k.startswith("fast/train-")}
    sections += ["## Steps of optimizers", *_each(steps, _step_table)]
    sections += ["## Training steps", *_each(_of_kind(answers, "fast/train-"), _training_table)]
    sections += ["## Training runs"]
    for recipe in _recipes(answers) or [""]:
        sections += _runs(_of_kind(answers, f"worth/{recipe}"), recipe, to)
    return "\n\n".join([*sections, "## What was run", _everything(answers, planned)]) + "\n"


def _of_kind(answers: Answers, start: str) -> Answers:
    return {name: each for name, each in answers.items() if name.startswith(start)}


def _recipes(answers: Answers) -> list[str]:
    names = dict.fromkeys(name.split("/")[1] for name in _of_kind(answers, "worth/"))
    return sorted(names, key=lambda name: int(name.rstrip("m")) if name.rstrip("m").isdigit() else 0)


def _made(answers: Answers) -> str:
    """Return devices, dates, versions and commands."""
    run = [each for each in answers.values() if "device" in each]
    if not run:
        return f"**{NOT_MEASURED}** No part below has been run yet."
    facts = (answers.get("facts", {}).get("result") or {}) if answers else {}
    device = {key: value for key, value in (facts.get("device") or {}).items() if key != "name" and value}
    system = facts.get("system") or {}
    lines = {
        "Device": "; ".join(sorted({each["device"] for each in run})) + _in_brackets(device),
        "Machine": _in_brackets(system).strip(" ()"),
        "Date": _range(each["date"][:10] for each in run),
        "Versions": ", ".join(f"{name} {version}" for name, version in run[-1]["versions"].items()),
        "Command": "; ".join(f"`{command}`" for command in dict.fromkeys(_command(each["command"]) for each in run)),
        "Code": _range(each["code"] for each in run) + " (of its files)",
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items() if text)


def _command(text: str) -> str:
    """Return the command without its options that name folders."""
    return re.sub(r" --(?:out|wheels)[ =]\S+", "", text)


def _range(texts: Iterable[str]) -> str:
    found = sorted(set(texts))
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _in_brackets(values: dict[str, Any]) -> str:
    words = [f"{key} {', '.join(v) if isinstance(v, list) else v}" for key, v in values.items()]
    return f" ({'; '.join(words)})" if words else ""


def _first_steps(facts: Answer | None) -> str:
    if facts is None:
        return NOT_MEASURED
    steps = (facts.get("result") or {}).get("steps", {})
    rows = [[name, f"{step['seconds']:.2f}", _cell(step["words"])] for name, step in steps.items()]
    table = [markdown(["three first steps", "s", "what ran"], rows)] if rows else []
    return "\n\n".join(table + ([_why(facts)] if facts["status"] != "done" else []))


def _tests(files: Answers) -> list[str]:
    if not files:
        return [NOT_MEASURED]
    rows, failed, skipped, measured = [], [], Counter[str](), []
    for name, each in files.items():
        result = each.get("result")
        counts = [str(len(result[key])) for key in ("passed", "failed", "skipped")] if result else ["-"] * 3
        rows.append([name.removeprefix("right/"), *counts, "" if each["status"] == "done" else _cell(each["why"])])
        for test in (result or {}).get("failed", []):
            alone = f" (alone: {test['alone']})" if "alone" in test else ""
            text = _without_folders("\n".join(test["text"].strip().splitlines()[-FAILED_LINES:]))
            failed.append(f"`{test['name']}`{alone}:\n\n```text\n{text}\n```")
        measured += [[_cell(what), _cell(value)] for what, value in (result or {}).get("measured", {}).items()]
        skipped.update(_cell(test["why"]) for test in (result or {}).get("skipped", []))
    sections = [markdown(["tests/gpu", "passed", "failed", "skipped", "remarks"], rows)]
    if measured:
        sections.append(markdown(["measured by tests", ""], measured))
    if skipped:
        reasons = [f"{count} x {reason}" for reason, count in skipped.most_common(SKIPPED_SHOWN)]
        sections.append("Skipped: " + "; ".join(reasons) + ".")
    return sections + (["### Failures", *failed] if failed else [])


def _each(answers: Answers, table: Callable[[Answer], str]) -> list[str]:
    """Return a heading for every part, with its table or the reason why it has none."""
    if not answers:
        return [NOT_MEASURED]
    sections = []
    for name, each in sorted(answers.items()):
        sections += [f"### {name.removeprefix('fast/')}", table(each) if each["status"] == "done" else _why(each)]
    return sections


def _step_table(each: Answer) -> str:
    result = each["result"]
    with_decay = result["0.1"]
    bare = {row["optimizer"]: row for row in result["0.0"]["rows"]}
    columns = {"ms": ".3f", "x fused": ".2f", "limit": ".2f", "GB/s": ".0f", "extra MiB": ".1f"}
    columns |= {"launches": "d", "waits": "d", "operations": "d"}
    columns |= {f"{key}, no decay": columns[key] for key in ("ms", "x fused")}
    rows = [
        row | {f"{key}, no decay": value for key, value in bare.get(row["optimizer"], {}).items()}
        for row in with_decay["rows"]
    ]
    words = f"{result['elements']:,} elements in {result['tensors']:,} tensors, {result['dtype']}. {each['device']}."
    return f"{words}{_left_out(with_decay)}\n\n{_table(rows, columns)}"


def _training_table(each: Answer) -> str:
    result = each["result"]
    columns = {
        "ms a step": ".1f",
        "its share, with clipping": ".1%",
        "tokens/s": ",.0f",
        "TFLOP/s": ".1f",
        "MFU": ".1%",
    }
    columns |= {"peak GiB": ".1f", "kernels": ""}
    rows = []
    for row in result["rows"]:
        peak = None if row["peak bytes"] is None else row["peak bytes"] / 2**30
        rows.append(row | {"ms a step": row["s"] * 1e3, "its share, with clipping": row["share"], "peak GiB": peak})
    words = f"{result['batch rows']} rows of {result['seq_len']} tokens, recipe {result['recipe']}"
    words += f"; forward and backward alone {result['forward and backward'] * 1e3:.1f} ms. {each['device']}."
    return f"{words}{_left_out(result)}\n\n{_table(rows, columns)}"


def _table(rows: Iterable[Answer], columns: dict[str, str], first: str = "optimizer") -> str:
    """Return a table of the columns in their formats, "-" for what is missing."""
    cells = [
        [
            "-" if row.get(key) is None else _cell(format(row[key], form))
            for key, form in ({first: ""} | columns).items()
        ]
        for row in rows
    ]
    return markdown([first, *columns], cells)


def _left_out(result: Answer) -> str:
    return "".join(f" {name} is left out: {_cell(why)}." for name, why in result["left out"].items())


def _runs(answers: Answers, recipe: str, to: Path) -> list[str]:
    """Return final losses beside those of AdamW with warmup at the same learning rate and seed, and pictures."""
    done = {name: each["result"] for name, each in answers.items() if each["status"] == "done"}
    others = [f"{name.split('/')[-1]}: {_why(each)}" for name, each in answers.items() if name not in done]
    heading = [f"### {recipe}"] if recipe else []
    if not done:
        return [*heading, NOT_MEASURED, *others]
    base = {_pair(r["run"]): r["final loss"] for r in done.values() if r["run"]["name"] == BASE}
    rows = []
    for result in sorted(done.values(), key=lambda result: (_pair(result["run"]), result["final loss"])):
        run, loss = result["run"], result["final loss"]
        beside = None if run["name"] == BASE else base.get(_pair(run))
        minus = None if beside is None else loss - beside
        more = {"run": run["name"], "final validation loss": loss, f"minus {BASE}": minus}
        rows.append(result | run | more | {"beta_t": result.get("beta_t mean")})
    columns = {"lr": "g", "seed": "d", "final validation loss": ".4f", f"minus {BASE}": "+.4f", "spikes": "d"}
    columns |= {"beta_t": ".3f", "tokens/s": ",.0f", "MFU": ".1%"}
    pictures = [f"![Training losses, {recipe}]({_draw_losses(to, recipe, done)})"]
    pictures += [f"![beta_t of {name}, layers over steps]({file})" for name, file in _draw_betas(to, recipe, done)]
    first = next(iter(done.values()))
    text = f"{first['text']['files']:,} Python sources, {first['text']['bytes'] / 1e6:.1f} MB"
    words = f"{text}; {len(first['losses'])} steps. beta_t: the median over steps of its mean over tensors."
    return [*heading, words, _table(rows, columns, "run"), *pictures, *others]


def _draw_losses(to: Path, recipe: str, results: Answers) -> str:
    """Draw running means of the training losses beside the page, and return the picture's file name."""
    from recipes.studies.figures import COLOURS, new_figure, save, style  # matplotlib, if there is something to draw

    figure, ((panel,),) = new_figure(1, 1, width=8.0, height=4.4)
    names = sorted({result["run"]["name"] for result in results.values()})
    lowest = min(result["run"]["lr"] for result in results.values())
    starts = []
    for result in results.values():
        run = result["run"]
        losses = np.array(result["losses"], float)
        mean = smooth(Curve(np.arange(1, len(losses) + 1), losses))
        starts.append(mean.values[len(mean.values) // 20])
        colour = COLOURS[names.index(run["name"]) % len(COLOURS)]
        label = f"{run['name']}, lr {run['lr']:g}" + (f", seed {run['seed']}" if run["seed"] else "")
        dashes = "-" if run["kind"] == "am" else "--"
        width = 1.6 if run["lr"] == lowest else 0.8
        panel.plot(mean.steps, mean.values, color=colour, linestyle=dashes, linewidth=width, label=label)
    panel.set_ylim(top=max(starts))
    style(panel, xlabel="step", ylabel="training loss, nats per token, running mean")
    path = to.with_name(f"{to.stem}-losses-{recipe}.png")
    save(figure, path, legend_of=panel)
    return path.name


def _draw_betas(to: Path, recipe: str, results: Answers) -> list[tuple[str, str]]:
    """Draw beta_t of the first run of each of DRAWN, and return the runs' names and the pictures' file names."""
    from recipes.studies.figures import draw_heatmap

    drawn: dict[str, str] = {}
    for result in results.values():
        run, betas = result["run"], result.get("beta_t")
        if betas is None or run["name"] not in DRAWN or run["name"] in drawn:
            continue
        values = np.array(betas["values"], float)
        path = to.with_name(f"{to.stem}-beta-{recipe}-{len(drawn)}.png")
        title = f"beta_t of {run['name']}, lr {run['lr']:g}, {recipe}"
        draw_heatmap(path, betas["rows"], np.array(betas["edges"]), values, title, lowest=0.0)
        drawn[run["name"]] = path.name
    return list(drawn.items())


def _pair(run: dict[str, Any]) -> tuple[float, int]:
    return run["lr"], run["seed"]


def _everything(answers: Answers, planned: list[str]) -> str:
    if not planned:
        return NOT_MEASURED
    rows = []
    for name in planned:
        each = answers.get(name, {"status": "not measured", "why": "not begun"})
        more = [str(each.get(key, "")) for key in ("device", "date", "seconds")]
        rows.append([name, each["status"], *more, _cell(each["why"])])
    return markdown(["part", "status", "device", "date", "s", "why"], rows)


def _why(each: Answer) -> str:
    return f"{each['status'].capitalize()}: {_cell(each['why'])}"


def _without_folders(text: str) -> str:
    """Replace absolute paths, which belong to the machine, by their last name."""
    return re.sub(r"(?<![\w./:~-])(?:/[\w.+-]+)+/(?=[\w.+-])", ".../", text)


def _cell(text: object) -> str:
    """Return the text of a cell, on one line, escaped, and cut if it is long."""
    line = _without_folders(" ".join(str(text).split())).replace("|", "\\|")
    return line if len(line) <= 300 else line[:297] + "..."


if __name__ == "__main__":
    main()
