#include "attention/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "attention/plan.h"
#include "common/targets.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace hotloop::attention {

// What is compiled for each instruction set.
struct Kernels {
  void (*pack)(const Call&, const Segment&, int64_t head, int64_t block, const PackedKeys&);
  void (*forward)(const Call&, const Task&, const PackedKeys&, float* scratch);
  void (*backward)(const Call&, const Task&, float* scratch, float* dalibi);
  void (*sum)(const Call&, const Task&);
  int64_t (*forward_scratch)(const Call&);
  int64_t (*backward_scratch)(const Call&);
};

#define HOTLOOP_KERNELS "attention/kernels.inl"
#include "common/each_target.inl"

#if defined(__x86_64__)
#define HOTLOOP_SIMD_WIDTH 16
#define HOTLOOP_BF16
HOTLOOP_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
HOTLOOP_CONTRACT
namespace avx512_bf16 {
#include "attention/kernels.inl"
}
HOTLOOP_TARGET_END
#undef HOTLOOP_BF16
#undef HOTLOOP_SIMD_WIDTH
#endif

namespace {

Kernels kernels_for(DType dtype) {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512_bf16 && dtype == DType::bf16) return avx512_bf16::kernels(dtype);
  if (instruction_set() >= InstructionSet::avx512) return avx512::kernels(dtype);
  if (instruction_set() == InstructionSet::avx2) return avx2::kernels(dtype);
#endif
  return baseline::kernels(dtype);
}

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Gives out the workspace, counting where there is none.
struct Arena {
  float* room;
  int64_t size = 0;
  float* take(int64_t floats) {
    float* at = room == nullptr ? nullptr : room + size;
    size += round_up(floats, WIDEST);
    return at;
  }
};

// Whether a thread takes all queries of a group, so that its keys stay in the thread's cache.
bool by_groups(const Call& c, int threads) { return int64_t(c.groups.size()) >= 8 * threads; }

PackedKeys take_keys(const Call& c, Arena& arena, int64_t blocks) {
  float* k = arena.take(blocks * BLOCK_K * c.problem.D);
  return {k, arena.take(blocks * BLOCK_K * c.Dp)};
}

int64_t place_forward(Call& c, const Kernels& kernels, float* room, int threads) {
  Arena arena{room};
  if (!by_groups(c, threads)) c.keys = take_keys(c, arena, c.problem.Hk * c.key_blocks);
  Arena own{nullptr};
  if (by_groups(c, threads)) take_keys(c, own, round_up(c.longest_k, BLOCK_K) / BLOCK_K);
  own.take(kernels.forward_scratch(c));
  c.scratch_size = own.size;
  c.scratch = arena.take(threads * c.scratch_size);
  return arena.size;
}

int64_t place_backward(Call& c, const Kernels& kernels, float* room, int threads) {
  Arena arena{room};
  if (c.chunks > 1) c.partial_dq = arena.take(c.chunks * c.lse_size * c.Dp);
  c.partial_dalibi = arena.take(int64_t(c.key_tasks.size()) * c.group());
  c.scratch_size = round_up(kernels.backward_scratch(c), WIDEST);
  c.scratch = arena.take(threads * c.scratch_size);
  return arena.size;
}

template <class Each>
void in_parallel(int64_t n, int threads, Each each) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (n > 1 && threads > 1)
  for (int64_t i = 0; i < n; ++i) each(i);
}

// Positions of a packed result (positions, rest) that belong to no segment.
void clear_tail(int64_t address, int64_t cu, int64_t segments, int64_t positions, int64_t bytes) {
  if (address == 0 || cu == 0) return;
  const int64_t end = reinterpret_cast<const int32_t*>(cu)[segments];
  std::memset(reinterpret_cast<char*>(address) + end * bytes, 0, (positions - end) * bytes);
}

}  // namespace

int64_t forward_workspace(const Problem& p, int threads) {
  Call c(p, {});
  return place_forward(c, kernels_for(p.dtype), nullptr, threads) * sizeof(float);
}

int64_t backward_workspace(const Problem& p, int threads) {
  Call c(p, {});
  return place_backward(c, kernels_for(p.dtype), nullptr, threads) * sizeof(float);
}

