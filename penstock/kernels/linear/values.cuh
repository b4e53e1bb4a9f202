// What a product's results go through before they are stored: bias, activation, rounding, and lanes that trade pairs.
#pragma once

#define IS_bf16 1
#define IS_f16 2
constexpr bool BF16 = JOIN(IS_, FORMAT) == 1;  // FORMAT: bf16 or f16, of whoever includes this

// Divisions are the reciprocal's: within a few last places of float32, and zero beyond 2^126, which is right here.
// 0: none, 1: silu, 2: gelu, 3: gelu_tanh, 4: relu, 5: relu2, 6: gelu_quick
// x times the normal distribution's share below it, to 1.5e-7 (Abramowitz and Stegun 7.1.26): without erff's branches.
__device__ __forceinline__ float gelu(float x) {
  const float u = fabsf(x) * 0.7071067811865476f, t = __fdividef(1.0f, 1.0f + 0.3275911f * u);
  const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float above = 0.5f * p * __expf(-u * u);
  return x * (x > 0.0f ? 1.0f - above : above);
}

template <int KIND> __device__ __forceinline__ float activated(float x) {
  if constexpr (KIND == 0) return x;
  if constexpr (KIND == 1) return __fdividef(x, 1.0f + __expf(-x));
  if constexpr (KIND == 2) return gelu(x);
  if constexpr (KIND == 3) return __fdividef(x, 1.0f + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
  if constexpr (KIND == 6) return __fdividef(x, 1.0f + __expf(-1.702f * x));
  float y;  // not fmaxf, which makes zero of what is not a number
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return KIND == 5 ? y * y : y;
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

// Two numbers that were rounded together.
__device__ __forceinline__ float2 opened(u32 both) {
  return make_float2(widened<BF16>(static_cast<u16>(both)), widened<BF16>(static_cast<u16>(both >> 16)));
}

// Of COUNT numbers of BIAS_BYTES each (2: FORMAT, 4: float32; 0: there are none).
template <int COUNT> __device__ __forceinline__ float bias_at(const void* bias, int n) {
  if constexpr (BIAS_BYTES == 0) return 0.0f;
  if (n >= COUNT) return 0.0f;
  if constexpr (BIAS_BYTES == 4) return static_cast<const float*>(bias)[n];
  return widened<BF16>(static_cast<const u16*>(bias)[n]);
}

// The sum over the four lanes that share a row.
__device__ __forceinline__ float across_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
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

// Of a thread's first VALUES sums, in runs of four (two in its row, two in that `below`): those of four runs from `run`
// on, rounded and traded, so that each lane holds eight neighbours of one run. Runs beyond the last are zero.
template <int VALUES, int ALL>
__device__ __forceinline__ void traded_runs(const float (&d)[ALL], int run, int below, u32 (&p)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = 4 * (run + i) + 2 * below;
    p[i] = run + i < VALUES / 4 ? rounded_pair<BF16>(d[at < VALUES ? at : 0], d[at < VALUES ? at + 1 : 0]) : 0;
  }
  trade_runs(p);
}
