"""All planted faults, by area."""

from __future__ import annotations

from collections import Counter

from tests.mutations import (
    deepspeed,
    huggingface,
    lightning,
    loggers,
    optim,
    optim_guards,
    optim_state,
    recipes,
    sharding,
)
from tests.mutations.mutation import Mutation

AREAS: dict[str, list[Mutation]] = {
    "optim": [*optim.MUTATIONS, *optim_guards.MUTATIONS, *optim_state.MUTATIONS],
    "sharding": sharding.MUTATIONS,
    "loggers": loggers.MUTATIONS,
    "lightning": lightning.MUTATIONS,
    "huggingface": huggingface.MUTATIONS,
    "deepspeed": deepspeed.MUTATIONS,
    "recipes": recipes.MUTATIONS,
}


def select(words: list[str]) -> list[tuple[str, Mutation]]:
    """Return (area, fault) pairs whose area or name contains one of ``words``; all of them without words.

    Raises:
        ValueError: if two faults have one name, or no fault is found.
    """
    everything = [(area, mutation) for area, mutations in AREAS.items() for mutation in mutations]
    twice = [name for name, count in Counter(mutation.name for _, mutation in everything).items() if count > 1]
    if twice:
        raise ValueError(f"two faults are called {twice[0]!r}")
    chosen = [
        (area, mutation)
        for area, mutation in everything
        if not words or any(word == area or word.lower() in mutation.name.lower() for word in words)
    ]
    if not chosen:
        raise ValueError(f"no fault's area or name holds {' or '.join(map(repr, words))}")
    return chosen
