"""Find the row of a sample. Each pass over the data has its own permutation of all rows.

The permutation of a small data set is kept as an array. That of a large one (the 650 million rows of C4 would take 5 GB
in every process) is computed for the wanted samples only. A Feistel network over the next power of four is applied
until its result is a row (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

import functools

import numpy as np

ROWS_IN_MEMORY = 1 << 22  # 32 MB
_ROUNDS = 6


def sample_rows(samples: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Return the rows, int64 (n,), of the samples (n,) of a run. This is a pure function.

    Args:
        samples: indices >= 0, counted over the whole run.
        rows: number of rows in the data set, >= 1.
        seed: seed of the order, >= 0.
    """
    passes, places = np.divmod(np.asarray(samples, np.int64), rows)
    found = np.empty_like(places)
    for number in np.unique(passes):
        chosen = passes == number
        if rows <= ROWS_IN_MEMORY:
            found[chosen] = _permutation(rows, seed, int(number))[places[chosen]]
        else:
            found[chosen] = feistel(places[chosen], rows, seed, int(number))
    return found


@functools.lru_cache(maxsize=1)  # one is enough, because samples are asked for in order
def _permutation(rows: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).permutation(rows)


def feistel(places: np.ndarray, rows: int, seed: int, number: int) -> np.ndarray:
    """Return the images of `places`, int64 (n,) in [0, rows), under the permutation of pass `number`."""
    half = np.uint64(max(1, (int(rows - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.default_rng([seed, number]).integers(0, 1 << 64, _ROUNDS, dtype=np.uint64, endpoint=False)
    found = places.astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        left, right = found[outside] >> half, found[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        found[outside] = (left << half) | right
        outside = outside[found[outside] >= np.uint64(rows)]
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Apply the finalizer of SplitMix64 (Steele, Lea and Flood 2014): every input bit changes every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
