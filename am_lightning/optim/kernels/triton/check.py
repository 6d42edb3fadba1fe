"""A check that the Triton kernels work on a device: they compile, launch, and agree with the plain kernels."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from am_lightning.optim.closed_form import Sums, bias_correction, decide, loss_gap_factor
from am_lightning.optim.intervals import nothing
from am_lightning.optim.kernels.inputs import GradientClip, GroupOptions, LocalShard
from am_lightning.optim.kernels.single_tensor import SingleTensorPasses
from am_lightning.optim.kernels.triton.launch import DTYPES, TritonPasses, require_triton
from am_lightning.optim.kernels.triton.row_launch import RowKernels
from am_lightning.optim.kernels.workspace import Workspace
from am_lightning.optim.validation import SCOPES

_F64 = torch.float64
_SIZES = (1, 1000, 8192 + 333)  # one element, a masked block, a full chunk and the beginning of another
_NUMBERS = {
    "one_plus_k": 1.9,
    "c_root": 0.8,
    "c_eps": 1e-8,
    "lr": 0.01,
    "decay_factor": 0.999,
    "omega": 0.4,
    "step": 3.0,
}


class Kind(NamedTuple):
    """A device, and the dtypes of the parameter and of its direction d."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    direction: torch.dtype = torch.float32


@functools.cache
def why_not(kind: Kind) -> str:
    """Return the reason why the kernels do not work, or "". Checked once per process and waits for the device.

    Dtypes that the Triton kernels do not support are not checked, because other kernels serve them.

    Raises:
        torch.OutOfMemoryError: if the check runs out of memory. The next call repeats it.
    """
    if not {kind.dtype, kind.direction} <= DTYPES.keys():
        return ""
    try:
        require_triton()
    except RuntimeError as error:
        return str(error)
    try:
        return _difference(kind)
    except torch.OutOfMemoryError:  # not a fault of the kernels, and the cache does not keep exceptions
        raise
    except Exception as error:  # Triton passes on errors of its compiler, the linker or the driver
        said = f"{type(error).__name__}: {error}".strip().replace("\n", " ")[-1000:]
        return (
            f"those for {kind.dtype} cannot be built or launched on {kind.device} ({said}). Triton needs a C compiler "
            "(gcc or clang, or the one that $CC names), Python's headers (Python.h) and the GPU driver's library "
            "(libcuda.so.1), and a folder to write to (TRITON_CACHE_DIR). Install them (Debian, Ubuntu: apt-get "
            "install gcc python3-dev; conda: conda install c-compiler)"
        )


@torch.no_grad()
def _difference(kind: Kind) -> str:
    """Compare both passes of an example step with the plain kernels on the same device. Returns the reason, or ""."""
    shards = _shards(kind)
    plain = copy.deepcopy(shards)
    count = len(shards)
    coefficients = {k: torch.full((count,), v, device=kind.device).double() for k, v in _NUMBERS.items()}
    host = torch.ones(count, dtype=torch.bool, device="cpu")
    host[1] = False  # a row that must not be written
    active = host.to(kind.device)
    passes = TritonPasses(shards, Workspace())
    passes.begin()
    sums = passes.sums(coefficients, _F64)
    passes.update(coefficients, active)
    plain_passes = SingleTensorPasses(plain)
    expected = plain_passes.sums(coefficients, _F64)
    plain_passes.update(coefficients, active)
    found = {"the sums": _largest_error([sums], [expected], 1e-4), "beta_t": (_error_of_rows(kind.device), 1e-6)}
    for name in ("d", "v", "x"):
        ours, theirs = ([getattr(shard, name) for shard in each] for each in (shards, plain))
        found[name] = _largest_error(ours, theirs, 1e-5 + 2 * torch.finfo(ours[0].dtype).eps)
    wrong = [f"{name} by {error:.1e}" for name, (error, limit) in found.items() if not error <= limit]
    if not wrong:
        return ""
    return f"on {kind.device} those for {kind.dtype} differ from the plain kernels ({', '.join(wrong)}): report it"


