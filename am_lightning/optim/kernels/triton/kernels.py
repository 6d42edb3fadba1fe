# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernels of the two passes. One launch serves all tensors of one kind, whatever their number and sizes.

A program works on one chunk of one tensor, given by a table. Three facts about a chunk come from memory, so that the
compiler knows nothing of their alignment, and each of them alone would make every access scalar:

- the pointer: ``multiple_of`` tells, where the host has checked that it is a multiple of 16 (``ALIGNED_G`` of g,
  ``ALIGNED_STATE`` of d and v, ``ALIGNED_X``), so that gradients at odd places cost their own access alone;
- where the chunk starts: the table holds the chunk's index, and the start is that times a constant;
- where it ends: full chunks are read and written without a mask, only a tensor's last chunk has one.

Sums have a fixed order and no atomics, so that a pass repeats to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _chunk(chunks, tensors, chunk, CHUNK: tl.constexpr):
    """Return the tensor of a chunk, the start of the chunk in it, the elements from there on, and the row."""
    t = tl.load(chunks + 2 * chunk)
    start = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * CHUNK
    return t, start, tl.load(tensors + 3 * t) - start, tl.load(tensors + 3 * t + 1)


@triton.jit
def _operand(pointers, t, start, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(pointers + 4 * t + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def _number(column, row, COMPUTE: tl.constexpr):
    return tl.load(column + row).to(COMPUTE)


@triton.jit
def _options(options, t, COMPUTE: tl.constexpr):
    """Return beta2, 1 - beta2 (computed in float64, where it is exact), lambda, mu and the sign of the gradient."""
    o = options + 5 * t
    beta2, rest, lambd = tl.load(o).to(COMPUTE), tl.load(o + 1).to(COMPUTE), tl.load(o + 2).to(COMPUTE)
    return beta2, rest, lambd, tl.load(o + 3).to(COMPUTE), tl.load(o + 4).to(COMPUTE)


@triton.jit
def _scaled(sign, grad_scale, COMPUTE: tl.constexpr):
    """Return the factor that the gradient is multiplied by in registers."""
    if grad_scale is not None:
        sign *= tl.load(grad_scale).to(COMPUTE)
    return sign


@triton.jit
def _root(x):
    """Return sqrt rounded to nearest, because the fast float32 sqrt returns 0 for small x."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _precond(g, v, beta2, rest, c_root, c_eps):
    """Return v' and P = c_t (sqrt(v' / (1 - beta2^t)) + eps)."""
    v = beta2 * v + rest * (g * g)
    return v, c_root * _root(v) + c_eps


@triton.jit
def _terms(
    g, d, v, x, beta2, rest, lambd, mu, c_root, c_eps, one_plus_k, DECAYS: tl.constexpr, TOO_LARGE: tl.constexpr
):
    """Return (d - (1 + k) g) (d / P + mu x) and (d - g)^2 / (P q), nan where v' does not fit in its dtype."""
    second, precond = _precond(g, v, beta2, rest, c_root, c_eps)
    slope = d / precond
    if DECAYS:
        slope += mu * x
    difference = d - g
    den = difference * (difference / (precond * (1 + lambd * precond)))
    return (d - one_plus_k * g) * slope, tl.where(second < TOO_LARGE, den, float("nan"))


