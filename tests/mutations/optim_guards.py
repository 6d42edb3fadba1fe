"""Faults of what guards a run: gradients whose square overflows, other devices, parameters that are swapped."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_KERNELS = "am_lightning/optim/kernels"
_HUGE = "tests/optim/test_huge_gradients.py"

MUTATIONS = [
    Mutation(
        "reference: a second moment that overflows hides from the sums",
        f"{_KERNELS}/reference.py",
        "(v < too_large(piece.v.dtype)).all()",
        "(v >= 0).all()",
        (f"{_HUGE}::test_far_beyond[-2e+19-reference]", f"{_HUGE}::test_the_step_is_dropped[0-float16-reference]"),
    ),
    Mutation(
        "blocked: a gradient whose square overflows is taken where v' / beta2 is finite",
        f"{_KERNELS}/blocked.py",
        "min(rate * torch.finfo(c.a.dtype).max, too_large(",
        "min(torch.finfo(c.a.dtype).max, too_large(",
        (f"{_HUGE}::test_the_step_is_dropped[0-float32-blocked]",),
    ),
    Mutation(
        "foreach: a second moment that overflows hides from the sums",
        f"{_KERNELS}/foreach.py",
        "den.masked_fill_(~fits, torch.nan)",
        "den.masked_fill_(~fits, 0.0)",
        (f"{_HUGE}::test_far_beyond[-2e+19-foreach]",),
    ),
    Mutation(
        "C++ loop: the second moment may overflow float16",
        f"{_KERNELS}/cpu_loop.cpp",
        "if (kind == F16) return C(65520);",
        "if (kind == F16) return C(1e30);",
        (f"{_HUGE}::test_the_step_is_dropped[0-float16-cpp]",),
    ),
    Mutation(
        "Triton: the second moment may overflow its dtype",
        f"{_KERNELS}/triton_kernels.py",
        'tl.where(second < TOO_LARGE, den, float("nan"))',
        "den",
        (f"{_HUGE}::test_in_triton[float16]",),
    ),
]
