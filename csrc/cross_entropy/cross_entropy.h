// Cross entropy of rows of logits on the CPU. The formula and its letters: kernels/cross_entropy/contract.py.
#pragma once

#include <cstdint>

namespace hotloop {

enum class DType { f32, bf16, f16 };

struct LossOptions {
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap /* 0: none */, logit_scale;
};

// Results of rows, and their gradient where `out` is given: one pass over memory, the others in cache.
struct Rows {
  int64_t n, v;
  DType dtype;
  const void* logits;     // (n, v) raw
  int64_t logits_stride;  // elements from row to row
  const int64_t* target;  // (n,)
  const float* weight;    // (v,) or null
  const float* token_weight;  // (n,) or null
  LossOptions options;
  float weight_sum;  // of class weights; v without
  // Results; null: not wanted.
  float *loss, *nll, *lse, *entropy;  // (n,)
  int64_t* predicted;                 // (n,)
  // Gradient of sum(dloss * loss) with respect to the raw logits; null: not wanted. May be `logits`.
  void* out;
  int64_t out_stride;
  const float* dloss;    // (n,)
  int64_t dloss_stride;  // 0: one number for all rows
};

// The gradient of a tile of the vocabulary, written over its raw logits.
struct Columns {
  int64_t n, width, first;  // `first`: column of the vocabulary in column 0
  DType dtype;
  void* logits;  // (n, width)
  int64_t logits_stride;
  const int64_t* target;  // (n,)
  const float *a, *b, *c, *dentropy;  // (n,) factors; c and dentropy may be null; 0 in ignored rows
  const float* weight;                // (width,) the tile's part, or null
  const float *lse, *entropy;         // (n,); entropy null where dentropy is
  LossOptions options;
};

void cross_entropy_rows(const Rows& arguments, int threads);
void cross_entropy_columns(const Columns& arguments, int threads);

}  // namespace hotloop
