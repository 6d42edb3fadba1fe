"""Part c: step times of optimizers on a model's tensors, and whole training steps."""

from __future__ import annotations

import gc
from typing import Any

import torch
from part import Context, FailedError, read_answers

from am_lightning.bench.contenders import Contender, make_contenders, make_parameters
from am_lightning.bench.host import calls_of
from am_lightning.bench.measure import measure
from am_lightning.bench.models import MODELS, READ, Llama
from am_lightning.bench.peers import make_peers
from am_lightning.bench.table import rows_of
from am_lightning.bench.training import Training
from am_lightning.pretrain.model.shape import LlamaShape
from am_lightning.pretrain.runtime.paths import recipe_files
from am_lightning.pretrain.runtime.settings import read_recipe

DECAYS = (0.1, 0.0)
# Nobody uses these on a GPU. The last two wait for it at every tensor and keep their own moments in its memory.
SLOW = ("AdamW single", "AMAdamW single_tensor", "Prodigy", "DAdaptAdam")
TRAIN = {"130m": ("130m", 512), "1b": ("1b", 128)}  # recipe, and the largest number of rows to try
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "num_key_value_heads": 2, "num_layers": 2}


def run(name: str, context: Context) -> dict[str, Any]:
    """Return the results of the part "fast/MODEL-DTYPE" or "fast/train-RECIPE[-compiled]"."""
    what = name.removeprefix("fast/")
    if what.startswith("train-"):
        return _train(what.removeprefix("train-"), context)
    model, _, dtype = what.rpartition("-")
    device = torch.device(context.device)
    shapes = MODELS[model]()
    if context.tiny:
        shapes = Llama(64, 128, 2, 2, 2, 128, False).shapes() if "llama" in model else shapes[::100]
    params = make_parameters(shapes, getattr(torch, dtype), device)
    found = {}
    for decay in DECAYS:
        found[str(decay)] = _steps(params, decay, device, context)
        gc.collect()  # free the states of this round before the next one
    return {"model": model, "dtype": dtype, "tensors": len(params), "elements": sum(p.numel() for p in params)} | found


def _steps(params: list[torch.nn.Parameter], decay: float, device: torch.device, context: Context) -> dict[str, Any]:
    """Return the bench's rows with the host's work in a step, and why some optimizers are left out."""
    contenders, missing = make_contenders(params, decay=decay, scope="tensor", device=device)
    others, lacking = make_peers(params, decay=decay)
    wanted = [c for c in [*contenders, *others] if c.name not in SLOW and not (context.tiny and "compile" in c.name)]
    measured, failed = measure(wanted, 3 if context.tiny else 20, device)
    by_name: dict[str, Contender] = {each.contender.name: each.contender for each in measured}
    rows = [row | _calls(by_name[str(row["optimizer"])], device) for row in rows_of(measured, None)]
    left_out = missing | lacking | failed
    return {"rows": rows, "left out": {name: why for name, why in left_out.items() if name not in SLOW}}


def _calls(contender: Contender, device: torch.device) -> dict[str, Any]:
    if contender.name == READ:
        return {}
    try:
        return dict(calls_of(contender.step, device))
    except RuntimeError as error:  # a profiler that this machine lacks costs the counts and not the times
        return {"counts": str(error)}


def _train(what: str, context: Context) -> dict[str, Any]:
    key, _, compiled = what.partition("-")
    recipe, most = TRAIN[key]
    device, shape, first = torch.device(context.device), _shape(recipe, context.tiny), 1
    if compiled:  # the same batch as uncompiled, so that only that differs
        plain = read_answers(context.out).get(f"fast/train-{key}", {})
        first = most = int((plain.get("result") or {}).get("batch rows", 1 if context.tiny else most // 8))
    training = Training(shape, device, compiled=bool(compiled) and not context.tiny)
    try:
        rows = training.rows_that_fit(min(most, 4) if context.tiny else most, first)
    except torch.OutOfMemoryError as error:
        raise FailedError(f"no memory for {first} rows of {shape.seq_len} tokens: {error}") from error
    found = training.measure(rows, 2 if context.tiny else 5)
    peak = _peak_flops(device)
    for row in found["rows"]:
        row["MFU"] = None if peak is None else row["TFLOP/s"] * 1e12 / peak
    return {"recipe": recipe, "compiled": bool(compiled), "batch rows": rows, "seq_len": shape.seq_len, **found}


def _shape(recipe: str, tiny: bool) -> LlamaShape:
    values = read_recipe(recipe_files()[recipe])["model"]
    return LlamaShape.among(values | TINY | {"vocab_size": 128, "seq_len": 64} if tiny else values)


def _peak_flops(device: torch.device) -> int | None:
    """Return the peak in bfloat16, FLOP/s, or None if Lightning does not know the device."""
    from lightning.fabric.utilities.throughput import get_available_flops

    return get_available_flops(device, torch.bfloat16)
