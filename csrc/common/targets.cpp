#include "common/targets.h"

#include <stdexcept>

namespace hotloop {
namespace {

InstructionSet best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return __builtin_cpu_supports("avx512bf16") ? InstructionSet::avx512_bf16 : InstructionSet::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

InstructionSet chosen = best();

}  // namespace

InstructionSet instruction_set() { return chosen; }

void force_instruction_set(const std::string& name) {
  const InstructionSet has = best();
  InstructionSet asked = has;
  if (name == "baseline") asked = InstructionSet::baseline;
  else if (name == "avx2") asked = InstructionSet::avx2;
  else if (name == "avx512") asked = InstructionSet::avx512;
  else if (name == "avx512_bf16") asked = InstructionSet::avx512_bf16;
  else if (!name.empty())
    throw std::invalid_argument("instruction set '" + name + "': expected baseline, avx2, avx512 or avx512_bf16");
  if (asked > has) throw std::invalid_argument("instruction set '" + name + "': this CPU lacks it");
  chosen = asked;
}

}  // namespace hotloop