@functools.cache
def _error_of_rows(device: torch.device) -> float:
    """Return the largest error of the row kernels against ``closed_form``, with one fresh row of three."""
    sizes, options = [2, 1], [[0.9, 0.01, 0.1, 0.99, 1e-8], [0.8, 0.02, 0.05, 0.999, 1e-6]]
    cap, lr, mu, beta2, eps = _on_host([[a, a, b] for a, b in zip(*options, strict=True)]).unbind()
    states = _on_host([[4.0, 0.0, 9.0], [0.5, 1.0, 0.3], [0.7, -1.0, 0.6], [0.02, 0.0, 0.01]]).float()
    sums = _on_host([[0.04, 0.1], [0.3, 0.4], [0.1, 0.2]])
    step, beta_prod, _, prev_lr = states.double()
    c = bias_correction(cap, beta_prod)
    one_plus_k, c_root = 1 + loss_gap_factor(lr, prev_lr, mu), c / (1 - beta2 ** (step + 1)).sqrt()
    ours, theirs = [], []
    for scope in SCOPES:
        kernels, table = RowKernels(sizes, scope, device), states.to(device, copy=True)
        clip = GradientClip(torch.tensor(2.0, dtype=_F64, device=device), 0.5)
        found = kernels.coefficients(table, options, torch.ones(3, dtype=_F64, device=device), clip)
        packed = torch.cat([sums.to(device), found.tail], 1)
        record = torch.zeros(4, dtype=torch.int64, device=device)
        tally, skipped = nothing(packed, 3), record.new_zeros(()).bool()
        omega, _ = kernels.decide(packed, found.columns, table, record, skipped, tally, skip=True)
        beta = decide(
            Sums.unpack(packed.cpu()), cap=cap, lr=lr, scope=scope, sizes=sizes, first_takes_cap=True, nonfinite="skip"
        ).beta
        ours += [found.columns, omega, table, found.factor, tally]
        theirs += [torch.stack([cap, lr, one_plus_k, c_root, c * eps, 1 - mu * lr, step]), 1 - beta]
        theirs += [torch.stack([step + 1, beta_prod * beta, beta, lr]), clip.factor()]
        at_max, at_zero, steps = (beta == cap).double(), (beta == 0).double(), torch.ones_like(beta)
        theirs += [torch.stack([beta, at_max, at_zero, steps, beta, beta])]
    pairs = zip(ours, theirs, strict=True)
    return float(torch.stack([(a.cpu() - b.cpu()).abs().max() for a, b in pairs if a is not None]).max())


def _on_host(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=_F64, device="cpu")


def _shards(kind: Kind) -> list[LocalShard]:
    """Create shards without a random generator, whose state belongs to the user. No sum cancels, because d, g > 0."""
    result = []
    for row, size in enumerate(_SIZES):
        wave = torch.arange(size, dtype=_F64, device="cpu").mul(0.7).sin()
        g, d, v, x = 1.5 + 0.4 * wave, 1.2 - 0.3 * wave, 1.0 + 0.5 * wave, 2.0 + wave
        dtypes = (kind.dtype, kind.direction, kind.dtype, kind.dtype)
        g, d, v, x = (t.to(kind.device, dtype) for t, dtype in zip((g, d, v, x), dtypes, strict=True))
        result.append(LocalShard(row, x, g, d, v, GroupOptions(0.9, 0.1, 0.05, 0.0, False)))
    return result


def _largest_error(ours: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> tuple[float, float]:
    """Return the largest relative error, nan if a value is not finite, and ``limit``. Waits for the device."""
    errors = [((a.double() - e.double()) / e.double()).abs().max() for a, e in zip(ours, expected, strict=True)]
    return float(torch.stack(errors).max()), limit
