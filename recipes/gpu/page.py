"""``python -m recipes.gpu.page OUT``: docs/gpu.md, and the speed that ``plan`` reads, from what
``recipes/gpu/check.sh`` wrote into OUT."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from am_lightning.pretrain.commands.plan.measured import FILE, Measured, write_measured
from am_lightning.pretrain.model.shape import count_parameters, flops_per_token
from am_lightning.pretrain.runtime.paths import recipe_files
from am_lightning.pretrain.runtime.run_config import read_run_config
from recipes.studies.tables import markdown

Answer = dict[str, Any]
Answers = dict[str, Answer]

NOT_MEASURED = "Not measured on a GPU."
DEFAULT = Path("docs/gpu.md")
REHEARSAL = """\
!!! warning "A rehearsal"
    Toy sizes on a CPU: the numbers on this page say nothing, and it is no part of the docs."""
HEAD = """\
# Measured on a GPU

`recipes/gpu/check.sh` runs what only a GPU can answer, and `python -m recipes.gpu.page OUT` writes this page
from its answers; nothing here is written by hand. [How to run it](gpu_check.md);
[what is counted and checked without a GPU](performance_gpu.md)."""
BASE = "AdamW 0.9 warmup"  # what the other runs are compared with
SKIPPED_SHOWN, FAILED_LINES = 12, 12


def main(arguments: list[str] | None = None) -> None:
    """Write the page; the process ends with a message where there is nothing to read, or a rehearsal is to be docs."""
    parser = argparse.ArgumentParser(prog="python -m recipes.gpu.page", description=__doc__)
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="folder that check.sh wrote; an empty one: nothing measured"
    )
    parser.add_argument("--to", type=Path, default=DEFAULT, help="the page; pictures are written beside it")
    speed = f"where plan's speed is written; none unless the page is {DEFAULT}: then the package's"
    parser.add_argument("--measured", type=Path, help=speed)
    options = parser.parse_args(arguments)
    if not options.out.is_dir():
        parser.error(f"{options.out} is not a folder")
    answers, planned = read_answers(options.out)
    rehearsal = any(each.get("rehearsal") for each in answers.values())
    if rehearsal and (options.to.resolve().parts[-2:] == DEFAULT.parts or options.measured):
        what = "plan's speed. Leave out --measured" if options.measured else f"{DEFAULT}. Give another --to"
        parser.error(f"{options.out} holds a rehearsal: it does not become {what}")
    options.to.parent.mkdir(parents=True, exist_ok=True)
    options.to.write_text(page(answers, planned, options.to, rehearsal=rehearsal), encoding="utf-8")
    print(options.to)
    path = FILE if options.measured is None and options.to == DEFAULT else options.measured
    if path is not None:
        write_measured(measured(answers), path)
        print(path)


def measured(answers: Answers) -> list[Measured]:
    """How fast models were trained with AM-AdamW: the default's training steps, and a recipe's runs in their median."""
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
    """On one GPU, which all parts of the check train on, in the recipes' bf16-mixed."""
    shape = read_run_config(["--config", str(recipe_files()[recipe])]).shape
    tflops = tokens_per_second * flops_per_token(shape) / 1e12
    parameters, date = count_parameters(shape), each["date"][:10]
    return Measured(each["device"], 1, recipe, parameters, "bf16-mixed", compiled, tflops, kind, date)


