"""The protocol of the warmup study: which runs are made, and what each stage may look at.

1. ``sweep``: every method at every learning rate, one seed. AdamW is tuned over learning rate x warmup x beta1, AM over
   the learning rate alone.
2. ``finalists``: every method at its best learning rate of the sweep, on five seeds that the sweep has not seen. Claims
   are made from these, as paired differences: a seed gives all methods the same initial weights and batches.
3. ``batch``: four times the batch, some methods, a few learning rates, two seeds.
4. ``long``: three times the steps, some methods at their best learning rate, three seeds.
5. ``beta``: AM with the whole trace of beta_t, and its ablations.
"""

from __future__ import annotations

from collections.abc import Iterator

from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.ledger import Config, Ledger
from recipes.studies.pretraining.methods import Method
from recipes.studies.pretraining.run import Scale
from recipes.studies.sweep import Sweep

WARMUP = 0.05
LEARNING_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
ADAMW = tuple(Method("adamw", beta1, warmup) for beta1 in (0.9, 0.8, 0.5) for warmup in (WARMUP, 0.0))
OTHERS = (Method("radam"), Method("schedulefree"), Method("schedulefree", warmup=WARMUP))
AM, AM_LOW = Method("am", 0.89), Method("am", 0.8)
AM_GLOBAL = Method("am", 0.89, scope="global")
AM_WARM = (Method("am", 0.89, WARMUP), Method("am", 0.8, WARMUP))
METHODS = (*ADAMW, *OTHERS, AM, AM_LOW, AM_GLOBAL, *AM_WARM)
# Methods of long runs: the customary AdamW, the best of the first look, AM, and AM at its best.
FEW = (Method("adamw", 0.9, WARMUP), Method("adamw", 0.8, WARMUP), Method("adamw", 0.8), AM, AM_LOW, AM_WARM[1])
ABLATIONS = (AM, Method("am", 0.89, lambd=0.0), Method("am", 0.89, am_until=0.1), AM_LOW, AM_GLOBAL)
STAGES = ("sweep", "finalists", "batch", "long", "beta")
BATCH_FACTOR, BATCH_RATES, BATCH_SEEDS = 4, (1e-3, 2e-3), (0, 1)
LONG_FACTOR, LONG_SEEDS = 3, (1, 2, 3)


class Study(Sweep[Method]):
    """The runs of the warmup study.

    Args:
        ledger: ledger of the finished runs.
        scale: steps and batch of the first two stages.
    """

    def __init__(self, ledger: Ledger, scale: Scale) -> None:
        super().__init__(ledger, METHODS, lambda method: LEARNING_RATES, scale.config, "val_loss", "validation loss")
        self.scale = scale

    def configs(self, stage: str) -> Iterator[Config]:
        """Yield the runs of a stage. The stages after the sweep read the best learning rates from the ledger.

        Raises:
            RecipeError: if the stage is unknown, or needs the sweep first.
        """
        config = self.scale.config
        if stage == "sweep":
            yield from self.sweep_configs()
        elif stage == "finalists":
            yield from self.finalist_configs()
        elif stage == "batch":
            for seed in BATCH_SEEDS:
                yield from (config(m, lr, seed, batch=BATCH_FACTOR) for lr in BATCH_RATES for m in FEW)
        elif stage == "long":
            rates = {method: self.best_rate(method) for method in FEW}
            yield from (config(m, rates[m], seed, long=LONG_FACTOR) for seed in LONG_SEEDS for m in FEW)
        elif stage == "beta":
            rate = self.best_rate(AM)
            yield from (config(m, rate, seed, traces=True) for seed in self.fresh_seeds for m in ABLATIONS)
            yield from (config(AM, rate, seed, batch=BATCH_FACTOR, traces=True) for seed in BATCH_SEEDS)
        else:
            raise RecipeError(f"--stages: {stage!r}; allowed: {', '.join(STAGES)}")
