"""Which row of the data a sample is: each pass over the data is its own permutation of all rows.

A small data set's permutation is kept as an array. A large one's (the 650 million rows of C4 would take 5 GB in every
process) is computed for the wanted samples alone, by a Feistel network over the next power of four, walked until it
lands among the rows (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

import numpy as np

ROWS_IN_MEMORY = 1 << 22  # 32 MB
_ROUNDS = 6
_last: tuple[tuple[int, int, int], np.ndarray] | None = None


def sample_rows(samples: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """The rows, int64 (n,), that the samples (n,) of a run are: a pure function of its arguments.

    Args:
        samples: indices >= 0, counted over the whole run.
        rows: in the data set, >= 1.
        seed: of the order, >= 0.
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


def _permutation(rows: int, seed: int, number: int) -> np.ndarray:
    global _last  # one is enough: samples are asked for in order
    key = (rows, seed, number)
    if _last is None or _last[0] != key:
        _last = (key, np.random.default_rng([seed, number]).permutation(rows))
    return _last[1]


def feistel(places: np.ndarray, rows: int, seed: int, number: int) -> np.ndarray:
    """Where the permutation of pass `number` sends `places`, int64 (n,) in [0, rows)."""
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
    """SplitMix64's finalizer (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
