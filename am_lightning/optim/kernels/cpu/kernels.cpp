// The two passes of AM-AdamW over many tensors, for the CPU. Plain C interface, no header of torch's is needed.
//
// Work is cut into blocks of BLOCK elements. Each block has its own pair of float64 partial sums, added up in the order
// of the blocks, so the result does not depend on the number of threads. Within a block, tiles of TILE elements are
// summed in the working precision (float32, or float64 for float64 parameters).
//
//   v' = v + (1 - beta2) (g^2 - v)     P = c_root sqrt(v') + c_eps     q = 1 + lambda P
//   N = sum (d - one_plus_k g) (d / P + mu x)                        D = sum (d - g)^2 / (P q)
//   d' = d + omega (g - d) / q         x' = decay_factor x - lr d' / P

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t BLOCK = 16384, TILE = 1024;

enum Kind : int64_t { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };

struct Facts {  // of one tensor, the same in every step
  int64_t numel, row, x_kind, g_kind, d_kind, v_kind, maximize;
};
struct LocalShard : Facts {
  void *x, *g, *d, *v;
  // addresses: [4, count], x, g, d and v of every tensor
  LocalShard(const Facts* facts, void* const* addresses, int64_t count, int64_t i)
      : Facts(facts[i]), x(addresses[i]), g(addresses[count + i]), d(addresses[2 * count + i]),
        v(addresses[3 * count + i]) {}
};
struct GroupOptions {
  double beta2, lambd, mu;
};
struct Coefficients {  // of one row
  double one_plus_k, c_root, c_eps, lr, decay_factor, step, omega;
};
struct Block {
  int64_t shard, begin, end;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
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
  float base = std::fabs(value) * float_of(0x77800000u);  // overflows to inf where float16 does
  base *= float_of(0x08800000u);                          // 2^-110
  uint32_t bias = std::max(twice & 0xff000000u, 0x71000000u);
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

void store_stochastic(uint16_t* out, const float* from, int64_t n, int64_t first, uint32_t seed) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    uint32_t u = bits_of(from[i]);
    uint32_t noise = mix(uint32_t(first + i) ^ seed) >> 16;
    out[i] = uint16_t((u + ((u & 0x7f800000u) == 0x7f800000u ? 0u : noise)) >> 16);
  }
}

