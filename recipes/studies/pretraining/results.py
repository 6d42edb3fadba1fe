"""Tables of the warmup study, from its ledger."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from am_lightning.pretrain.loss_spikes import SPIKE_FROM, count_spikes
from recipes.studies.intervals import paired
from recipes.studies.ledger import Config, Ledger
from recipes.studies.pretraining.stages import (
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
    Scale,
    sweep_of,
)
from recipes.studies.sweep import mean_and_sd
from recipes.studies.tables import markdown


def sweep_table(ledger: Ledger, scale: Scale) -> str:
    """Validation loss over the learning rate, one seed."""
    return sweep_of(ledger, scale).sweep_table()


def finalists_table(ledger: Ledger, scale: Scale) -> str:
    """Mean and standard deviation over the fresh seeds."""
    return sweep_of(ledger, scale).finalists_table()


def differences_table(ledger: Ledger, scale: Scale) -> str:
    """Paired differences of AM at both caps, without and with warmup, to every method."""
    return sweep_of(ledger, scale).differences_table((AM, AM_LOW, *AM_WARM))


def spikes_table(ledger: Ledger, scale: Scale) -> str:
    """Spikes of the training loss in the finalists' runs, all seeds together."""
    sweep = sweep_of(ledger, scale)
    rows = []
    for method in METHODS:
        runs = [scale.config(method, sweep.best_rate(method), seed) for seed in sweep.fresh_seeds]
        rows.append([str(method), str(sum(count_spikes(ledger[config]["losses"]) for config in runs))])
    return markdown(["method", f"spikes in {len(sweep.fresh_seeds)} runs, from step {SPIKE_FROM} on"], rows)


def batch_table(ledger: Ledger, scale: Scale) -> str:
    """Four times the batch: mean over two seeds, for each learning rate."""
    value = sweep_of(ledger, scale).value
    rows = []
    for method in FEW:
        cells = [[scale.config(method, lr, s, batch=BATCH_FACTOR) for s in BATCH_SEEDS] for lr in BATCH_RATES]
        rows.append([str(method), *(mean_and_sd([value(config) for config in cell]) for cell in cells)])
    return markdown([f"batch x {BATCH_FACTOR}, {len(BATCH_SEEDS)} seeds", *(f"{lr:g}" for lr in BATCH_RATES)], rows)


def long_table(ledger: Ledger, scale: Scale) -> str:
    """Three times the steps, at each method's best learning rate, and the paired differences of AM."""
    sweep = sweep_of(ledger, scale)
    losses, mine = {}, (AM, AM_LOW, AM_WARM[1])
    for method in FEW:
        lr = sweep.best_rate(method)
        runs = {seed: scale.config(method, lr, seed, long=LONG_FACTOR) for seed in LONG_SEEDS}
        losses[method] = {seed: sweep.value(config) for seed, config in runs.items()}
    rows = [
        [
            str(method),
            mean_and_sd(list(losses[method].values())),
            *("" if ours == method else str(paired(losses[ours], losses[method])) for ours in mine),
        ]
        for method in FEW
    ]
    header = [f"steps x {LONG_FACTOR}", f"mean (sd) of {len(LONG_SEEDS)} seeds", *(f"{ours} minus it" for ours in mine)]
    return markdown(header, rows)


def mean_curve(ledger: Ledger, configs: Iterable[Config], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over runs of the training loss, smoothed by a running mean: (steps - window + 1,)."""
    kernel = np.ones(window) / window
    losses = [np.array(ledger[config]["losses"], float) for config in configs]
    longest = max(len(curve) for curve in losses)  # a run that diverged ends early: nan from there on
    padded = [np.pad(curve, (0, longest - len(curve)), constant_values=np.nan) for curve in losses]
    curves = [np.convolve(curve, kernel, mode="valid") for curve in padded]
    return np.mean(curves, axis=0), np.std(curves, axis=0, ddof=1)
