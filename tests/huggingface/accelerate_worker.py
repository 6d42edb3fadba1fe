"""Functions that each rank of test_accelerate.py runs: Accelerate's layouts beside one process with the whole model."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState

from am_lightning import AMAdamW, clip_grad_norm_
from am_lightning.huggingface import attach
from tests.device import ON_GPU
from tests.huggingface.launch import finish
from tests.huggingface.sharded import force, let_fsdp1_run_on_cpu, plugin_of
from tests.lacking import unless_lacking
from tests.sharding.model import (
    RATES,
    batch_of,
    groups_of,
    interior_share,
    lr_of,
    make_net,
    make_optimizer,
    raw_betas,
)

STEPS, HALF, MAX_NORM = 8, 4, 1.0
FLOAT = torch.float32


def accelerator_of(kind: str, **options: Any) -> Accelerator:
    """Return a new accelerator."""
    if ON_GPU:
        return on_gpu(kind, **options)
    let_fsdp1_run_on_cpu()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_CPU
    accelerator = Accelerator(cpu=True, **options)
    if kind == "fsdp2":
        force(accelerator, plugin_of(2, "Block"))
    elif kind == "fsdp1":
        force(accelerator, plugin_of(1, "Block", use_orig_params=True))
    elif kind == "fsdp1_flat":  # as a plugin built in code may have it
        force(accelerator, plugin_of(1, "Block"))
    return accelerator


def on_gpu(kind: str, **options: Any) -> Accelerator:
    """Set the environment of a launch in which Accelerate acts on the CPU as on a GPU."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ["LOCAL_RANK"] = "0"
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # an earlier plugin has set it
    versions: dict[str, dict[str, Any]] = {"fsdp1": {"use_orig_params": True}, "fsdp1_flat": {}, "fsdp2": {}}
    plugin = plugin_of(int(kind[4]), "Block", **versions[kind]) if kind in versions else None
    return Accelerator(fsdp_plugin=plugin, **options)


def params_of(model: torch.nn.Module, kind: str) -> Any:
    """Return the parameters, named by the user under DDP and unnamed otherwise; flat parameters are in one group."""
    if kind == "fsdp1_flat":
        return list(model.parameters())
    groups = groups_of(model)
    for group in groups:
        group["params"] = [(f"mine.{n}", p) if kind == "ddp" else p for n, p in group["params"]]
    return groups


def prepared(accelerator: Accelerator, kind: str, scope: str, optimizer_kind: str = "adamw") -> tuple[Any, Any]:
    net = make_net(FLOAT)
    if kind == "fsdp1_flat":
        model = accelerator.prepare(net)
        return model, accelerator.prepare(make_optimizer(optimizer_kind, params_of(model, kind), scope))
    return accelerator.prepare(net, make_optimizer(optimizer_kind, params_of(net, kind), scope))


def train(
    accelerator: Accelerator, model: Any, optimizer: Any, steps: range, rate: float, *, clip: bool, parts: int = 1
) -> dict[str, list[Any]]:
    """Train each rank on its share of ``parts`` micro-batches per step."""
    rank, world, inner = accelerator.process_index, accelerator.num_processes, optimizer.optimizer
    seen: list[dict[str, float]] = []
    norms: list[tuple[float, float]] = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr_of(step, rate)
        x, y = (whole.to(accelerator.device) for whole in batch_of(step, FLOAT))
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(part_x.chunk(world)[rank]), part_y.chunk(world)[rank])
                accelerator.backward(loss)
                if clip and accelerator.sync_gradients:
                    ours = clip_grad_norm_(inner, float("inf"))
                    theirs = accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                    theirs = theirs.full_tensor() if hasattr(theirs, "full_tensor") else theirs
                    norms.append((float(ours), float(theirs)))
                optimizer.step()
                optimizer.zero_grad()
        seen.append({name: float(beta) for name, beta in inner.momentum().items()})
    return {"seen": seen, "norms": norms}


def alone(scope: str, *, clip: bool, flat: bool, kind: str = "adamw") -> dict[str, Any]:
    """Train in one process on the whole batch, without Accelerate."""
    net, rate = make_net(FLOAT), RATES[kind][scope]
    optimizer = make_optimizer(kind, list(net.named_parameters()) if flat else groups_of(net), scope)
    seen = []
    with raw_betas(scope) as raw, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is one of two and warns
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = lr_of(step, rate)
            x, y = batch_of(step, FLOAT)
            optimizer.zero_grad()
            F.mse_loss(net(x), y).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)
            optimizer.step()
            seen.append({name: float(beta) for name, beta in optimizer.momentum().items()})
    names = optimizer.parameter_names()
    return {
        "raw": [dict(zip(names, row, strict=True)) for row in raw],
        "seen": seen,
        "share": interior_share(seen, kind),
        "names": names,
    }


