"""torchtitan: one line in a config function turns its AdamW into AMAdamW and logs the momentum with its metrics.

    def llama3_8b():
        return adaptive_memory(config_registry.llama3_8b())

The ``--module`` option of torchtitan takes the module of such a function, which Python must be able to import.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from am_lightning.optional_imports import cause_of

try:
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.tools.logging import logger
except ImportError as error:
    raise ImportError(
        f"am_lightning.clients.torchtitan needs torchtitan 0.3 or later: pip install torchtitan ({error})"
    ) from cause_of(error, "torchtitan")

from am_lightning.loggers.reader import StatsReader, prefix_of
from am_lightning.optim.adamw import AMAdamW
from am_lightning.optim.convert import convert_adamw, is_adam

Scope = Literal["tensor", "group", "global"]


class AMOptimizersContainer(OptimizersContainer):  # type: ignore[misc]
    """torchtitan's container, whose AdamW (and Adam without coupled decay) are converted after their creation."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        lambd: float = 0.1
        """Memory regularisation lambda."""

        beta1_max: float | None = None
        """Cap of beta_t for all groups; None: derived from each group's own beta1 and lambda."""

        scope: Scope = "tensor"
        """One beta_t for each tensor, each group, or the model part (a stage, in a pipeline)."""

    def __init__(self, config: Config, *, model_parts: list[Any]) -> None:
        if config.implementation == "fused_opt_states_bf16":
            raise ValueError(
                "optimizer.implementation='fused_opt_states_bf16' creates AdamW's state itself: AMAdamW needs 'fused', "
                "'foreach' or 'for-loop'"
            )
        super().__init__(config, model_parts=model_parts)
        adams = [optimizer for optimizer in self.optimizers if is_adam(optimizer)]
        if not adams:
            names = sorted({group.optimizer_name for group in config.param_groups})
            raise ValueError(f"no AdamW or Adam in optimizer.param_groups, only {', '.join(names)}")
        for optimizer in adams:
            convert_adamw(optimizer, lambd=config.lambd, beta1_max=config.beta1_max, scope=config.scope)
            logger.info(f"AMAdamW: scope {config.scope}, lambda {config.lambd:g}, {len(optimizer.param_groups)} groups")


class MomentumMetrics(MetricsProcessor):  # type: ignore[misc]
    """torchtitan's metrics and ``am/beta/...``, ``am/clamp/...`` and ``am/skipped_steps``."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):  # type: ignore[misc]
        pass

    def log(self, *args: Any, extra_metrics: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().log(*args, extra_metrics=(extra_metrics or {}) | self._momentum(), **kwargs)

    def _momentum(self) -> dict[str, float]:
        if not hasattr(self, "_readers"):  # the optimizers are set after __init__
            am_optimizers = [optimizer for optimizer in self.optimizers or () if isinstance(optimizer, AMAdamW)]
            self._readers = [StatsReader(one, prefix_of(index)) for index, one in enumerate(am_optimizers)]
        scalars: dict[str, float] = {}
        for reader in self._readers:
            reader.read()
            scalars |= reader.scalars()
            if reader.newly_skipped():
                logger.warning(reader.skip_warning())
        return scalars


def adaptive_memory(config: Any, *, lambd: float = 0.1, beta1_max: float | None = None, scope: Scope = "tensor") -> Any:
    """Change a ``torchtitan.trainer.Trainer.Config`` so that its AdamW becomes AMAdamW, and return it.

    Args:
        config: result of a function of a ``config_registry``. Its groups, learning rates, decay and implementation are
            kept.
        lambd, beta1_max, scope: options of ``AdaptiveMemory``. ``--optimizer.lambd`` and so on change them later.

    Raises:
        TypeError: if the class of the optimizers or of the metrics is not torchtitan's own.
    """
    for field, known in (("optimizer", OptimizersContainer), ("metrics", MetricsProcessor)):
        if type(getattr(config, field)) is not known.Config:
            raise TypeError(
                f"config.{field} is a {type(getattr(config, field)).__qualname__}, not {known.__name__}.Config: derive "
                f"your class from the one in am_lightning.clients.torchtitan"
            )
    config.optimizer = AMOptimizersContainer.Config(
        **_fields(config.optimizer), lambd=lambd, beta1_max=beta1_max, scope=scope
    )
    config.metrics = MomentumMetrics.Config(**_fields(config.metrics))
    return config


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
