// The two passes of AM-AdamW over blocks of elements on the CPU. Compiled once for each instruction set, called a path.
//
// Each block has a pair of float64 partial sums. Within it, tiles of TILE elements are summed in the compute precision
// (float32, or float64 for float64 parameters), in LANES parallel sums. All paths and compilers give the same bits,
// because every operation is rounded separately (-ffp-contract=off) and the order of the sums is given by LANES, not by
// the vector width of a CPU.
//
//   v' = v + (1 - beta2) (g^2 - v)     P = c_root sqrt(v') + c_eps     q = 1 + lambda P
//   N = sum (d - one_plus_k g) (d / P + mu x)                        D = sum (d - g)^2 / (P q)
//   d' = d + omega (g - d) / q         x' = decay_factor x - lr d' / P
//
// No function of the standard library is called, because the linker keeps one copy of an inline function for all paths,
// which may use an instruction set that this CPU lacks.

#include "work.h"

namespace {

constexpr int64_t TILE = 1024, LANES = 32;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// ---------------------------------------------------------------- 16-bit formats, without branches so that loops vectorise
inline float from_bf16(uint16_t h) { return float_of(uint32_t(h) << 16); }

inline uint16_t to_bf16(float value) {
  uint32_t u = bits_of(value);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

inline float from_f16(uint16_t h) {
  uint32_t magnitude = uint32_t(h & 0x7fffu) << 13;
  uint32_t scaled = bits_of(float_of(magnitude) * float_of(0x77800000u));  // 2^112
  uint32_t special = magnitude | 0x7f800000u;                              // inf and nan
  return float_of((magnitude >= 0x0f800000u ? special : scaled) | (uint32_t(h & 0x8000u) << 16));
}

inline uint16_t to_f16(float value) {  // round to nearest even: the addition below does it
  uint32_t u = bits_of(value), twice = u + u, sign = (u >> 16) & 0x8000u;
  float base = __builtin_fabsf(value) * float_of(0x77800000u);  // overflows to inf where float16 does
  base *= float_of(0x08800000u);                          // 2^-110
  uint32_t bias = (twice & 0xff000000u) > 0x71000000u ? twice & 0xff000000u : 0x71000000u;
  uint32_t sum = bits_of(float_of((bias >> 1) + 0x07800000u) + base);
  uint32_t magnitude = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  return uint16_t(sign | (twice > 0xff000000u ? 0x7e00u : magnitude));
}

// ---------------------------------------------------------------- stochastic rounding: a hash of (row, step, element)
inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

inline uint16_t to_bf16_stochastic(float value, int64_t element, uint32_t seed) {
  uint32_t u = bits_of(value), noise = mix(uint32_t(element) ^ seed) >> 16;
  return uint16_t((u + ((u & 0x7f800000u) == 0x7f800000u ? 0u : noise)) >> 16);
}

// ---------------------------------------------------------------- tiles in the compute precision
template <class C, Kind native>
inline C* tile(void* base, int64_t kind, int64_t first, int64_t n, C* scratch) {
  if (kind == native) return static_cast<C*>(base) + first;
  if (kind == F32) {
    const float* p = static_cast<const float*>(base) + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) scratch[i] = C(p[i]);
  } else if (kind == F64) {
    const double* p = static_cast<const double*>(base) + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) scratch[i] = C(p[i]);
  } else if (kind == BF16) {
    const uint16_t* p = static_cast<const uint16_t*>(base) + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) scratch[i] = C(from_bf16(p[i]));
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(base) + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) scratch[i] = C(from_f16(p[i]));
  }
  return scratch;
}

template <class C, Kind native>
inline void store(void* base, int64_t kind, int64_t first, int64_t n, const C* from) {
  if (kind == native) return;  // worked on in place
  if (kind == F32) {
    float* p = static_cast<float*>(base) + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) p[i] = float(from[i]);
  } else if (kind == F64) {
    double* p = static_cast<double*>(base) + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) p[i] = double(from[i]);
  } else if (kind == BF16) {
    uint16_t* p = static_cast<uint16_t*>(base) + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) p[i] = to_bf16(float(from[i]));
  } else {
    uint16_t* p = static_cast<uint16_t*>(base) + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) p[i] = to_f16(float(from[i]));
  }
}

