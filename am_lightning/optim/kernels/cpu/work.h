// Types shared by the code of the paths (kernels.cpp) and the choice among them (paths.cpp).

#pragma once

#include <cstdint>

constexpr int64_t BLOCK = 16384;

enum Kind : int64_t { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };

struct Facts {  // properties of one tensor that are the same in every step
  int64_t numel, row, x_kind, g_kind, d_kind, v_kind, maximize;
};
struct LocalShard : Facts {
  void *x, *g, *d, *v;
  // addresses: [4, count], x, g, d and v of every tensor
  __attribute__((always_inline)) LocalShard(const Facts* facts, void* const* addresses, int64_t count, int64_t i)
      : Facts(facts[i]), x(addresses[i]), g(addresses[count + i]), d(addresses[2 * count + i]),
        v(addresses[3 * count + i]) {}
};
struct GroupOptions {
  double beta2, lambd, mu;
};
struct Coefficients {  // coefficients of one row
  double one_plus_k, c_root, c_eps, lr, decay_factor, step, omega;
};
struct Block {
  int64_t shard, begin, end;
};

struct Work {
  const Facts* facts;
  void* const* addresses;
  const GroupOptions* options;
  const Coefficients* coefficients;
  int64_t count;
  const Block* blocks;
  int64_t total;
  double* partial;  // [blocks, 2], written by pass 1; null for pass 2
  int64_t next;
};
