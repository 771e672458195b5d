// Code that is compiled once for each instruction set, and the choice between them at run time.
//
// A kernel is written as plain loops in an .inc file, which one .cpp for each instruction set includes between
// HOTLOOP_TARGET_... and HOTLOOP_TARGET_END: the compiler vectorises the same source for each. Every operation is an
// IEEE one, contraction is off, so all of them give the same bits. All headers are included before the target begins:
// an inline function of the standard library compiled for AVX-512 could replace everybody's.
#pragma once

#include <string>

namespace hotloop {

enum class InstructionSet { baseline, avx2, avx512 };

// The widest that this CPU has, or the one that is forced.
InstructionSet instruction_set();

// "baseline", "avx2", "avx512", or "" to lift it. Throws std::invalid_argument for one that this CPU lacks.
void force_instruction_set(const std::string& name);

}  // namespace hotloop

#define HOTLOOP_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define HOTLOOP_TARGET(features, width) \
  HOTLOOP_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define HOTLOOP_TARGET_END HOTLOOP_PRAGMA(clang attribute pop)
#else
#define HOTLOOP_TARGET(features, width) HOTLOOP_PRAGMA(GCC push_options) HOTLOOP_PRAGMA(GCC target(features width))
#define HOTLOOP_TARGET_END HOTLOOP_PRAGMA(GCC pop_options)
#endif