template <class C>
inline const C* negated(const C* g, int64_t n, C* scratch) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) scratch[i] = -g[i];
  return scratch;
}

// ---------------------------------------------------------------- the formulas, for one element
// Returns the smallest number that rounds to inf in a kind.
template <class C>
inline C too_large_for(int64_t kind) {
  if (kind == F16) return C(65520);
  return kind == BF16 ? C(float_of(0x7f7f8000u)) : C(__builtin_inf());
}

template <class C>
struct Constants {
  C rate, c_root, c_eps, lambd, mu, one_plus_k, omega, lr, decay_factor, too_large;
  inline Constants(const LocalShard& p, const GroupOptions& o, const Coefficients& s)
      : rate(C(1 - o.beta2)), c_root(C(s.c_root)), c_eps(C(s.c_eps)), lambd(C(o.lambd)), mu(C(o.mu)),
        one_plus_k(C(s.one_plus_k)), omega(C(s.omega)), lr(C(s.lr)), decay_factor(C(s.decay_factor)),
        too_large(too_large_for<C>(p.v_kind)) {}
};

inline float root(float value) { return __builtin_sqrtf(value); }
inline double root(double value) { return __builtin_sqrt(value); }

template <class C>
struct Precond {
  C second, P, q, M;  // M = 1 / (P q): one division serves 1 / P = M q and 1 / q = M P
  inline Precond(C g, C v, const Constants<C>& k) {
    second = v + k.rate * (g * g - v);
    P = k.c_root * root(second) + k.c_eps;
    q = 1 + k.lambd * P;
    M = 1 / (P * q);
  }
};

template <class C, bool decays>
inline void add_terms(C g, C d, C v, C x, const Constants<C>& k, C& num, C& den) {
  Precond<C> m(g, v, k);
  C diff = d - g, slope = d * (m.M * m.q);
  if (decays) slope += k.mu * x;
  num += (d - k.one_plus_k * g) * slope;
  den += m.second < k.too_large ? diff * (diff * m.M) : C(__builtin_nan(""));  // v' does not fit
}

template <class C>
inline void advance(C g, C& d, C& v, C& x, const Constants<C>& k) {
  Precond<C> m(g, v, k);
  v = m.second;
  d += k.omega * (g - d) * (m.M * m.P);
  x = k.decay_factor * x - k.lr * (d * (m.M * m.q));
}

// If d is bfloat16 and the parameter float32, d is read and written without a tile of its own, for speed.
template <class C>
inline C read(const C* d, int64_t i) {
  return d[i];
}
inline float read(const uint16_t* d, int64_t i) { return from_bf16(d[i]); }
template <class C>
inline void write(C* d, int64_t i, C value, int64_t, uint32_t) {
  d[i] = value;
}
inline void write(uint16_t* d, int64_t i, float value, int64_t element, uint32_t seed) {
  d[i] = to_bf16_stochastic(value, element, seed);
}

template <class C, class D, bool decays>
inline void tile_sums(const C* g, const D* d, const C* v, const C* x, int64_t n, const Constants<C>& k, double* out) {
  C num[LANES] = {}, den[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
#pragma omp simd
    for (int64_t j = 0; j < LANES; j++)
      add_terms<C, decays>(g[i + j], read(d, i + j), v[i + j], decays ? x[i + j] : C(0), k, num[j], den[j]);
  }
  for (int64_t j = 0; i + j < n; j++)
    add_terms<C, decays>(g[i + j], read(d, i + j), v[i + j], decays ? x[i + j] : C(0), k, num[j], den[j]);
  for (int64_t j = 0; j < LANES; j++) {
    out[0] += double(num[j]);
    out[1] += double(den[j]);
  }
}

