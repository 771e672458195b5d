// Launches of elementwise.cu. Addresses are of device memory; nothing waits for the device.
#pragma once

#include <cstdint>

namespace hotloop::optimizers {

constexpr int CHUNK = 65'536, BLOCKS_OF_A_CHUNK = 256;
constexpr int UPDATE_THREADS = 256, SUM_THREADS = 256;

// kernels/optimizers/cuda.py packs it.
struct Options {
  int32_t rule, param, grad, moment;  // Rule and Type of elementwise.h
  int32_t n_moments, stochastic, maximize, nesterov;
  float constants[5];  // as those of Update in elementwise.h
  uint64_t seed;
};

void launch_update(const int64_t* table, const int64_t* chunks, int grid, const float* scalars, const float* factor,
                   const float* skip, const float* step, const Options& options, void* stream);
// The result is in sums[0]; `arrived` is 0 before and after.
void launch_sum_of_squares(const int64_t* table, const int64_t* chunks, double* sums, int* arrived, int count,
                           void* stream);

}  // namespace hotloop::optimizers
