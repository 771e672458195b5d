#include "optimizers/elementwise.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "common/targets.h"

// The compiler contracts nothing: all of them give the same bits.
namespace hotloop::optimizers {

#define HOTLOOP_CALLS 1  // of Philox in a vector of 64-bit lanes
namespace baseline {
#include "optimizers/elementwise.inl"
}
#undef HOTLOOP_CALLS

#if defined(__x86_64__)
HOTLOOP_TARGET_BEGIN("avx2,fma,f16c")
#define HOTLOOP_CALLS 4
namespace avx2 {
#include "optimizers/elementwise.inl"
}
#undef HOTLOOP_CALLS
HOTLOOP_TARGET_END

HOTLOOP_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,fma" HOTLOOP_WIDE)
#define HOTLOOP_CALLS 8
namespace avx512 {
#include "optimizers/elementwise.inl"
}
#undef HOTLOOP_CALLS
HOTLOOP_TARGET_END
#endif

namespace {

Kernels kernels() {
#if defined(__x86_64__)
  if (instruction_set() >= InstructionSet::avx512) return {avx512::update_blocks, avx512::chunk_sum};
  if (instruction_set() == InstructionSet::avx2) return {avx2::update_blocks, avx2::chunk_sum};
#endif
  return {baseline::update_blocks, baseline::chunk_sum};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void update(Update update, const std::vector<int64_t>& table, int threads) {
  for (uint32_t round = 0; round < 10; ++round) {
    update.keys[round][0] = static_cast<uint32_t>(update.seed) + round * 0x9E3779B9;
    update.keys[round][1] = static_cast<uint32_t>(update.seed >> 32) + round * 0xBB67AE85;
  }
  static_assert(sizeof(Tensor) == 10 * sizeof(int64_t));
  if (table.size() % 10 != 0) throw std::invalid_argument("the table has rows of 10 numbers");
  const Tensor* tensors = reinterpret_cast<const Tensor*>(table.data());
  struct Chunk {
    const Tensor* tensor;
    int64_t first, last;
  };
  std::vector<Chunk> chunks;
  constexpr int64_t step = kChunk / kBlock;
  for (const Tensor* t = tensors; t != tensors + table.size() / 10; ++t) {
    const int64_t blocks = t->numel / t->row * ceil_div(t->row, kBlock);
    for (int64_t first = 0; first < blocks; first += step)
      chunks.push_back({t, first, std::min(blocks, first + step)});
  }
  const auto run = kernels().update;
  const int64_t n = static_cast<int64_t>(chunks.size());
  // Threads take the next chunk when they are done: the machine's other work then delays one of them, not the step.
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) run(update, *chunks[i].tensor, chunks[i].first, chunks[i].last);
}

double sum_of_squares(const std::vector<int64_t>& table, int threads) {
  if (table.size() % 3 != 0) throw std::invalid_argument("the table has rows of 3 numbers");
  struct Chunk {
    int64_t grad, begin, count;
    Type type;
  };
  std::vector<Chunk> chunks;
  for (size_t row = 0; row < table.size(); row += 3)
    for (int64_t begin = 0; begin < table[row + 1]; begin += kChunk)
      chunks.push_back({table[row], begin, std::min<int64_t>(kChunk, table[row + 1] - begin),
                        static_cast<Type>(table[row + 2])});
  const int64_t n = static_cast<int64_t>(chunks.size());
  size_t width = 1;
  while (width < chunks.size()) width *= 2;
  std::vector<double> sums(width, 0.0);
  const auto run = kernels().sum_of_squares;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) sums[i] = run(chunks[i].type, chunks[i].grad, chunks[i].begin, chunks[i].count);
  for (width /= 2; width > 0; width /= 2)
    for (size_t i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

}  // namespace hotloop::optimizers
