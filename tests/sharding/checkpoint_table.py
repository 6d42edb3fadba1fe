"""Print the table of checkpoints in docs/tested.md: ``python -m tests.sharding.checkpoint_table``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.sharding.checkpoint_paths import PAIRS, PATHS
from tests.sharding.pool import Pool

STEPS = "tests.sharding.checkpoint_steps:"


def row(pools: dict[int, Pool], path: str, kind: str, scope: str, where: Path) -> str:
    """Return a line with the largest relative error of raw beta_t in the four steps after each resume."""
    case = {"path": path, "kind": kind, "scope": scope}
    errors = []
    for before, after in PAIRS:
        saved = where / f"{path}-{kind}-{scope}-{before}"
        if not saved.exists():
            pools[before].run(f"{STEPS}train_and_save", **case, where=str(saved))
        ranks = pools[after].run(f"{STEPS}load_and_train", **case, where=str(saved))
        errors.append(f"{max(rank['raw'] for rank in ranks):.0e}")
    return " | ".join(errors)


def main() -> None:
    pools = {world: Pool(world) for world in (1, 2, 4)}
    heads = " | ".join(f"{before} to {after}" for before, after in PAIRS)
    print(f"| path | optimizer | scope | {heads} |\n|---|---|---|{'---|' * len(PAIRS)}")
    try:
        with tempfile.TemporaryDirectory() as where:
            for path, one in PATHS.items():
                for kind, scope in one.cases:
                    name = {"adamw": "AMAdamW", "sgd": "AMSGD"}[kind]
                    print(f"| {path} | {name} | {scope} | {row(pools, path, kind, scope, Path(where))} |", flush=True)
    finally:
        for pool in pools.values():
            pool.stop()


if __name__ == "__main__":
    main()
