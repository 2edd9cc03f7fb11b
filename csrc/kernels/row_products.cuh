// delta = dz . z - dlse of every row, which the gradients of shared-KV attention start from.
//
// Work: a warp a row, 4 columns a lane and step, one order of the sum. Device memory: 6 B R C bytes. On any GPU.
#pragma once

#include "perceiver/device/element.cuh"
#include "perceiver/params.h"

namespace perceiver {

constexpr int kRowProductThreads = 128;

template <class Element>
__global__ void __launch_bounds__(kRowProductThreads) row_products_kernel(const RowProductsParams params) {
  const int lane = threadIdx.x % 32;
  const int64_t flat_row = (int64_t{blockIdx.x} * kRowProductThreads + threadIdx.x) / 32;
  if (flat_row >= int64_t{params.batch} * params.rows) return;
  const int64_t entry = flat_row / params.rows, row = flat_row % params.rows;
  const auto* gDz = static_cast<const Element*>(params.dz) + entry * params.stride_dz_batch + row * params.stride_dz_row;
  const float* gZ = params.z + flat_row * params.channels;
  float product = 0.0f;
#pragma unroll 4
  for (int column = 4 * lane; column < params.channels; column += 128) {
    const float4 z = *reinterpret_cast<const float4*>(gZ + column);
    const uint2 pairs = *reinterpret_cast<const uint2*>(gDz + column);
    const float2 first = unpacked_pair<Element>(pairs.x), second = unpacked_pair<Element>(pairs.y);
    product = fmaf(first.x, z.x, fmaf(first.y, z.y, fmaf(second.x, z.z, fmaf(second.y, z.w, product))));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) product += __shfl_xor_sync(0xffffffffu, product, distance);
  if (lane != 0) return;
  params.delta[flat_row] = params.dlse == nullptr ? product : product - params.dlse[flat_row];
}

}  // namespace perceiver
