// Elements of the three storage types as fp32 values, and pairs of them stored by one instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace perceiver {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void store_pair(float* out, float first, float second) {
  *reinterpret_cast<float2*>(out) = make_float2(first, second);
}
__device__ __forceinline__ void store_pair(__half* out, float first, float second) {
  *reinterpret_cast<__half2*>(out) = __floats2half2_rn(first, second);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* out, float first, float second) {
  *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(first, second);
}

}  // namespace perceiver
