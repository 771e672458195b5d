// Compiling one source for several instruction sets, and choosing between them at run time.
#pragma once

#include <string>

#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 says it of its own header, bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

// All headers are included before a target begins: an inline function of the standard library that was compiled for
// AVX-512 could replace everybody's. HOTLOOP_CONTRACT after the beginning lets products and sums become fma.
#define HOTLOOP_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define HOTLOOP_TARGET_BEGIN(isa) HOTLOOP_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define HOTLOOP_TARGET_END _Pragma("clang attribute pop")
#define HOTLOOP_CONTRACT
#define HOTLOOP_WIDE ""
#else
#define HOTLOOP_TARGET_BEGIN(isa) _Pragma("GCC push_options") HOTLOOP_PRAGMA(GCC target(isa))
#define HOTLOOP_TARGET_END _Pragma("GCC pop_options")
#define HOTLOOP_CONTRACT _Pragma("GCC optimize(\"fp-contract=fast\")")
#define HOTLOOP_WIDE ",prefer-vector-width=512"  // for loops that the compiler vectorises
#endif

namespace hotloop {

// Each has what the ones before it have.
enum class InstructionSet { baseline, avx2, avx512, avx512_bf16 };

// The best that this CPU has, or the one that was forced.
InstructionSet instruction_set();

// "baseline", "avx2", "avx512", "avx512_bf16", or "" for the best. Raises std::invalid_argument for one that this CPU
// lacks. For tests.
void force_instruction_set(const std::string& name);

}  // namespace hotloop
