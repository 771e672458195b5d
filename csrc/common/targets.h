// Compiling one source for several instruction sets, and choosing between them at run time.
#pragma once

#include <string>

#if defined(__clang__)
#define HOTLOOP_PRAGMA(text) _Pragma(#text)
#define HOTLOOP_TARGET_BEGIN(isa) HOTLOOP_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define HOTLOOP_TARGET_END _Pragma("clang attribute pop")
#else
#define HOTLOOP_PRAGMA(text) _Pragma(#text)
#define HOTLOOP_TARGET_BEGIN(isa) \
  _Pragma("GCC push_options") HOTLOOP_PRAGMA(GCC target(isa)) _Pragma("GCC optimize(\"fp-contract=fast\")")
#define HOTLOOP_TARGET_END _Pragma("GCC pop_options")
#endif

namespace hotloop {

enum class InstructionSet { baseline, avx2, avx512 };

// The best that this CPU has, or the one that was forced.
InstructionSet instruction_set();

// "baseline", "avx2", "avx512", or "" for the best. Raises std::invalid_argument for one that this CPU lacks. For tests.
void force_instruction_set(const std::string& name);

}  // namespace hotloop
