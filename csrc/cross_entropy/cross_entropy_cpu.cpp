#include "cross_entropy/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "common/targets.h"

namespace hotloop {

namespace {
// Bytes of the longest row that is fetched ahead: it, the row before and that one's gradient share a megabyte of cache.
constexpr int64_t FETCHED_ROW = 256 << 10;
}  // namespace

#define HOTLOOP_KERNELS "cross_entropy/rows.inl"
#include "common/each_target.inl"

namespace {

constexpr int64_t ELEMENTS_AT_ONCE = 1 << 15;  // of rows that a thread takes together, at least
constexpr int64_t ROWS_AT_ONCE = 16;           // at most, for their length; and no thread waits for a long last part

// kernel(arguments, begin, end) over all rows, by whichever thread is free
template <class Arguments>
void over_rows(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& a, int64_t width, int threads) {
  const int64_t few = std::max<int64_t>(1, ELEMENTS_AT_ONCE / std::max<int64_t>(1, width));
  const int64_t step = std::max(few, std::min(ROWS_AT_ONCE, a.n / (8 * std::max(threads, 1))));
  const int64_t parts = (a.n + step - 1) / step;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (parts > 1 && threads > 1)
  for (int64_t part = 0; part < parts; ++part) kernel(a, part * step, std::min(a.n, (part + 1) * step));
}

}  // namespace

void cross_entropy_rows(const Rows& a, int threads) {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::avx512_bf16:
    case InstructionSet::avx512: return over_rows(avx512::rows_of, a, a.v, threads);
    case InstructionSet::avx2: return over_rows(avx2::rows_of, a, a.v, threads);
#endif
    default: return over_rows(baseline::rows_of, a, a.v, threads);
  }
}

void cross_entropy_columns(const Columns& a, int threads) {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::avx512_bf16:
    case InstructionSet::avx512: return over_rows(avx512::columns_of, a, a.width, threads);
    case InstructionSet::avx2: return over_rows(avx2::columns_of, a, a.width, threads);
#endif
    default: return over_rows(baseline::columns_of, a, a.width, threads);
  }
}

}  // namespace hotloop
