"""Part d: 1000 steps of recipes at the paper's shape by several optimizers, on the Python sources of this machine."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from part import ROOT, Context, FailedError, NotMeasuredError, OutOfTimeError, Part, read_json, write_json

NEEDS = {
    "jsonargparse": "recipes/gpu/wheels.sh collects it",
    "tokenizers": "pip install tokenizers",
    "tensorboard": "pip install tensorboard",
}
TEXT_BYTES, TINY_TEXT_BYTES, TINY_SOURCES = 200_000_000, 400_000, 200
LARGEST, SMALLEST = 1_000_000, 200  # bytes of a source file that is used
RATES = (1e-3, 3e-3)
WARMUP = 0.1
STOPPING = 5.0  # seconds between the end of a run and the end of its part


@dataclass(frozen=True)
class Run:
    """One training run; the defaults are AM-AdamW's."""

    name: str
    lr: float
    kind: str = "am"
    beta1: float = 0.89
    warmup: float = 0.0
    scope: str = "tensor"
    lambd: float = 0.1
    seed: int = 0


def _runs() -> list[Run]:
    """Return the runs of a recipe. Pairs follow each other, so that a cut-off leaves something to compare."""
    runs = []
    for name, options, beta1 in (("AM 0.89", {}, 0.9), ("AM 0.89 warmup", {"warmup": WARMUP}, 0.95)):
        for lr in RATES:
            runs.append(Run(name, lr, **options))  # type: ignore[arg-type]
            runs.append(Run(f"AdamW {beta1} warmup", lr, "adamw", beta1, WARMUP))
    lr = RATES[0]
    runs += [Run("AM 0.8", lr, beta1=0.8), Run("AM 0.89 global", lr, scope="global")]
    runs += [Run("AM 0.89 lambda 0", lr, lambd=0.0)]
    return [*runs, Run("AM 0.89", lr, seed=1), Run("AdamW 0.9 warmup", lr, "adamw", 0.9, WARMUP, seed=1)]


def _table(tiny: bool) -> dict[str, tuple[str, Run]]:
    """Return recipe and run of each part, in order. A rehearsal has a few of them."""
    found = {}
    for recipe in ("60m", "130m"):
        runs = _runs()
        if tiny:
            runs = [*runs[:2], runs[-4]] if recipe == "60m" else runs[:1]
        for run in runs:
            name = f"{run.name} lr {run.lr:g}{f' seed {run.seed}' if run.seed else ''}".replace(" ", "-")
            found[f"worth/{recipe}/{name}"] = (recipe, run)
    return found


def parts(tiny: bool) -> list[Part]:
    """Return the parts. The first pair of 60m comes before the less important timings."""
    names = list(_table(tiny))
    worth = [40 if i < 2 else 60 if "/60m/" in name else 70 for i, name in enumerate(names)]
    seconds = [420 if "/60m/" in name else 720 for name in names]
    return [Part(name, "worth", w, 120 if tiny else s) for name, w, s in zip(names, worth, seconds, strict=True)]


def run(name: str, context: Context) -> dict[str, Any]:
    """Train, and return the results that the run has logged.

    Raises:
        NotMeasuredError: if something that the recipes need is not installed.
        FailedError: if the run ended with an error.
        OutOfTimeError: if it did not end. The next call resumes from its newest checkpoint.
    """
    for module, hint in NEEDS.items():
        if importlib.util.find_spec(module) is None:
            raise NotMeasuredError(f"{module} is not installed: {hint}")
    recipe, which = _table(context.tiny)[name]
    root = context.work / "runs" / name.removeprefix("worth/")
    text = corpus(context)
    words = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), "fit", "--config", recipe]
    for key, value in settings(recipe, which, context, root, Path(text["folder"])).items():
        words += [f"--{key}", json.dumps(value) if isinstance(value, list) else str(value)]
    log = root / "log.txt"
    root.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        try:  # a run that an earlier call cut off resumes from its newest checkpoint
            done = subprocess.run(words, cwd=ROOT, stdout=file, stderr=file, timeout=context.left - STOPPING)
        except subprocess.TimeoutExpired:
            raise OutOfTimeError from None
        finally:
            print(log.read_text(errors="replace"))
    if done.returncode:
        output = log.read_text(errors="replace").strip()
        raise FailedError(
            f"the run ended with {done.returncode}: {output.rpartition(chr(10))[2]}", {"log": output[-3000:]}
        )
    result = {"recipe": recipe, "run": vars(which), "text": text, **read_run(root)}
    shutil.rmtree(root / "checkpoints", ignore_errors=True)  # up to 1.6 GB
    return result


