"""torchtitan's own config, model, container, checkpoint format and metrics in one process, beside its AdamW.

Its Trainer needs a GPU, so this module does what it does with the optimizer: build, step, log, save, load.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components import metrics as titan_metrics
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import config_registry

from am_lightning.clients.torchtitan import adaptive_memory


def model_of(config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = config.model_spec.model.build()
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.02)
    return model


def train(optimizers: Any, model: torch.nn.Module, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = param.detach() + 0.01 * torch.randn(param.shape, generator=generator)
        optimizers.step()


class Seen(titan_metrics.BaseLogger):
    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.metrics |= metrics


def logged(config: Any, optimizers: Any) -> dict[str, Any]:
    peak = titan_metrics.DeviceMemStats(*[0] * len(titan_metrics.DeviceMemStats._fields))
    monitor = SimpleNamespace(reset_peak_stats=lambda: None, get_peak_stats=lambda: peak, device_name="CPU")
    titan_metrics.build_device_memory_monitor = lambda: monitor  # torchtitan's own reads a GPU's memory
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
    processor = config.metrics.build(parallel_dims=dims, dump_folder=sys.argv[1])
    processor.logger, processor.optimizers, processor.num_flops_per_token = Seen(), optimizers, 1
    processor.data_loading_times.append(0.1)
    processor.log(3, 1.0, 1.0, 0.5, extra_metrics={"lr": 0.1})
    return processor.logger.metrics


def main() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    plain = config_registry.llama3_debugmodel()
    group = plain.optimizer.param_groups[0].optimizer_kwargs
    config = adaptive_memory(config_registry.llama3_debugmodel(), lambd=0.2)
    model = model_of(config)
    optimizers = config.optimizer.build(model_parts=[model])
    ours = optimizers.optimizers[0]
    kept = {key: ours.param_groups[0][key] for key in ("lr", "eps", "weight_decay", "lambd", "beta1_max", "fused")}

    train(optimizers, model, range(3))
    saved = {key: value.clone() if torch.is_tensor(value) else value for key, value in optimizers.state_dict().items()}
    metrics = logged(config, optimizers)
    weights = [param.detach().clone() for param in model.parameters()]
    train(optimizers, model, range(3, 6))

    again = model_of(config)
    with torch.no_grad():
        for param, value in zip(again.parameters(), weights, strict=True):
            param.copy_(value)
    resumed = config.optimizer.build(model_parts=[again])
    resumed.load_state_dict(saved)
    train(resumed, again, range(3, 6))
    adamw = plain.optimizer.build(model_parts=[model_of(plain)])
    adamw.load_state_dict(saved)
    print(
        json.dumps(
            {
                "kind": type(ours).__name__,
                "kept": kept,
                "expected": {"lr": group["lr"], "eps": group["eps"], "weight_decay": group["weight_decay"]},
                "metrics": {key: value for key, value in metrics.items() if key == "lr" or key.startswith("am/")},
                "betas": [float(beta) for beta in ours.momentum().values()],
                "names": list(ours.momentum()) == [name for name, _ in model.named_parameters()],
                "bitwise": all(map(torch.equal, model.parameters(), again.parameters())),
                "adamw_steps": float(next(iter(adamw.optimizers[0].state.values()))["step"]),
            }
        )
    )


if __name__ == "__main__":
    main()
