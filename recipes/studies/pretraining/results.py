"""Tables of the warmup study, from its ledger, and the data of its curves and heat map."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from am_lightning.loggers.metrics import kind_of, layer_paths, shortened
from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.ledger import Config, Ledger
from recipes.studies.loss_spikes import SPIKE_FROM, count_spikes
from recipes.studies.page import markdown
from recipes.studies.pretraining.methods import Method
from recipes.studies.pretraining.stages import (
    ABLATIONS,
    AM,
    AM_LOW,
    AM_WARM,
    BATCH_FACTOR,
    BATCH_RATES,
    BATCH_SEEDS,
    FEW,
    LONG_FACTOR,
    LONG_SEEDS,
    METHODS,
    Study,
)
from recipes.studies.sweep import differences, mean_and_sd, paired

EARLY = 0.1  # share of the run that counts as early
EARLY_AND_LATE = (f"first {EARLY:.0%}", "later")  # in the headers of tables
_CAP_TOLERANCE = 1e-4  # the ledger keeps four digits


def spikes_table(study: Study) -> str:
    """Return the number of spikes of the training loss in the finalists' runs of all seeds."""
    rows = []
    for method in METHODS:
        runs = [study.config(method, study.best_rate(method), seed) for seed in study.fresh_seeds]
        rows.append([str(method), str(sum(count_spikes(study.ledger[config]["losses"]) for config in runs))])
    return markdown(["method", f"spikes in {len(study.fresh_seeds)} runs, from step {SPIKE_FROM} on"], rows)


def batch_table(study: Study) -> str:
    """Return the loss at four times the batch, the mean over two seeds at each learning rate."""
    rows = []
    for method in FEW:
        cells = [[study.scale.config(method, lr, s, batch=BATCH_FACTOR) for s in BATCH_SEEDS] for lr in BATCH_RATES]
        rows.append([str(method), *(mean_and_sd(map(study.value, cell)) for cell in cells)])
    return markdown([f"batch x {BATCH_FACTOR}, {len(BATCH_SEEDS)} seeds", *(f"{lr:g}" for lr in BATCH_RATES)], rows)


def long_table(study: Study) -> str:
    """Return the loss at three times the steps and each method's best learning rate, and AM's paired differences."""
    losses, mine = {}, (AM, AM_LOW, AM_WARM[1])
    for method in FEW:
        lr = study.best_rate(method)
        runs = {seed: study.scale.config(method, lr, seed, long=LONG_FACTOR) for seed in LONG_SEEDS}
        losses[method] = {seed: study.value(config) for seed, config in runs.items()}
    rows = [[str(m), mean_and_sd(losses[m].values()), *differences(losses, mine, m)] for m in FEW]
    header = [f"steps x {LONG_FACTOR}", f"mean (sd) of {len(LONG_SEEDS)} seeds", *(f"{ours} minus it" for ours in mine)]
    return markdown(header, rows)


