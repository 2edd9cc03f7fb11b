// Elements of the three storage types as fp32 values, and pairs of them stored by one instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "perceiver/params.h"

namespace perceiver {

template <ElementType kType>
struct ElementOf;
template <>
struct ElementOf<ElementType::kFloat32> {
  using Type = float;
};
template <>
struct ElementOf<ElementType::kFloat16> {
  using Type = __half;
};
template <>
struct ElementOf<ElementType::kBFloat16> {
  using Type = __nv_bfloat16;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class Element>
__device__ __forceinline__ Element from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Two neighbouring elements, on as many bytes as they have.
__device__ __forceinline__ float2 load_pair(const float* pair) { return *reinterpret_cast<const float2*>(pair); }
__device__ __forceinline__ float2 load_pair(const __half* pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(pair));
}
__device__ __forceinline__ float2 load_pair(const __nv_bfloat16* pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(pair));
}

__device__ __forceinline__ void store_pair(float* out, float first, float second) {
  *reinterpret_cast<float2*>(out) = make_float2(first, second);
}
__device__ __forceinline__ void store_pair(__half* out, float first, float second) {
  *reinterpret_cast<__half2*>(out) = __floats2half2_rn(first, second);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* out, float first, float second) {
  *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(first, second);
}

// Two values as one register of 16-bit elements, the first in the low half.
template <class Element>
__device__ __forceinline__ uint32_t packed_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t packed_pair<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t packed_pair<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class Element>
__device__ __forceinline__ float2 unpacked_pair(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpacked_pair<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}
template <>
__device__ __forceinline__ float2 unpacked_pair<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// log2 x with an absolute error of 2^-22, of normal numbers.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 ulp, of normal numbers.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x to 2 ulp, 0 below the normal numbers.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace perceiver