def settings(recipe: str, which: Run, context: Context, root: Path, text: Path) -> dict[str, Any]:
    """Return the settings that differ from the recipe."""
    betas = [which.beta1, 0.95]
    rows, micro = (8, 4) if context.tiny else (512, 128)
    steps = 6 if context.tiny else 1000
    accumulate = rows // micro
    values: dict[str, Any] = {
        "seed_everything": which.seed,
        "ckpt_path": "last",
        "model.optimizer": "am_lightning.AMAdamW" if which.kind == "am" else "torch.optim.AdamW",
        "model.optimizer.lr": which.lr,
        "model.optimizer.betas": betas,
        "model.warmup_fraction": which.warmup,
        "data.source": text,
        "data.source_options": "null",
        "data.tokenizer": "bpe-512" if context.tiny else "bpe-32000",
        "data.cache_dir": context.work / "tokens",
        "data.shard_mb": 1 if context.tiny else 16,  # at least one shard for every core
        "data.seed": which.seed,
        "data.val_percent": 20 if context.tiny else 2,
        "data.batch_size": rows,
        "data.val_rows": 16 if context.tiny else 1024,
        "data.final_val_rows": 32 if context.tiny else 4096,
        "data.val_batch_size": micro,
        "checkpoint.every_n_train_steps": steps // 2 if context.tiny else 200,
        "checkpoint.keep": 1,
        "monitor.window_size": 5,
        "trainer.default_root_dir": root,
        "trainer.max_steps": steps,
        "trainer.accelerator": "gpu" if context.device == "cuda" else "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.accumulate_grad_batches": accumulate,
        "trainer.val_check_interval": steps // 2 * accumulate,
        "trainer.log_every_n_steps": 1,  # spikes last a few steps
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.callbacks": "null",
    }
    if which.kind == "am":
        values |= {"model.optimizer.scope": which.scope, "model.optimizer.lambd": which.lambd}
        values["trainer.callbacks"] = [{"class_path": "am_lightning.AdaptiveMemory", "init_args": {"histogram": False}}]
    if context.tiny:
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_layers": 2, "vocab_size": 512}
        values |= {f"model.{key}": value for key, value in (shape | {"seq_len": 32}).items()}
        values["trainer.precision"] = "32-true"
    return values


def read_run(root: Path) -> dict[str, Any]:
    """Return losses and beta_t of a finished run, from its event files."""
    from am_lightning.pretrain.commands.report.charts import heatmap
    from am_lightning.pretrain.commands.report.runs import find_runs
    from recipes.studies.loss_spikes import count_spikes

    found = find_runs([str(root)])[0]
    if found.final_val_loss is None or found.train_loss is None:
        raise FailedError(f"the run in {root} has logged no final loss")
    losses = [round(value, 4) for value in found.train_loss.values.tolist()]
    result: dict[str, Any] = {
        "final loss": found.final_val_loss,
        "validations": found.validation_points,
        "losses": losses,
        "spikes": count_spikes(losses),
        "tokens/s": found.tokens_per_second.median if found.tokens_per_second else None,
        "MFU": found.mfu.median if found.mfu else None,
        "skipped": found.skipped.last if found.skipped else None,
    }
    if found.momentum:
        layers = heatmap(found.momentum)
        result["beta_t"] = {key: layers[key] for key in ("rows", "edges", "values")}
        result["beta_t mean"] = found.beta_mean.median if found.beta_mean else None
    return result


def corpus(context: Context) -> dict[str, Any]:
    """Write Python sources of the standard library and of installed packages as JSON lines, once.

    The same files give the same text, because they are sorted by their hashes. Duplicates are left out.
    """
    folder = context.work / "text"
    known = read_json(folder.with_suffix(".json"))
    if known:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[bytes, Path] = {}
    for path in itertools.islice(_sources(), TINY_SOURCES if context.tiny else None):
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if SMALLEST <= len(content) <= LARGEST:
                found[hashlib.sha256(content).digest()] = path
    size = count = 0
    with open(folder / "sources.jsonl", "w", encoding="utf-8") as file:
        for _, path in sorted(found.items()):
            if size >= (TINY_TEXT_BYTES if context.tiny else TEXT_BYTES):
                break
            content = path.read_bytes()
            file.write(json.dumps({"text": content.decode("utf-8", "replace")}) + "\n")
            size, count = size + len(content), count + 1
    result = {"folder": str(folder), "files": count, "bytes": size}
    write_json(folder.with_suffix(".json"), result)
    return result


def _sources() -> Iterator[Path]:
    paths = sysconfig.get_paths()
    for root in dict.fromkeys((paths["stdlib"], paths["purelib"], paths["platlib"], *sys.path)):
        if "packages" in root or root == paths["stdlib"]:
            for folder, _, files in sorted(os.walk(root)):
                yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))
