// What a product's results go through before they are stored: activation, rounding, and lanes that trade pairs of them.
#pragma once

// Divisions are the reciprocal's: within a few last places of float32, and zero beyond 2^126, which is right here.
// 1: silu, 2: gelu, 3: gelu_tanh, 4: relu
template <int KIND> __device__ __forceinline__ float activated(float x) {
  if constexpr (KIND == 1) return __fdividef(x, 1.0f + __expf(-x));
  if constexpr (KIND == 2) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  if constexpr (KIND == 3) return __fdividef(x, 1.0f + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
  return fmaxf(x, 0.0f);
}

template <bool IS_BF16> __device__ __forceinline__ u32 rounded_pair(float low, float high) {
  u32 both;
  if constexpr (IS_BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <bool IS_BF16> __device__ __forceinline__ float widened(u16 bits) {
  if constexpr (IS_BF16) return __uint_as_float(static_cast<u32>(bits) << 16);
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// A matrix of 8 x 8 halves, of which each lane holds a pair (row: lane / 4), comes out with rows and columns exchanged.
__device__ __forceinline__ u32 transposed(u32 pair) {
  u32 out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

// Four lanes hold a pair each of four runs of eight numbers; afterwards each holds one run whole.
__device__ __forceinline__ void trade_runs(u32 (&p)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 got = __shfl_xor_sync(~0u, odd ? p[i] : p[i + 1], 1);
    (odd ? p[i] : p[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 got = __shfl_xor_sync(~0u, high ? p[i] : p[i + 2], 2);
    (high ? p[i] : p[i + 2]) = got;
  }
}