def layout(kind: str, scope: str, *, clip: bool = False, parts: int = 1, optimizer: str = "adamw") -> dict[str, Any]:
    """Make eight steps and return what a test compares with one process."""
    accelerator = accelerator_of(kind, gradient_accumulation_steps=parts)
    model, wrapped = prepared(accelerator, kind, scope, optimizer)
    attach(accelerator, wrapped)
    with raw_betas(scope) as raw:
        run = train(accelerator, model, wrapped, range(STEPS), RATES[optimizer][scope], clip=clip, parts=parts)
    inner = wrapped.optimizer
    names = inner.parameter_names()
    return {
        **run,
        "raw": [dict(zip(names, row, strict=True)) for row in raw],
        "names": names,
        "described": inner.current_layout().describe(),
        "replicas": inner.replica_group is dist.group.WORLD,
        "alone": alone(scope, clip=clip, flat=kind == "fsdp1_flat", kind=optimizer),
    }


def resumed(kind: str, folder: str) -> dict[str, Any]:
    """Save after four steps and continue; a new model and optimizer load that and continue, too, with a tracker."""
    results: dict[str, Any] = {}
    for name in ("unbroken", "resumed"):
        accelerator = accelerator_of(kind, log_with="tensorboard", project_dir=f"{folder}/{kind}")
        accelerator.init_trackers(name)
        model, optimizer = prepared(accelerator, kind, "tensor")
        attach(accelerator, optimizer, log_every_n_steps=2)
        half = f"{folder}/{kind}/half"
        if name == "unbroken":
            accelerator.save_state(f"{folder}/{kind}/start")  # FSDP2 steps it with zero gradients
            first = train(accelerator, model, optimizer, range(HALF), 0.1, clip=True)
            accelerator.save_state(half)
            then = train(accelerator, model, optimizer, range(HALF, STEPS), 0.1, clip=True)
            results[name] = {key: first[key] + then[key] for key in first}
        else:
            accelerator.load_state(half)
            results[name] = train(accelerator, model, optimizer, range(HALF, STEPS), 0.1, clip=True)
        for tracker in accelerator.trackers:  # end_training() would end the process group, too
            tracker.finish()
    return results


def fresh_optimizer(folder: str) -> dict[str, list[float]]:
    """Return the steps in the state that load_state gives a fresh FSDP1 optimizer. Accelerate 1.15 gives it none."""
    found = {}
    for make in (torch.optim.AdamW, AMAdamW):
        for done in (1, 0):
            accelerator = accelerator_of("fsdp1")
            net = make_net(FLOAT)
            model, optimizer = accelerator.prepare(net, make(net.parameters()))
            if done:
                accelerator.backward(model(batch_of(0, FLOAT)[0]).square().mean())
                optimizer.step()
                accelerator.save_state(f"{folder}/fresh-{make.__name__}")
            else:
                accelerator.load_state(f"{folder}/fresh-{make.__name__}")
        found[make.__name__] = [float(state["step"]) for state in optimizer.state.values()]
    return found


def attempt(action: Callable[[], Any]) -> tuple[str, str]:
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def refusals() -> dict[str, tuple[str, str]]:
    """Return what each rank raises."""
    found = {}
    accelerator = accelerator_of("fsdp1_flat")
    model, optimizer = prepared(accelerator, "fsdp1_flat", "tensor")
    attach(accelerator, optimizer)
    found["flat tensor"] = attempt(lambda: train(accelerator, model, optimizer, range(1), 0.1, clip=False))

    accelerator = accelerator_of("fsdp1_flat")
    net = make_net(FLOAT)
    _, early = accelerator.prepare(net, AMAdamW(net.parameters(), scope="global"))
    found["flat, built too early"] = attempt(lambda: attach(accelerator, early))

    accelerator = accelerator_of("ddp")
    net = make_net(FLOAT)
    unprepared = AMAdamW(net.parameters())
    accelerator.prepare(net)
    found["not prepared"] = attempt(lambda: attach(accelerator, unprepared))
    foreign = accelerator.prepare(AMAdamW(make_net(FLOAT).parameters()))
    found["another model"] = attempt(lambda: attach(accelerator, foreign))
    return found


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    faulthandler.dump_traceback_later(job.get("deadline", 140), exit=True)
    results: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for name, arguments in job["layouts"].items():
            results[name] = unless_lacking(layout, **arguments)
        for kind in job["resumed"]:
            results[f"resumed {kind}"] = unless_lacking(resumed, kind, job["folder"])
        results["refusals"] = refusals()
        results["fresh"] = fresh_optimizer(job["folder"])
    results["warned"] = [str(warning.message) for warning in warned if "beta_t" in str(warning.message)]
    finish(results, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
