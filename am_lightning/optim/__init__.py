"""The optimizers: AMAdamW and AMSGD."""

from am_lightning.optim.adamw import AMAdamW
from am_lightning.optim.gradient_clipping import clip_grad_norm_
from am_lightning.optim.sgd import AMSGD

__all__ = ["AMSGD", "AMAdamW", "clip_grad_norm_"]