// ---------------------------------------------------------------- tiles in the working precision
template <class C, Kind native>
C* tile(void* base, int64_t kind, int64_t first, int64_t n, C* scratch) {
  if (kind == native) return static_cast<C*>(base) + first;
  if (kind == F32) {
    const float* p = static_cast<const float*>(base) + first;
    for (int64_t i = 0; i < n; i++) scratch[i] = C(p[i]);
  } else if (kind == F64) {
    const double* p = static_cast<const double*>(base) + first;
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
void store(void* base, int64_t kind, int64_t first, int64_t n, const C* from) {
  if (kind == native) return;  // worked on in place
  if (kind == F32) {
    float* p = static_cast<float*>(base) + first;
    for (int64_t i = 0; i < n; i++) p[i] = float(from[i]);
  } else if (kind == F64) {
    double* p = static_cast<double*>(base) + first;
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
const C* negated(const C* g, int64_t n, C* scratch) {
  for (int64_t i = 0; i < n; i++) scratch[i] = -g[i];
  return scratch;
}

// ---------------------------------------------------------------- the formulas, for one element
// The smallest number that a kind rounds to inf.
template <class C>
C too_large_for(int64_t kind) {
  if (kind == F16) return C(65520);
  return kind == BF16 ? C(float_of(0x7f7f8000u)) : std::numeric_limits<C>::infinity();
}

template <class C>
struct Constants {
  C rate, c_root, c_eps, lambd, mu, one_plus_k, omega, lr, decay_factor, too_large;
  Constants(const LocalShard& p, const GroupOptions& o, const Coefficients& s)
      : rate(C(1 - o.beta2)), c_root(C(s.c_root)), c_eps(C(s.c_eps)), lambd(C(o.lambd)), mu(C(o.mu)),
        one_plus_k(C(s.one_plus_k)), omega(C(s.omega)), lr(C(s.lr)), decay_factor(C(s.decay_factor)), too_large(too_large_for<C>(p.v_kind)) {}
};

template <class C>
struct Precond {
  C second, P, q, M;  // M = 1 / (P q): one division serves 1 / P = M q and 1 / q = M P
  Precond(C g, C v, const Constants<C>& k) {
    second = v + k.rate * (g * g - v);
    P = k.c_root * std::sqrt(second) + k.c_eps;
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
  den += m.second < k.too_large ? diff * (diff * m.M) : std::numeric_limits<C>::quiet_NaN();  // v' does not fit
}

template <class C>
inline void advance(C g, C& d, C& v, C& x, const Constants<C>& k) {
  Precond<C> m(g, v, k);
  v = m.second;
  d += k.omega * (g - d) * (m.M * m.P);
  x = k.decay_factor * x - k.lr * (d * (m.M * m.q));
}

template <class C, Kind native>
void block_sums(const LocalShard& shard, const GroupOptions& o, const Coefficients& s, const Block& block, double* out) {
  alignas(64) C sg[TILE], sd[TILE], sv[TILE], sx[TILE];
  const Constants<C> k(shard, o, s);
  double num = 0, den = 0;
  for (int64_t first = block.begin; first < block.end; first += TILE) {
    const int64_t n = std::min(TILE, block.end - first);
    const C* g = tile<C, native>(shard.g, shard.g_kind, first, n, sg);
    const C* d = tile<C, native>(shard.d, shard.d_kind, first, n, sd);
    const C* v = tile<C, native>(shard.v, shard.v_kind, first, n, sv);
    if (shard.maximize) g = negated(g, n, sg);
    C tile_num = 0, tile_den = 0;
    if (o.mu != 0) {
      const C* x = tile<C, native>(shard.x, shard.x_kind, first, n, sx);
#pragma omp simd reduction(+ : tile_num, tile_den)
      for (int64_t i = 0; i < n; i++) add_terms<C, true>(g[i], d[i], v[i], x[i], k, tile_num, tile_den);
    } else {
#pragma omp simd reduction(+ : tile_num, tile_den)
      for (int64_t i = 0; i < n; i++) add_terms<C, false>(g[i], d[i], v[i], C(0), k, tile_num, tile_den);
    }
    num += double(tile_num);
    den += double(tile_den);
  }
  out[0] = num;
  out[1] = den;
}

template <class C, Kind native>
void block_update(const LocalShard& shard, const GroupOptions& o, const Coefficients& s, const Block& block) {
  alignas(64) C sg[TILE], sd[TILE], sv[TILE], sx[TILE];
  const Constants<C> k(shard, o, s);
  const bool stochastic = shard.d_kind == BF16 && shard.x_kind == F32;
  const uint32_t seed = mix(uint32_t(int64_t(s.step)) + 0x9e3779b9u * uint32_t(shard.row + 1));
  for (int64_t first = block.begin; first < block.end; first += TILE) {
    const int64_t n = std::min(TILE, block.end - first);
    const C* g = tile<C, native>(shard.g, shard.g_kind, first, n, sg);
    C* d = tile<C, native>(shard.d, shard.d_kind, first, n, sd);
    C* v = tile<C, native>(shard.v, shard.v_kind, first, n, sv);
    C* x = tile<C, native>(shard.x, shard.x_kind, first, n, sx);
    if (shard.maximize) g = negated(g, n, sg);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) advance(g[i], d[i], v[i], x[i], k);
    if constexpr (native == F32) {
      if (stochastic) store_stochastic(static_cast<uint16_t*>(shard.d) + first, d, n, first, seed);
    }
    if (!stochastic) store<C, native>(shard.d, shard.d_kind, first, n, d);
    store<C, native>(shard.v, shard.v_kind, first, n, v);
    store<C, native>(shard.x, shard.x_kind, first, n, x);
  }
}

std::vector<Block> cut(const Facts* facts, int64_t count, const uint8_t* active) {
  std::vector<Block> blocks;
  for (int64_t p = 0; p < count; p++) {
    if (active && !active[facts[p].row]) continue;
    for (int64_t begin = 0; begin < facts[p].numel; begin += BLOCK)
      blocks.push_back({p, begin, std::min(begin + BLOCK, facts[p].numel)});
  }
  return blocks;
}

}  // namespace

extern "C" {

int am_has_openmp() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

// out: [count, 2], N and D of each shard. coefficients: [rows].
void am_sums(const Facts* facts, void* const* addresses, const GroupOptions* options, const Coefficients* coefficients,
             int64_t count, int threads, double* out) {
  const std::vector<Block> blocks = cut(facts, count, nullptr);
  const int64_t total = int64_t(blocks.size());
  std::vector<double> partial(2 * total);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (total > 1 && threads > 1)
  for (int64_t b = 0; b < total; b++) {
    const LocalShard shard(facts, addresses, count, blocks[b].shard);
    const GroupOptions& o = options[blocks[b].shard];
    if (shard.x_kind == F64)
      block_sums<double, F64>(shard, o, coefficients[shard.row], blocks[b], &partial[2 * b]);
    else
      block_sums<float, F32>(shard, o, coefficients[shard.row], blocks[b], &partial[2 * b]);
  }
  std::fill(out, out + 2 * count, 0.0);
  for (int64_t b = 0; b < total; b++) {
    out[2 * blocks[b].shard] += partial[2 * b];
    out[2 * blocks[b].shard + 1] += partial[2 * b + 1];
  }
}

// Writes the shards of active rows. Backwards: what pass 1 read last is still in the cache.
void am_update(const Facts* facts, void* const* addresses, const GroupOptions* options,
               const Coefficients* coefficients, int64_t count, int threads, const uint8_t* active) {
  const std::vector<Block> blocks = cut(facts, count, active);
  const int64_t total = int64_t(blocks.size());
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (total > 1 && threads > 1)
  for (int64_t k = 0; k < total; k++) {
    const Block& block = blocks[total - 1 - k];
    const LocalShard shard(facts, addresses, count, block.shard);
    const GroupOptions& o = options[block.shard];
    if (shard.x_kind == F64)
      block_update<double, F64>(shard, o, coefficients[shard.row], block);
    else
      block_update<float, F32>(shard, o, coefficients[shard.row], block);
  }
}
}
