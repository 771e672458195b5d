// The element-wise optimizers on the CPU: one call updates a list of tensors. The arithmetic is that of
// kernels/optimizers/reference.py, to the bit.
#pragma once

#include <cstdint>
#include <vector>

namespace hotloop::optimizers {

constexpr int kBlock = 256;     // elements that are updated at a time, and that share the scale of 8-bit moments
constexpr int kChunk = 65'536;  // elements that a thread takes at a time
constexpr int kRun = 4096;      // elements whose squares are summed in one go
constexpr int kLanes = 64;

enum class Rule : int { adamw, lion, sgd };
enum class Type : int { fp32, bf16, uint8 };

// One parameter: addresses (0: there is none), then sizes. In the order of the columns in kernels/optimizers/cpu.py.
struct Tensor {
  int64_t param, master, grad, moments[2], scales[2];
  int64_t numel;
  int64_t row;    // elements after which a block of 8-bit moments ends; numel where moments are not 8-bit
  int64_t start;  // logical index of the first element, for random bits
};

struct Update {
  Rule rule;
  Type param, grad, moment;
  int n_moments;
  bool stochastic, maximize, nesterov;
  uint64_t seed;
  uint32_t step;
  float factor;
  float scalars[3];    // adamw: decay, step_size, eps; lion: decay, lr; sgd: lr
  float constants[4];  // adamw and lion: beta1, 1 - beta1, beta2, 1 - beta2; sgd: momentum, decay
  uint64_t keys[10][2];  // of Philox's rounds; `update` fills them in from the seed
};

// What is compiled for each instruction set.
struct Kernels {
  // Blocks [first, last) of a tensor, counted row by row.
  void (*update)(const Update&, const Tensor&, int64_t first, int64_t last);
  // Sum of squares of up to kChunk elements, see `sum_of_squares` in reference.py.
  double (*sum_of_squares)(Type, int64_t grad, int64_t begin, int64_t count);
};

void update(Update update, const std::vector<int64_t>& table, int threads);
double sum_of_squares(const std::vector<int64_t>& table, int threads);  // rows of (address, elements, type)

}  // namespace hotloop::optimizers
