"""What beta_t did: tables over kinds of layers and parts of the run, ablations, and the data of the heatmap."""

from __future__ import annotations

import numpy as np

from am_lightning.loggers.metrics import kind_of, layer_paths, shortened
from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.intervals import paired
from recipes.studies.ledger import Ledger
from recipes.studies.pretraining.methods import Method
from recipes.studies.pretraining.stages import (
    ABLATIONS,
    AM,
    BATCH_FACTOR,
    BATCH_SEEDS,
    Scale,
    sweep_of,
)
from recipes.studies.sweep import mean_and_sd
from recipes.studies.tables import markdown

EARLY = 0.1  # share of the run that counts as early
_CAP_TOLERANCE = 1e-4  # the ledger keeps four digits


def traces(ledger: Ledger, scale: Scale, method: Method, *, batch: int = 1) -> tuple[list[str], np.ndarray]:
    """Names of the tensors, and beta_t (seeds, steps, tensors). beta_1, which is the cap by definition, is left out."""
    sweep = sweep_of(ledger, scale)
    seeds = sweep.fresh_seeds if batch == 1 else BATCH_SEEDS
    lr = sweep.best_rate(AM)
    found = [ledger[scale.config(method, lr, seed, batch=batch, traces=True)] for seed in seeds]
    whole = [result for result in found if result["val_loss"] is not None]  # a run that diverged has no whole trace
    if not whole:
        raise RecipeError(f"every run of {method} at {lr:g} diverged: there is no trace of beta_t")
    return whole[0]["names"], np.array([result["betas"] for result in whole])[:, 1:]


def layer_means(names: list[str], betas: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Layers, and the mean over seeds and over a layer's tensors: (layers, steps)."""
    paths = layer_paths(names)
    layers = list(dict.fromkeys(paths))
    means = [betas[..., [i for i, path in enumerate(paths) if path == layer]].mean(axis=(0, 2)) for layer in layers]
    return shortened(layers), np.array(means)


def kinds_table(ledger: Ledger, scale: Scale) -> str:
    """For every kind of layer: the share of (step, tensor) pairs at the cap, the mean, the lowest; early and late."""
    names, betas = traces(ledger, scale, AM)
    kinds = [kind_of(name) for name in names]
    border = round(EARLY * scale.steps)
    rows = []
    for kind in [*dict.fromkeys(kinds), "all"]:
        chosen = betas[..., [i for i, k in enumerate(kinds) if kind in (k, "all")]]
        early, late = chosen[:, :border], chosen[:, border:]
        cells = [f"{at_cap(part, AM.beta1).mean():.0%}" for part in (early, late)]
        cells += [f"{part.mean():.2f}" for part in (early, late)]
        rows.append([kind, *cells, f"{chosen.min():.2f}"])
    first, rest = f"first {EARLY:.0%}", "later"
    return markdown(["kind", f"at cap, {first}", f"at cap, {rest}", f"mean, {first}", f"mean, {rest}", "lowest"], rows)


def dips_table(ledger: Ledger, scale: Scale, *, rows: int = 8) -> str:
    """The tensors whose beta_t, averaged over seeds, dips deepest in a step, and that step."""
    names, betas = traces(ledger, scale, AM)
    means = betas.mean(axis=0)
    order = means.min(axis=0).argsort()[:rows]
    header = ["tensor", "mean beta_t", "lowest (mean over seeds)", "at step"]
    cells = [
        [names[i], f"{means[:, i].mean():.2f}", f"{means[:, i].min():.2f}", str(int(means[:, i].argmin()) + 2)]
        for i in order
    ]
    return markdown(header, cells)


def ablations_table(ledger: Ledger, scale: Scale) -> str:
    """Validation loss of AM's variants at AM's best learning rate: paired differences to AM."""
    sweep = sweep_of(ledger, scale)
    lr = sweep.best_rate(AM)
    losses = {
        method: {seed: sweep.value(scale.config(method, lr, seed, traces=True)) for seed in sweep.fresh_seeds}
        for method in ABLATIONS
    }
    rows = []
    for method in ABLATIONS:
        mean = mean_and_sd(list(losses[method].values()))
        rows.append([str(method), mean, "" if method == AM else str(paired(losses[method], losses[AM]))])
    return markdown([f"lr {lr:g}", "validation loss, mean (sd)", f"minus {AM}"], rows)


def batch_effect(ledger: Ledger, scale: Scale) -> str:
    """Share at the cap and mean beta_t at the batch and at four times it: less noise, more dips or fewer?"""
    border = round(EARLY * scale.steps)
    rows = []
    for factor in (1, BATCH_FACTOR):
        _, betas = traces(ledger, scale, AM, batch=factor)
        parts = betas[:, :border], betas[:, border:]
        cells = [f"{at_cap(part, AM.beta1).mean():.0%}" for part in parts] + [f"{part.mean():.3f}" for part in parts]
        rows.append([f"{scale.batch_size * factor} rows, {len(betas)} seeds", *cells])
    first = f"first {EARLY:.0%}"
    return markdown(["batch", f"at cap, {first}", "at cap, later", f"mean, {first}", "mean, later"], rows)


def at_cap(betas: np.ndarray, cap: float) -> np.ndarray:
    """Which of them are at the cap."""
    return betas >= cap - _CAP_TOLERANCE
