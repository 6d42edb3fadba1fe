// Cuts tensors into blocks of BLOCK elements, and runs the given path over them.
//
// The interface is plain C, so no headers of torch, Python or OpenMP are needed. Threads come from a function that the
// caller passes. The partial sums of blocks are added up in order, so the result does not depend on the number of
// threads.

#include <algorithm>
#include <vector>

#include "work.h"

extern "C" {
void am_portable(void*);  // SSE2 on x86-64, NEON on ARM
#ifdef AM_X86
void am_avx2(void*);
void am_avx512(void*);
#endif
}

namespace {

struct Path {
  const char* name;
  void (*run)(void*);
  bool here;
};

std::vector<Path> paths() {  // the best last
#ifdef AM_X86
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2");
  return {{"SSE2", am_portable, true}, {"AVX2", am_avx2, avx2}, {"AVX-512", am_avx512, wide}};
#elif defined(__aarch64__)
  return {{"NEON", am_portable, true}};
#else
  return {{"portable", am_portable, true}};
#endif
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

// The signature of GOMP_parallel, which calls a function with its argument in a given number of threads.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

void run(Work& work, int path, int threads, Parallel parallel) {
  static const std::vector<Path> all = paths();
  if (parallel && threads > 1 && work.total > 1)
    parallel(all[path].run, &work, unsigned(threads), 0);
  else
    all[path].run(&work);
}

}  // namespace

extern "C" {

// Returns the name of a path, "" if this CPU lacks it, or null beyond the last path.
const char* am_path(int path) {
  static const std::vector<Path> all = paths();
  if (path < 0 || path >= int(all.size())) return nullptr;
  return all[path].here ? all[path].name : "";
}

// Pass 1. out: [count, 2], N and D of each shard. coefficients: [rows]. parallel: null for one thread.
void am_sums(const Facts* facts, void* const* addresses, const GroupOptions* options, const Coefficients* coefficients,
             int64_t count, int path, int threads, Parallel parallel, double* out) {
  const std::vector<Block> blocks = cut(facts, count, nullptr);
  std::vector<double> partial(2 * blocks.size() + 1);  // never null
  Work work{facts, addresses, options, coefficients, count, blocks.data(), int64_t(blocks.size()), partial.data(), 0};
  run(work, path, threads, parallel);
  std::fill(out, out + 2 * count, 0.0);
  for (size_t b = 0; b < blocks.size(); b++) {
    out[2 * blocks[b].shard] += partial[2 * b];
    out[2 * blocks[b].shard + 1] += partial[2 * b + 1];
  }
}

// Pass 2, which writes the shards of active rows. active: [rows].
void am_update(const Facts* facts, void* const* addresses, const GroupOptions* options,
               const Coefficients* coefficients, int64_t count, int path, int threads, Parallel parallel,
               const uint8_t* active) {
  const std::vector<Block> blocks = cut(facts, count, active);
  Work work{facts, addresses, options, coefficients, count, blocks.data(), int64_t(blocks.size()), nullptr, 0};
  run(work, path, threads, parallel);
}
}