template <class C, Kind native, class D>
inline void block_sums(const LocalShard& shard, const GroupOptions& o, const Coefficients& s, const Block& block,
                       double* out) {
  alignas(64) C sg[TILE], sd[TILE], sv[TILE], sx[TILE];
  const Constants<C> k(shard, o, s);
  double sums[2] = {0, 0};
  for (int64_t first = block.begin; first < block.end; first += TILE) {
    const int64_t n = smaller(TILE, block.end - first);
    const C* g = tile<C, native>(shard.g, shard.g_kind, first, n, sg);
    const C* v = tile<C, native>(shard.v, shard.v_kind, first, n, sv);
    const D* d;
    if constexpr (same<C, D>)
      d = tile<C, native>(shard.d, shard.d_kind, first, n, sd);
    else
      d = static_cast<const D*>(shard.d) + first;
    if (shard.maximize) g = negated(g, n, sg);
    if (o.mu != 0)
      tile_sums<C, D, true>(g, d, v, tile<C, native>(shard.x, shard.x_kind, first, n, sx), n, k, sums);
    else
      tile_sums<C, D, false>(g, d, v, nullptr, n, k, sums);
  }
  out[0] = sums[0];
  out[1] = sums[1];
}

template <class C, Kind native, class D>
inline void block_update(const LocalShard& shard, const GroupOptions& o, const Coefficients& s, const Block& block) {
  alignas(64) C sg[TILE], sd[TILE], sv[TILE], sx[TILE];
  const Constants<C> k(shard, o, s);
  const uint32_t seed = mix(uint32_t(int64_t(s.step)) + 0x9e3779b9u * uint32_t(shard.row + 1));
  for (int64_t first = block.begin; first < block.end; first += TILE) {
    const int64_t n = smaller(TILE, block.end - first);
    const C* g = tile<C, native>(shard.g, shard.g_kind, first, n, sg);
    C* v = tile<C, native>(shard.v, shard.v_kind, first, n, sv);
    C* x = tile<C, native>(shard.x, shard.x_kind, first, n, sx);
    D* d;
    if constexpr (same<C, D>)
      d = tile<C, native>(shard.d, shard.d_kind, first, n, sd);
    else
      d = static_cast<D*>(shard.d) + first;
    if (shard.maximize) g = negated(g, n, sg);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      C direction = read(d, i);
      advance(g[i], direction, v[i], x[i], k);
      write(d, i, direction, first + i, seed);
    }
    if constexpr (same<C, D>) store<C, native>(shard.d, shard.d_kind, first, n, d);
    store<C, native>(shard.v, shard.v_kind, first, n, v);
    store<C, native>(shard.x, shard.x_kind, first, n, x);
  }
}

template <class C, Kind native, class D>
inline void do_block(const Work& work, const LocalShard& shard, const Block& block, double* partial) {
  const GroupOptions& o = work.options[block.shard];
  const Coefficients& s = work.coefficients[shard.row];
  if (partial)
    block_sums<C, native, D>(shard, o, s, block, partial);
  else
    block_update<C, native, D>(shard, o, s, block);
}

}  // namespace

// Runs in each thread and takes four blocks at a time. Pass 2 runs backwards, because the cache still holds what pass 1
// read last.
extern "C" void AM_PATH(void* argument) {
  Work& work = *static_cast<Work*>(argument);
  for (int64_t begin; (begin = __atomic_fetch_add(&work.next, 4, __ATOMIC_RELAXED)) < work.total;) {
    for (int64_t i = begin; i < smaller(begin + 4, work.total); i++) {
      const Block& block = work.blocks[work.partial ? i : work.total - 1 - i];
      const LocalShard shard(work.facts, work.addresses, work.count, block.shard);
      double* partial = work.partial ? work.partial + 2 * i : nullptr;
      if (shard.x_kind == F64)
        do_block<double, F64, double>(work, shard, block, partial);
      else if (shard.x_kind == F32 && shard.d_kind == BF16)
        do_block<float, F32, uint16_t>(work, shard, block, partial);
      else
        do_block<float, F32, float>(work, shard, block, partial);
    }
  }
}