def read_answers(out: Path) -> tuple[Answers, list[str]]:
    """The answers by part, and the parts that were to be run.

    Args:
        out: results.json is read and, where they are there, the parts' own files, which are newer.

    Raises:
        SystemExit: a file is no JSON.
    """
    try:
        whole = out / "results.json"
        results = json.loads(whole.read_text(encoding="utf-8")) if whole.exists() else {}
        found: Answers = dict(results.get("parts", {}))
        for path in sorted((out / "parts").glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            found[content["part"]] = content
    except (ValueError, KeyError, AttributeError) as error:
        sys.exit(f"error: {out} holds a file that check.sh did not write: {error}")
    return found, list(results.get("planned", found))


def page(answers: Answers, planned: list[str], to: Path, *, rehearsal: bool = False) -> str:
    """The Markdown, with pictures written beside ``to``."""
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
    """Devices, dates, versions, commands."""
    run = [each for each in answers.values() if "device" in each]
    if not run:
        return f"**{NOT_MEASURED}** Every part below waits for its first run."
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
    """Without where things were."""
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
    """A heading and a table of every part; or why there is none."""
    if not answers:
        return [NOT_MEASURED]
    sections = []
    for name, each in sorted(answers.items()):
        sections += [f"### {name.removeprefix('fast/')}", table(each) if each["status"] == "done" else _why(each)]
    return sections


def _step_table(each: Answer) -> str:
    result = each["result"]
    with_decay, without = result["0.1"], result["0.0"]
    bare = {row["optimizer"]: row for row in without["rows"]}
    columns = {"ms": ".3f", "x fused": ".2f", "limit": ".2f", "GB/s": ".0f", "extra MiB": ".1f"}
    counts = {"launches": "d", "waits": "d", "operations": "d"}
    rows = []
    for row in with_decay["rows"]:
        other = bare.get(row["optimizer"], {})
        cells = [_number(row.get(key), form) for key, form in (columns | counts).items()]
        rows.append(
            [_cell(row["optimizer"]), *cells, _number(other.get("ms"), ".3f"), _number(other.get("x fused"), ".2f")]
        )
    header = ["optimizer", *columns, *counts, "ms, no decay", "x fused, no decay"]
    words = f"{result['elements']:,} elements in {result['tensors']:,} tensors, {result['dtype']}. {each['device']}."
    return f"{words}{_left_out(with_decay)}\n\n{markdown(header, rows)}"


def _training_table(each: Answer) -> str:
    result = each["result"]
    rows = []
    for row in result["rows"]:
        peak = row["peak bytes"]
        numbers = [(row["s"] * 1e3, ".1f"), (row["share"], ".1%"), (row["tokens/s"], ",.0f"), (row["TFLOP/s"], ".1f")]
        numbers += [(row["MFU"], ".1%"), (None if peak is None else peak / 2**30, ".1f")]
        rows.append([row["optimizer"], *(_number(value, form) for value, form in numbers), _cell(row["kernels"])])
    words = f"{result['batch rows']} rows of {result['seq_len']} tokens, recipe {result['recipe']}"
    words += f"; forward and backward alone {result['forward and backward'] * 1e3:.1f} ms. {each['device']}."
    header = ["optimizer", "ms a step", "its share, with clipping", "tokens/s", "TFLOP/s", "MFU", "peak GiB", "kernels"]
    return f"{words}{_left_out(result)}\n\n{markdown(header, rows)}"


def _left_out(result: Answer) -> str:
    return "".join(f" {name} is left out: {_cell(why)}." for name, why in result["left out"].items())


def _runs(answers: Answers, recipe: str, to: Path) -> list[str]:
    """Losses at the end of training, beside AdamW 0.9 with warmup at the same learning rate and seed; pictures."""
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
        numbers = [(None if beside is None else loss - beside, "+.4f"), (result["spikes"], "d")]
        numbers += [(result.get("beta_t mean"), ".3f"), (result["tokens/s"], ",.0f"), (result["MFU"], ".1%")]
        cells = [run["name"], f"{run['lr']:g}", str(run["seed"]), f"{loss:.4f}"]
        rows.append([*cells, *(_number(value, form) for value, form in numbers)])
    header = ["run", "lr", "seed", "final validation loss", f"minus {BASE}", "spikes", "beta_t", "tokens/s", "MFU"]
    from recipes.gpu.figures import draw_betas, draw_losses  # matplotlib, where there is something to draw

    pictures = [f"![Training losses, {recipe}]({draw_losses(to, recipe, done)})"]
    pictures += [f"![beta_t of {name}, layers over steps]({file})" for name, file in draw_betas(to, recipe, done)]
    first = next(iter(done.values()))
    text = f"{first['text']['files']:,} Python sources, {first['text']['bytes'] / 1e6:.1f} MB"
    words = f"{text}; {len(first['losses'])} steps. beta_t: the median over steps of its mean over tensors."
    return [*heading, words, markdown(header, rows), *pictures, *others]


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


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _without_folders(text: str) -> str:
    """Absolute paths by their last name: they belong to the machine."""
    return re.sub(r"(?<![\w./:~-])(?:/[\w.+-]+)+/(?=[\w.+-])", ".../", text)


def _cell(text: object) -> str:
    """On one line, and without what ends a cell; a long one is cut."""
    line = _without_folders(" ".join(str(text).split())).replace("|", "\\|")
    return line if len(line) <= 300 else line[:297] + "..."


if __name__ == "__main__":
    main()