void forward(const Problem& p, const Numbers& numbers, void* workspace, int threads) {
  Call c(p, numbers);
  const Kernels kernels = kernels_for(p.dtype);
  place_forward(c, kernels, static_cast<float*>(workspace), threads);
  if (by_groups(c, threads)) {
    in_parallel(c.groups.size(), threads, [&](int64_t i) {
      const Group& group = c.groups[i];
      Arena arena{c.scratch + thread() * c.scratch_size};
      const PackedKeys keys = take_keys(c, arena, round_up(c.longest_k, BLOCK_K) / BLOCK_K);
      float* scratch = arena.take(0);
      for (int64_t block = 0; block * BLOCK_K < group.segment->nk; ++block)
        kernels.pack(c, *group.segment, group.head, block, keys);
      for (int64_t task = group.first_task; task < group.first_task + group.tasks; ++task)
        kernels.forward(c, c.query_tasks[task], keys, scratch);
    });
  } else {
    struct Block {
      const Group* group;
      int64_t block;
    };
    std::vector<Block> blocks;
    for (const Group& group : c.groups)
      for (int64_t block = 0; block * BLOCK_K < group.segment->nk; ++block) blocks.push_back({&group, block});
    const auto keys_of = [&](const Segment& s, int64_t hk) -> PackedKeys {
      const int64_t at = (hk * c.key_blocks + s.key_block) * BLOCK_K;
      return {c.keys.k + at * p.D, c.keys.v + at * c.Dp};
    };
    in_parallel(blocks.size(), threads, [&](int64_t i) {
      const auto [group, block] = blocks[i];
      kernels.pack(c, *group->segment, group->head, block, keys_of(*group->segment, group->head));
    });
    in_parallel(c.query_tasks.size(), threads, [&](int64_t i) {
      const Task& task = c.query_tasks[i];
      kernels.forward(c, task, keys_of(*task.segment, task.head / c.group()), c.scratch + thread() * c.scratch_size);
    });
  }
  clear_tail(p.o, p.cu_q, p.segments, p.Tq, p.Hq * p.D * size_of(p.dtype));
  if (p.cu_q) {
    const int64_t end = reinterpret_cast<const int32_t*>(p.cu_q)[p.segments];
    for (int64_t h = 0; h < p.Hq; ++h)
      for (int64_t i = end; i < p.Tq; ++i) reinterpret_cast<float*>(p.lse)[h * p.Tq + i] = -INFINITY;
  }
}

void backward(const Problem& p, const Gradients& gradients, const Numbers& numbers, void* workspace, int threads) {
  Call c(p, numbers);
  c.gradients = gradients;
  const Kernels kernels = kernels_for(p.dtype);
  place_backward(c, kernels, static_cast<float*>(workspace), threads);
  const int64_t queries = c.query_tasks.size(), keys = c.key_tasks.size();
  auto* dalibi = reinterpret_cast<float*>(gradients.dalibi_slopes);
  auto* dsinks = reinterpret_cast<float*>(gradients.dsinks);
  for (float* x : {dalibi, dsinks})
    if (x != nullptr) std::memset(x, 0, p.segments * p.Hq * sizeof(float));
  in_parallel(keys, threads, [&](int64_t i) {
    kernels.backward(c, c.key_tasks[i], c.scratch + thread() * c.scratch_size, c.partial_dalibi + i * c.group());
  });
  if (gradients.dq && c.partial_dq) in_parallel(queries, threads, [&](int64_t i) { kernels.sum(c, c.query_tasks[i]); });
  const int64_t bytes = p.D * size_of(p.dtype);
  clear_tail(gradients.dq, p.cu_q, p.segments, p.Tq, p.Hq * bytes);
  clear_tail(gradients.dk, p.cu_k, p.segments, p.Tk, p.Hk * bytes);
  clear_tail(gradients.dv, p.cu_k, p.segments, p.Tk, p.Hk * bytes);
  for (int64_t i = 0; dalibi != nullptr && i < keys; ++i)
    for (int64_t g = 0; g < c.group(); ++g) {
      const Task& task = c.key_tasks[i];
      dalibi[task.segment->ordinal * p.Hq + task.head * c.group() + g] += c.partial_dalibi[i * c.group() + g];
    }
}

}  // namespace hotloop::attention
