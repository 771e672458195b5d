// One AdamW step: bf16 parameter and gradient, float32 master weight and moments, 8 elements a thread in 16-byte pieces.
#include <cuda_bf16.h>
#include <stdint.h>

namespace optimizers {

struct Step {
  float lr, beta1, beta2, eps, weight_decay, correction1, correction2;  // corrections: 1 / (1 - beta^step)
};

__device__ __noinline__ float update(float w, float g, float& m, float& v, const Step& s) {
  m = s.beta1 * m + (1.f - s.beta1) * g;
  v = s.beta2 * v + (1.f - s.beta2) * g * g;
  return w - s.lr * (m * s.correction1 / (sqrtf(v * s.correction2) + s.eps) + s.weight_decay * w);
}

__global__ void adamw(__nv_bfloat16* p, float* w, float* m, float* v, const __nv_bfloat16* g, int64_t n, Step step) {
  const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (first + 8 > n) {
    for (int64_t i = first; i < n; i++) {
      w[i] = update(w[i], __bfloat162float(g[i]), m[i], v[i], step);
      p[i] = __float2bfloat16(w[i]);
    }
    return;
  }
  uint4 gradients = *reinterpret_cast<const uint4*>(g + first), parameters;
  const __nv_bfloat16* gradient = reinterpret_cast<const __nv_bfloat16*>(&gradients);
  __nv_bfloat16* parameter = reinterpret_cast<__nv_bfloat16*>(&parameters);
  for (int half = 0; half < 8; half += 4) {
    float4 ws = *reinterpret_cast<float4*>(w + first + half), ms = *reinterpret_cast<float4*>(m + first + half),
           vs = *reinterpret_cast<float4*>(v + first + half);
    float *wi = &ws.x, *mi = &ms.x, *vi = &vs.x;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      wi[i] = update(wi[i], __bfloat162float(gradient[half + i]), mi[i], vi[i], step);
      parameter[half + i] = __float2bfloat16(wi[i]);
    }
    *reinterpret_cast<float4*>(w + first + half) = ws;
    *reinterpret_cast<float4*>(m + first + half) = ms;
    *reinterpret_cast<float4*>(v + first + half) = vs;
  }
  *reinterpret_cast<uint4*>(p + first) = parameters;
}

}  // namespace optimizers
