#include "common/simd.h"

#include <atomic>
#include <stdexcept>

namespace hotloop {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
std::atomic<int> forced{-1};

bool has(InstructionSet set) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2");
  if (set == InstructionSet::avx2) return avx2;
  if (set == InstructionSet::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return set == InstructionSet::baseline;
}

}  // namespace

InstructionSet instruction_set() {
  if (forced >= 0) return static_cast<InstructionSet>(forced.load());
  static const InstructionSet widest = has(InstructionSet::avx512) ? InstructionSet::avx512
                                       : has(InstructionSet::avx2) ? InstructionSet::avx2
                                                                   : InstructionSet::baseline;
  return widest;
}

void force_instruction_set(const std::string& name) {
  if (name.empty()) {
    forced = -1;
    return;
  }
  for (int i = 0; i < 3; ++i) {
    if (name != kNames[i]) continue;
    if (!has(static_cast<InstructionSet>(i))) throw std::invalid_argument("this CPU has no " + name);
    forced = i;
    return;
  }
  throw std::invalid_argument("instruction set '" + name + "': expected 'baseline', 'avx2', 'avx512' or ''");
}

}  // namespace hotloop
