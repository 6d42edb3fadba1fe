"""How a configuration is distributed over GPUs: who holds what, and how many rows a micro-batch has."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from am_lightning.pretrain.commands.list import strategy_name
from am_lightning.pretrain.model.parallelize import check_tensor_parallel
from am_lightning.pretrain.model.shape import LlamaShape, count_parameters
from am_lightning.pretrain.runtime.errors import RecipeError, require
from am_lightning.pretrain.runtime.run_config import RunConfig

# Bytes of a weight in the optimizer, and of a number in a matrix product.
_PRECISIONS = {"32-true": (4, 4), "bf16-mixed": (4, 2), "bf16-true": (2, 2), "16-mixed": (4, 2)}
_DEEPSPEED_STAGES = {"deepspeed": 2, "deepspeed_stage_1": 1, "deepspeed_stage_2": 2, "deepspeed_stage_3": 3}


@dataclasses.dataclass(frozen=True)
class ParallelPlan:
    """How a run is distributed."""

    kind: str  # "single", "ddp", "fsdp" (FSDP1, FSDP2, tensor parallel) or "zero" (DeepSpeed)
    stage: int  # stage of ZeRO; 0 for the other kinds
    gpus: int  # number of GPUs
    gpus_per_node: int  # GPUs of a machine, which the fast network connects
    tensor: int  # GPUs that share a layer
    accumulate: int  # micro-batches in a step
    rows: int  # rows of a micro-batch on one GPU, or on the `tensor` GPUs that see the same rows
    precision: str  # Lightning's name

    @property
    def data(self) -> int:
        """Groups of GPUs that see different rows."""
        return self.gpus // self.tensor

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def weight_bytes(self) -> int:
        """Bytes of a stored weight, its gradient and each moment."""
        return _PRECISIONS[self.precision][0]

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in a matrix product."""
        return _PRECISIONS[self.precision][1]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Numbers of weights on one of the GPUs that share a layer. Each of them has all norms."""

    all: int
    outside: int  # embedding, head, last norm: everything but the layers
    head: int

    @classmethod
    def of(cls, shape: LlamaShape, tensor: int) -> Weights:
        norms = (2 * shape.num_layers + 1) * shape.hidden_size
        head = shape.vocab_size * shape.hidden_size // tensor
        outside = (1 if shape.tie_word_embeddings else 2) * head + shape.hidden_size
        return cls((count_parameters(shape) - norms) // tensor + norms, outside, head)


def make_layout(settings: RunConfig, gpus: int, gpus_per_node: int) -> ParallelPlan:
    """Distribute a configuration over `gpus`.

    Of ModelParallelStrategy's two sizes only tensor_parallel_size is read; the other one follows from `gpus`.

    Raises:
        RecipeError: if the numbers do not divide each other; it names numbers that do.
    """
    trainer, batch_size, accumulate = settings.config["trainer"], settings.data.batch_size, settings.accumulate
    precision = trainer["precision"] or "bf16-mixed"  # the default on a GPU
    require(precision in _PRECISIONS, "trainer.precision", precision, " or ".join(_PRECISIONS))
    per_node = min(gpus, gpus_per_node)
    if gpus % per_node:
        lower = gpus // per_node * per_node
        fits = f"whole nodes of {per_node}: {lower} or {lower + per_node}"
        raise RecipeError(f"--gpus is {gpus}; allowed with --gpus-per-node {gpus_per_node}: {fits}")
    kind, stage = _kind_of(trainer["strategy"], gpus)
    tensor = tensor_parallel_size(trainer["strategy"], per_node)
    check_tensor_parallel(settings.shape, tensor)
    if gpus % tensor:
        raise RecipeError(f"--gpus is {gpus}; allowed: a multiple of tensor_parallel_size {tensor}")
    shares = gpus // tensor * accumulate
    if batch_size % shares:
        fits_gpus = [n * tensor for n in range(1, 2 * gpus // tensor + 1) if batch_size % (n * accumulate) == 0]
        near = sorted(sorted(fits_gpus, key=lambda n: abs(n - gpus))[:4])
        raise RecipeError(
            f"data.batch_size {batch_size} does not divide into {gpus // tensor} groups x {accumulate}"
            f" (trainer.accumulate_grad_batches). Numbers of GPUs near {gpus} that fit: {', '.join(map(str, near))};"
            f" batch sizes: {batch_size // shares * shares or shares}, {(batch_size // shares + 1) * shares}"
        )
    return ParallelPlan(kind, stage, gpus, per_node, tensor, accumulate, batch_size // shares, precision)


def read_engine(path: Path) -> dict[str, Any]:
    """Read DeepSpeed's configuration, a JSON file.

    Raises:
        RecipeError: if it cannot be read or is not a JSON object.
    """
    try:
        engine = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"trainer.strategy.init_args.config is {str(path)!r}: {error}") from error
    if not isinstance(engine, dict):
        raise RecipeError(f"trainer.strategy.init_args.config is {str(path)!r}: not a JSON object")
    return engine


def strategy_options(strategy: Any) -> dict[str, Any]:
    """Return the arguments that a configuration gives a strategy; {} for a name alone."""
    return (strategy.get("init_args") or {}) if isinstance(strategy, dict) else {}


def tensor_parallel_size(strategy: Any, per_node: int) -> int:
    """Return how many of the `per_node` GPUs of a node share a layer; 1 for all but ModelParallelStrategy."""
    if strategy_name(strategy) != "ModelParallelStrategy":
        return 1
    size = strategy_options(strategy).get("tensor_parallel_size", "auto")
    return per_node if size == "auto" else int(size)


def _kind_of(strategy: Any, gpus: int) -> tuple[str, int]:
    """Return the kind of the strategy, and the stage if it is ZeRO."""
    name, options = strategy_name(strategy), strategy_options(strategy)
    if name in ("fsdp", "FSDPStrategy", "ModelParallelStrategy"):
        return "fsdp", 0
    if name in _DEEPSPEED_STAGES or name == "DeepSpeedStrategy":
        stage = _DEEPSPEED_STAGES.get(name, options.get("stage", 2))
        engine = options.get("config")
        if isinstance(engine, str):
            engine = read_engine(Path(engine))
        if isinstance(engine, dict):
            stage = engine.get("zero_optimization", {}).get("stage", 0)
        return "zero", int(stage)
    if name == "auto" or str(name).startswith("ddp") or name == "DDPStrategy":
        return ("ddp" if gpus > 1 else "single"), 0
    known = "auto, ddp, fsdp, ModelParallelStrategy, deepspeed_stage_1 to 3, DeepSpeedStrategy"
    raise RecipeError(f"trainer.strategy is {name!r}; plan knows {known}")
