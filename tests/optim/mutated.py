"""Break state dicts and parameter groups at random, as people do, and compare with torch.optim.

    python -m tests.optim.mutated --state-dicts 10000 --groups 500

A case is a seed. ``load_case`` and ``group_case`` return how the case ended and what is wrong about it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import random
import warnings
from typing import Any

import torch
from torch.nn import Parameter

from tests.optim.mutated_values import (
    Run,
    anything,
    finite,
    optimizer_of,
    parameters,
    pick,
    same,
    step,
    three_steps,
    tried,
    unchanged,
)

CLEAR = (TypeError, ValueError, RuntimeError)  # a step may raise these


def mutate_value(rng: random.Random, saved: dict[str, Any]) -> list[Any]:
    index = pick(rng, saved["state"])
    state = saved["state"][index]
    if rng.random() < 0.1:
        saved["state"][index] = anything(rng)
        return [index]
    key = pick(rng, state)
    state[key] = anything(rng, state[key])
    return [index, key]


def mutate_key(rng: random.Random, saved: dict[str, Any]) -> list[Any]:
    states = saved["state"]
    index = pick(rng, states)
    state = states[index]
    what = rng.randrange(7)
    if what == 0:
        key = pick(rng, state)
        del state[key]
        return [index, key]
    if what == 1:
        key = pick(rng, ["extra", 5, "max_exp_avg_sq"])
        state[key] = anything(rng)
        return [index, key]
    if what == 2:
        key, new = pick(rng, state), pick(rng, ["exp_avg2", "momentum", "exp_avg", "beta"])
        state[new] = state.pop(key)
        return [index, key, new]
    if what == 3:
        del states[index]
        return [index]
    if what == 4:
        states[pick(rng, [str(index), 99, f"weight.{index}", None, (index,)])] = states.pop(index)
        return [index]
    if what == 5:
        saved["state"] = {str(key): value for key, value in states.items()}
        return [*states]
    states[pick(rng, [99, "other", None])] = pick(rng, [copy.deepcopy(state), 5, None])
    return [index]


def mutate_group(rng: random.Random, saved: dict[str, Any]) -> list[Any]:
    groups = saved["param_groups"]
    at = rng.randrange(len(groups))
    group = groups[at]
    what = rng.randrange(9)
    option = pick(rng, [*(key for key in group if key != "params"), "amsgrad", "fused", "param_names", "prev_loss"])
    if what <= 2:
        group[option] = anything(rng, group.get(option))
    elif what == 3:
        group.pop(option, None)
    elif what == 4:
        group["params"] = anything(rng)
    elif what == 5:
        rng.shuffle(group["params"])
    elif what == 6:
        group["params"][rng.randrange(len(group["params"]))] = pick(
            rng, [99, 0, 1, "0", "w", None, [1], torch.ones(1), 0.0]
        )
    elif what == 7:
        groups.insert(
            at, pick(rng, [copy.deepcopy(group), {}, None, {"params": []}])
        ) if rng.random() < 0.5 else groups.pop(at)
    else:
        groups[at] = anything(rng)
    return [at, option, "params", "parameter group", "parameter 'w'"]


def mutate_top(rng: random.Random, saved: dict[str, Any]) -> list[Any]:
    key = pick(rng, ["state", "param_groups"])
    what = rng.randrange(4)
    if what == 0:
        del saved[key]
    elif what == 1:
        saved[key] = anything(rng)
    elif what == 2:
        saved["extra"] = anything(rng)
    else:
        saved[key + "s"] = saved.pop(key)
    return [key, "parameter group"]


def mutate(rng: random.Random, saved: dict[str, Any]) -> list[str]:
    """Change ``saved``; return words, at least one of which an error must contain."""
    touched: list[Any] = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kinds = [
            mutate_top,
            *[mutate_group] * 4,
            *([mutate_value] * 5 + [mutate_key] * 3 if isinstance(saved.get("state"), dict) else []),
        ]
        with contextlib.suppress(TypeError, KeyError, AttributeError, IndexError, ValueError, RuntimeError):
            # an earlier change may have broken it
            touched += rng.choice(kinds)(rng, saved)
    return [str(word) for word in touched]


def load_case(seed: int) -> tuple[str, str]:
    """Return ("refused" | "loaded" | "wrong", what happened)."""
    rng = random.Random(seed)
    ours, theirs = optimizer_of(rng, parameters(rng))
    for run in (ours, theirs):
        for number in range(rng.choice([0, 1, 2, 2])):
            step(run, number)
    source = theirs if type(theirs.optimizer) is torch.optim.AdamW and rng.random() < 0.3 else ours
    saved = copy.deepcopy(source.optimizer.state_dict())
    touched = mutate(rng, saved)
    given, twin = copy.deepcopy(saved), copy.deepcopy(ours)
    error = tried(lambda: ours.optimizer.load_state_dict(saved))
    theirs_fails = tried(lambda: theirs.optimizer.load_state_dict(given)) or tried(lambda: three_steps(theirs))
    bad_there = theirs_fails is not None or not finite(theirs)
    if error is not None:
        words = f"{type(error).__name__}: {error}"
        if not isinstance(error, ValueError) and type(error) is not type(theirs_fails):
            return "wrong", f"raises another error: {words}"
        if not any(word in str(error) for word in [*touched, "parameter '"]):
            return "wrong", f"names nothing of {touched}: {words}"
        return ("refused", words) if unchanged(ours, twin) else ("wrong", f"refused after a change: {words}")
    failure = tried(lambda: three_steps(ours))
    if failure is not None:
        return "wrong", f"loads, and its step fails: {failure!r} (touched {touched}; torch: {theirs_fails!r})"
    if not bad_there and (not finite(ours) or bool(ours.optimizer.last_step_skipped)):
        return "wrong", f"loads, and is not finite or skips (touched {touched})"
    return "loaded", ""


# ---------------------------------------------------------------------- groups of a live optimizer
def add_group(rng: random.Random, run: Run) -> None:
    new = Parameter(torch.ones(2, dtype=run.params[0].dtype))
    given = pick(rng, [[new], new, run.params[:1], [], None, "x", [new.detach().tolist()], [new * 2], [new, new]])
    option = pick(rng, ["lr", "betas", "weight_decay", "foreach", "maximize", "extra"])
    group = {"params": given, option: anything(rng)} if rng.random() < 0.7 else {"params": given}
    run.optimizer.add_param_group(pick(rng, [group, group, group, {}, None, [new]]))


_OPTIONS = (
    *("lr", "lr", "betas", "betas", "eps", "weight_decay", "lambd", "maximize", "foreach", "fused", "capturable"),
    *("beta1_max", "beta_max", "decoupled_weight_decay", "param_names", "prev_loss", "amsgrad", "initial_lr"),
)


def change_option(rng: random.Random, run: Run) -> None:
    group = pick(rng, run.optimizer.param_groups)
    option = pick(rng, _OPTIONS)  # the same for our optimizer and torch.optim's
    value = anything(rng, group.get(option))
    if rng.random() < 0.2:
        group.pop(option, None)
    elif option == "betas" and rng.random() < 0.7:
        group[option] = (0.9, value) if rng.random() < 0.5 else (value, 0.99)
    else:
        group[option] = value


def change_params(rng: random.Random, run: Run) -> None:
    group = pick(rng, run.optimizer.param_groups)
    params, new = group["params"], Parameter(torch.ones(2, dtype=run.params[0].dtype))
    change = rng.randrange(8)
    if change == 0:
        params.append(anything(rng))
    elif change == 1:
        params.append(pick(rng, run.params))
    elif change == 2:
        params.append(new)
    elif change == 3:
        params.pop()
    elif change == 4:
        group["params"] = anything(rng)
    elif change == 5:
        group["params"] = pick(rng, [params[0], tuple(params), dict.fromkeys(params), iter(params), set(params)])
    elif change == 6:
        rng.shuffle(params)
    else:
        del group["params"]


def change_groups(rng: random.Random, run: Run) -> None:
    optimizer = run.optimizer
    groups = optimizer.param_groups
    change = rng.randrange(7)
    at = rng.randrange(len(groups))
    if change == 0:
        groups[at] = pick(rng, [anything(rng), {"params": groups[at]["params"]}, {**groups[at], "lr": anything(rng)}])
    elif change == 1:
        groups.append(pick(rng, [anything(rng), groups[at], dict(groups[at]), {}, {"params": []}]))
    elif change == 2:
        del groups[at]
    elif change == 3:
        groups.reverse()
    elif change == 4:
        optimizer.param_groups = anything(rng)
    elif change == 5:
        optimizer.param_groups = pick(rng, [tuple(groups), [], groups[0], copy.copy(groups)])
    else:
        optimizer.param_groups = [{"params": list(run.params), "lr": pick(rng, [0.01, -0.01, anything(rng)])}]


def state_of(run: Run) -> Any:
    return copy.deepcopy(
        ([p.detach() for p in run.params], [dict(run.optimizer.state.get(p) or {}) for p in run.params])
    )


def group_case(seed: int) -> tuple[str, str]:
    """Return ("refused" | "stepped" | "wrong", what happened), as ``load_case`` does."""
    rng = random.Random(seed)
    ours, theirs = optimizer_of(rng, parameters(rng))
    for run in (ours, theirs):
        for number in range(1 + seed % 2):
            step(run, number)
    change = rng.choice([add_group, change_option, change_option, change_option, change_params, change_groups])
    choices, twin = rng.getstate(), copy.deepcopy(ours)
    made = tried(lambda: change(rng, ours))
    rng.setstate(choices)
    theirs_made = tried(lambda: change(rng, theirs))
    if made is not None:  # built by add_param_group
        if not isinstance(made, CLEAR) and type(made) is not type(theirs_made):
            return "wrong", f"{change.__name__} raises {made!r}, torch {theirs_made!r}"
        return ("refused", repr(made)) if unchanged(ours, twin) else ("wrong", f"refused after a change: {made!r}")
    before = state_of(ours)
    failure = tried(lambda: step(ours, 5))
    theirs_fails = tried(lambda: three_steps(theirs))
    if failure is not None:
        if not isinstance(failure, CLEAR) or not any(word in str(failure) for word in ("group", "param")):
            return "wrong", f"{change.__name__}: the step says {failure!r}, torch {theirs_fails!r}"
        return (
            ("refused", repr(failure)) if same(state_of(ours), before) else ("wrong", f"moved, then said {failure!r}")
        )
    failure = tried(lambda: three_steps(ours))
    if failure is not None:
        return "wrong", f"{change.__name__}: the second step says {failure!r}"
    if theirs_fails is None and finite(theirs) and not finite(ours):
        return "wrong", f"{change.__name__}: not finite"
    return "stepped", ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Mutations of state dicts and of groups; the status is 1 if one is wrong."
    )
    parser.add_argument("--state-dicts", type=int, default=10_000)
    parser.add_argument("--groups", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wrong = False
    for what, case, count in (("state dicts", load_case, args.state_dicts), ("groups", group_case, args.groups)):
        ends: collections.Counter[str] = collections.Counter()
        for seed in range(args.first, args.first + count):
            end, why = case(seed)
            ends[end] += 1
            if end == "wrong":
                print(f"{what}, seed {seed}: {why}", flush=True)
        print(f"{what}: " + ", ".join(f"{number} {end}" for end, number in sorted(ends.items())), flush=True)
        wrong |= ends["wrong"] > 0
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