@triton.jit
def sums_kernel(
    pointers, chunks, tensors, options, one_plus_k_at, c_root_at, c_eps_at, grad_scale, partial,
    G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, X: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED_G: tl.constexpr, ALIGNED_STATE: tl.constexpr, ALIGNED_X: tl.constexpr,
    DECAYS: tl.constexpr, TOO_LARGE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Pass 1, first stage: N and D of one chunk. Lanes add up in the compute dtype, the lanes of a chunk in float64."""
    chunk = tl.program_id(0)
    t, start, n, row = _chunk(chunks, tensors, chunk, BLOCK * BLOCKS)
    g, d = _operand(pointers, t, start, 0, G, ALIGNED_G), _operand(pointers, t, start, 1, D, ALIGNED_STATE)
    v, x = _operand(pointers, t, start, 2, V, ALIGNED_STATE), _operand(pointers, t, start, 3, X, ALIGNED_X)
    beta2, rest, lambd, mu, sign = _options(options, t, COMPUTE)
    sign = _scaled(sign, grad_scale, COMPUTE)
    one_plus_k = _number(one_plus_k_at, row, COMPUTE)
    c_root, c_eps = _number(c_root_at, row, COMPUTE), _number(c_eps_at, row, COMPUTE)
    num, den = tl.zeros((BLOCK,), COMPUTE), tl.zeros((BLOCK,), COMPUTE)
    lanes = tl.arange(0, BLOCK)
    weights = tl.zeros((BLOCK,), COMPUTE)
    if n >= BLOCK * BLOCKS:
        for i in range(BLOCKS):
            o = i * BLOCK + lanes
            if DECAYS:
                weights = tl.load(x + o).to(COMPUTE)
            a, b = _terms(
                sign * tl.load(g + o).to(COMPUTE), tl.load(d + o).to(COMPUTE), tl.load(v + o).to(COMPUTE), weights,
                beta2, rest, lambd, mu, c_root, c_eps, one_plus_k, DECAYS, TOO_LARGE,
            )  # fmt: skip
            num += a
            den += b
    else:
        for i in range(tl.cdiv(n, BLOCK).to(tl.int32)):
            o = i * BLOCK + lanes
            inside = o < n
            if DECAYS:
                weights = tl.load(x + o, inside, 0.0).to(COMPUTE)
            a, b = _terms(
                sign * tl.load(g + o, inside, 0.0).to(COMPUTE), tl.load(d + o, inside, 0.0).to(COMPUTE),
                tl.load(v + o, inside, 0.0).to(COMPUTE), weights,
                beta2, rest, lambd, mu, c_root, c_eps, one_plus_k, DECAYS, TOO_LARGE,
            )  # fmt: skip
            num += tl.where(inside, a, 0.0)  # with eps = 0 the terms of masked elements are nan
            den += tl.where(inside, b, 0.0)
    tl.store(partial + 2 * chunk, tl.sum(num.to(tl.float64), 0))
    tl.store(partial + 2 * chunk + 1, tl.sum(den.to(tl.float64), 0))


@triton.jit
def reduce_kernel(partial, first_chunk, tensors, sums, BLOCK: tl.constexpr):
    """Pass 1, second stage: N and D of one tensor, its chunks in a fixed order, in float64."""
    t = tl.program_id(0)
    begin, end = tl.load(first_chunk + t), tl.load(first_chunk + t + 1)
    num, den = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for i in range(begin, end, BLOCK):
        o = i + tl.arange(0, BLOCK)
        num += tl.load(partial + 2 * o, o < end, 0.0)
        den += tl.load(partial + 2 * o + 1, o < end, 0.0)
    slot = tl.load(tensors + 3 * t + 2)
    tl.store(sums + 2 * slot, tl.sum(num, 0))
    tl.store(sums + 2 * slot + 1, tl.sum(den, 0))


@triton.jit
def _stepped(g, d, v, x, beta2, rest, lambd, c_root, c_eps, omega, lr, decay_factor):
    """Return d' = d + omega (g - d) / q,  v'  and  x' = (1 - mu eta) x - eta d' / P."""
    v, precond = _precond(g, v, beta2, rest, c_root, c_eps)
    d += omega * (g - d) / (1 + lambd * precond)
    return d, v, decay_factor * x - lr * d / precond


@triton.jit
def _mix(x):
    """Hash 32 bits (the "lowbias32" of C. Wellons)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _seed(steps, row):
    """Return the seed of a row in this step, which is the same on every replica and after a resume."""
    count = tl.load(steps + row).to(tl.int64) + 0x9E3779B9 * (row.to(tl.int64) + 1)
    return _mix((count & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def _round(value, index, seed, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Round to the storage dtype. STOCHASTIC rounds float32 to bfloat16, up with the probability of the remainder."""
    if STOCHASTIC:
        bits = value.to(tl.uint32, bitcast=True)
        noise = _mix((index & 0xFFFFFFFF).to(tl.uint32) ^ seed) >> 16
        rounded = ((bits + noise) >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        return tl.where(finite, rounded, value.to(DTYPE))
    else:
        return value.to(DTYPE)


@triton.jit
def update_kernel(
    pointers, chunks, tensors, options, c_root_at, c_eps_at, lr_at, decay_factor_at, omega_at,
    active, steps, grad_scale,
    G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, X: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED_G: tl.constexpr, ALIGNED_STATE: tl.constexpr, ALIGNED_X: tl.constexpr,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Pass 2, which writes d, v and x of one chunk if its row is active. Otherwise it reads no tensor."""
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, because the cache may hold what pass 1 read last
    t, start, n, row = _chunk(chunks, tensors, chunk, BLOCK * BLOCKS)
    if tl.load(active + row) != 0:
        g, d = _operand(pointers, t, start, 0, G, ALIGNED_G), _operand(pointers, t, start, 1, D, ALIGNED_STATE)
        v, x = _operand(pointers, t, start, 2, V, ALIGNED_STATE), _operand(pointers, t, start, 3, X, ALIGNED_X)
        beta2, rest, lambd, _, sign = _options(options, t, COMPUTE)
        sign = _scaled(sign, grad_scale, COMPUTE)
        c_root, c_eps = _number(c_root_at, row, COMPUTE), _number(c_eps_at, row, COMPUTE)
        omega, lr = _number(omega_at, row, COMPUTE), _number(lr_at, row, COMPUTE)
        decay_factor = _number(decay_factor_at, row, COMPUTE)
        seed = _seed(steps, row) if STOCHASTIC else 0
        lanes = tl.arange(0, BLOCK)
        if n >= BLOCK * BLOCKS:
            for i in range(BLOCKS):
                o = i * BLOCK + lanes
                new_d, new_v, new_x = _stepped(
                    sign * tl.load(g + o).to(COMPUTE), tl.load(d + o).to(COMPUTE),
                    tl.load(v + o).to(COMPUTE), tl.load(x + o).to(COMPUTE),
                    beta2, rest, lambd, c_root, c_eps, omega, lr, decay_factor,
                )  # fmt: skip
                tl.store(v + o, new_v.to(V))
                tl.store(d + o, _round(new_d, start + o, seed, D, STOCHASTIC))
                tl.store(x + o, new_x.to(X))
        else:
            for i in range(tl.cdiv(n, BLOCK).to(tl.int32)):
                o = i * BLOCK + lanes
                inside = o < n
                new_d, new_v, new_x = _stepped(
                    sign * tl.load(g + o, inside, 0.0).to(COMPUTE), tl.load(d + o, inside, 0.0).to(COMPUTE),
                    tl.load(v + o, inside, 0.0).to(COMPUTE), tl.load(x + o, inside, 0.0).to(COMPUTE),
                    beta2, rest, lambd, c_root, c_eps, omega, lr, decay_factor,
                )  # fmt: skip
                tl.store(v + o, new_v.to(V), inside)
                tl.store(d + o, _round(new_d, start + o, seed, D, STOCHASTIC), inside)
                tl.store(x + o, new_x.to(X), inside)