def mean_curve(ledger: Ledger, configs: Iterable[Config], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation over runs of the running mean of the training loss: (steps - window + 1,)."""
    kernel = np.ones(window) / window
    losses = [np.array(ledger[config]["losses"], float) for config in configs]
    longest = max(len(curve) for curve in losses)  # a run that diverged ends early and is nan from there on
    padded = [np.pad(curve, (0, longest - len(curve)), constant_values=np.nan) for curve in losses]
    curves = [np.convolve(curve, kernel, mode="valid") for curve in padded]
    return np.mean(curves, axis=0), np.std(curves, axis=0, ddof=1)


def traces(study: Study, method: Method, *, batch: int = 1) -> tuple[list[str], np.ndarray]:
    """Return the names of the tensors and beta_t (seeds, steps, tensors) without beta_1, which is the cap."""
    seeds = study.fresh_seeds if batch == 1 else BATCH_SEEDS
    lr = study.best_rate(AM)
    found = [study.ledger[study.scale.config(method, lr, seed, batch=batch, traces=True)] for seed in seeds]
    whole = [result for result in found if result["val_loss"] is not None]  # the trace of a diverged run is not whole
    if not whole:
        raise RecipeError(f"every run of {method} at {lr:g} diverged: there is no trace of beta_t")
    return whole[0]["names"], np.array([result["betas"] for result in whole])[:, 1:]


def layer_means(names: list[str], betas: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return the layers, and their mean beta_t over seeds and tensors, (layers, steps)."""
    paths = layer_paths(names)
    layers = list(dict.fromkeys(paths))
    means = [betas[..., [i for i, path in enumerate(paths) if path == layer]].mean(axis=(0, 2)) for layer in layers]
    return shortened(layers), np.array(means)


def kinds_table(study: Study) -> str:
    """Return for every kind of layer the share of (step, tensor) pairs at the cap and the mean, early and late."""
    rows = []
    for kind, chosen in by_kind(*traces(study, AM)).items():
        cells = early_and_late(chosen, AM.beta1, round(EARLY * study.scale.steps))
        rows.append([kind, *cells, f"{chosen.min():.2f}"])
    return markdown(["kind", *_early_and_late_header(), "lowest"], rows)


def by_kind(names: list[str], betas: np.ndarray) -> dict[str, np.ndarray]:
    """Return beta_t (..., tensors) of the tensors of each kind of layer, and of all."""
    kinds = [kind_of(name) for name in names]
    return {
        kind: betas[..., [i for i, each in enumerate(kinds) if kind in (each, "all")]]
        for kind in [*dict.fromkeys(kinds), "all"]
    }


def dips_table(study: Study, *, rows: int = 8) -> str:
    """Return the tensors whose mean beta_t over seeds is lowest in one step, and that step."""
    names, betas = traces(study, AM)
    means = betas.mean(axis=0)
    order = means.min(axis=0).argsort()[:rows]
    header = ["tensor", "mean beta_t", "lowest (mean over seeds)", "at step"]
    cells = [
        [names[i], f"{means[:, i].mean():.2f}", f"{means[:, i].min():.2f}", str(int(means[:, i].argmin()) + 2)]
        for i in order
    ]
    return markdown(header, cells)


def ablations_table(study: Study) -> str:
    """Return the validation loss of AM's variants at AM's best learning rate, and paired differences to AM."""
    lr = study.best_rate(AM)
    losses = {
        method: {seed: study.value(study.scale.config(method, lr, seed, traces=True)) for seed in study.fresh_seeds}
        for method in ABLATIONS
    }
    rows = []
    for method in ABLATIONS:
        mean = mean_and_sd(losses[method].values())
        rows.append([str(method), mean, "" if method == AM else str(paired(losses[method], losses[AM]))])
    return markdown([f"lr {lr:g}", "validation loss, mean (sd)", f"minus {AM}"], rows)


def batch_effect(study: Study) -> str:
    """Return the share at the cap and the mean beta_t at the batch and at four times it."""
    rows = []
    for factor in (1, BATCH_FACTOR):
        _, betas = traces(study, AM, batch=factor)
        cells = early_and_late(betas, AM.beta1, round(EARLY * study.scale.steps), digits=3)
        rows.append([f"{study.scale.batch_size * factor} rows, {len(betas)} seeds", *cells])
    return markdown(["batch", *_early_and_late_header()], rows)


def early_and_late(betas: np.ndarray, cap: float, border: int, *, digits: int = 2) -> list[str]:
    """Return the cells of the share at the cap before the step `border` and after it, then of the means.

    Args:
        betas: (..., steps, tensors) beta_t.
        cap: cap of beta_t.
        border: steps that count as early.
        digits: digits of the means.
    """
    parts = betas[..., :border, :], betas[..., border:, :]
    return [f"{at_cap(part, cap).mean():.0%}" for part in parts] + [f"{part.mean():.{digits}f}" for part in parts]


def _early_and_late_header() -> list[str]:
    return [f"{name}, {part}" for name in ("at cap", "mean") for part in EARLY_AND_LATE]


def at_cap(betas: np.ndarray, cap: float) -> np.ndarray:
    """Return whether each beta_t is at the cap."""
    return betas >= cap - _CAP_TOLERANCE
