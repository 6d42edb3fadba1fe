"""Print the table of layouts in docs/tested.md: ``python -m tests.sharding.table``."""

from __future__ import annotations

import sys

from tests.sharding.layouts import LAYOUTS
from tests.sharding.pool import Pool

DTYPES = ("float64", "float32")


def row(pool: Pool, layout: str, scope: str) -> str:
    """Return one line: the largest relative error of raw beta_t by dtype. The caller's columns are worlds."""
    runs = [pool.run("tests.sharding.steps:compare", layout=layout, kind="adamw", scope=scope, dtype=d) for d in DTYPES]
    errors = [max(rank["raw"] for rank in ranks) for ranks in runs]
    equal = all(rank["bits"] == ranks[0]["bits"] for ranks in runs for rank in ranks)
    counts = runs[0][0]["collectives"][-1]
    sums = counts.get("c10d.allreduce_", 0)
    return f"{errors[0]:.0e} | {errors[1]:.0e} | {'yes' if equal else 'NO'} | {sums} | {runs[0][0]['share']:.0%}"


def main() -> None:
    pools = {world: Pool(world) for world in (2, 4)}
    print("| layout | ranks | scope | float64 | float32 | same bits | collectives | between the clamps |")
    print("|---|---|---|---|---|---|---|---|")
    try:
        for layout, (_, worlds) in LAYOUTS.items():
            for world in worlds:
                for scope in ("global",) if layout.startswith("fsdp1_flat") else ("tensor", "global"):
                    print(f"| {layout} | {world} | {scope} | {row(pools[world], layout, scope)} |")
                    sys.stdout.flush()
    finally:
        for pool in pools.values():
            pool.stop()


if __name__ == "__main__":
    main()
