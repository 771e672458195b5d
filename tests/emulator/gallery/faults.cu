// CUDA kernels with one planted fault each. A comment `fault:` marks the line that the report must name.

// Every thread sums what its whole warp has written to shared memory.
extern "C" __global__ void missing_syncwarp(const float* x, float* y) {
  __shared__ float row[64];
  row[threadIdx.x] = x[threadIdx.x];
  float sum = 0;
  for (int i = 0; i < 32; i++) sum += reinterpret_cast<volatile float*>(row)[threadIdx.x / 32 * 32 + i];  // fault: shared-race
  y[threadIdx.x] = sum;
}

extern "C" __global__ void missing_syncthreads(const float* x, float* y) {
  __shared__ float row[64];
  row[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = row[63 - threadIdx.x];  // fault: shared-race-between-warps
}

// 64 threads fill 64 places, 65 are used.
extern "C" __global__ void uninitialised(const float* x, float* y) {
  __shared__ float row[65];
  row[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = row[threadIdx.x + 1];  // fault: uninitialised
}

extern "C" __global__ void divergent_barrier(const float* x, float* y) {
  __shared__ float row[64];
  row[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x % 2) {
    __syncthreads();  // fault: divergent-barrier
    row[threadIdx.x] += row[threadIdx.x ^ 2];
  }
  __syncthreads();
  y[threadIdx.x] = row[threadIdx.x];
}

// The barrier is told of 96 threads, 64 come.
extern "C" __global__ void deadlock(const float* x, float* y) {
  __shared__ float row[64];
  row[threadIdx.x] = x[threadIdx.x];
  asm volatile("bar.sync 1, 96;" ::: "memory");  // fault: barrier-deadlock
  y[threadIdx.x] = row[63 - threadIdx.x];
}

extern "C" __global__ void past_the_end(const float* x, float* y) {
  y[blockIdx.x * blockDim.x + threadIdx.x] = x[threadIdx.x];  // fault: out-of-bounds
}

extern "C" __global__ void odd_start(const float* x, float* y, int start) {
  float4 four = *reinterpret_cast<const float4*>(x + start + threadIdx.x * 4);  // fault: misaligned
  y[threadIdx.x] = four.x + four.y + four.z + four.w;
}

extern "C" __global__ void last_writer(const float* x, float* y) {
  y[threadIdx.x / 4] = x[threadIdx.x];  // fault: conflicting-stores
}
