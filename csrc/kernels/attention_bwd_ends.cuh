// What attention's backward starts from, and what it leaves: lse and delta of every row, and dq from its parts.
#pragma once

#include "kernels/attention_bwd.cuh"

namespace perceiver {

constexpr int kRowThreads = 256, kRowsInFlight = 4;

// rows = (lse log2(e), dout . out - dlse) in whole blocks of queries. A row that saw nothing, and one that does not exist, has
// lse +inf: its weights are 0.
//
// Work: a block per block of queries; 8 columns a thread. Device memory: 4 B H Lq d bytes.
template <class Element, class Shape>
__global__ void __launch_bounds__(kRowThreads) attention_bwd_rows_kernel(const AttentionBackwardParams params) {
  constexpr int kLanes = Shape::kColumns / 8, kGroups = kRowThreads / kLanes;
  static_assert(kGroups * kRowsInFlight == Shape::kBlockQ, "a block takes one block of queries");
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, flat_head = blockIdx.x / params.query_blocks;
  const int first = blockIdx.x % params.query_blocks * Shape::kBlockQ + group;
  const int entry = flat_head / params.heads, head = flat_head % params.heads;
  const auto* gOut = static_cast<const Element*>(params.out) + entry * params.stride_out_batch + head * params.stride_out_head;
  const auto* gDout =
      static_cast<const Element*>(params.dout) + entry * params.stride_dout_batch + head * params.stride_dout_head;
  uint4 out[kRowsInFlight], dout[kRowsInFlight];
#pragma unroll
  for (int i = 0; i < kRowsInFlight; ++i) {
    const int row = first + i * kGroups;
    const bool exists = row < params.queries && 8 * lane < params.channels_v;
    out[i] = exists ? *reinterpret_cast<const uint4*>(gOut + row * params.stride_out_row + 8 * lane) : uint4{};
    dout[i] = exists ? *reinterpret_cast<const uint4*>(gDout + row * params.stride_dout_row + 8 * lane) : uint4{};
  }
#pragma unroll
  for (int i = 0; i < kRowsInFlight; ++i) {
    const auto* a = reinterpret_cast<const Element*>(&out[i]);
    const auto* b = reinterpret_cast<const Element*>(&dout[i]);
    float product = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) product = fmaf(to_float(a[j]), to_float(b[j]), product);
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) product += __shfl_xor_sync(0xffffffffu, product, distance);
    const int row = first + i * kGroups;
    if (lane != 0) continue;
    float lse = INFINITY;
    if (row < params.queries) {
      const int64_t flat_row = int64_t{flat_head} * params.queries + row;
      const float natural = params.lse[flat_row];
      if (natural != -INFINITY) lse = natural * kLog2E;
      if (params.dlse != nullptr) product -= params.dlse[flat_row];
    }
    float* gRow = params.rows + int64_t{blockIdx.x} * 2 * Shape::kBlockQ + row % Shape::kBlockQ;
    gRow[0] = lse;
    gRow[Shape::kBlockQ] = product;
  }
}

// dq of split keys: scale times the sum of its parts, in their order.
//
// Work: a block of 128 threads, as one warpgroup of the backward, per block of queries.
template <class Element, class Shape>
__global__ void __launch_bounds__(kWarpgroup) attention_bwd_dq_kernel(const AttentionBackwardParams params) {
  const int flat_block = blockIdx.x / kConsumers, warpgroup = blockIdx.x % kConsumers;
  const int flat_head = flat_block / params.query_blocks;
  const int64_t block_floats = kConsumers * Shape::kDqFloats;
  const int64_t part_floats = int64_t{params.batch} * params.heads * params.query_blocks * block_floats;
  const float* gPart = params.dq_parts + flat_block * block_floats + warpgroup * Shape::kDqFloats + threadIdx.x * 4;
  float sums[Shape::kDqSums] = {};
#pragma unroll 4
  for (int part = 0; part < params.splits; ++part, gPart += part_floats) {
#pragma unroll
    for (int i = 0; i < Shape::kDqSums; i += 4) {
      const float4 sum = *reinterpret_cast<const float4*>(gPart + i * kWarpgroup);
      sums[i] += sum.x;
      sums[i + 1] += sum.y;
      sums[i + 2] += sum.z;
      sums[i + 3] += sum.w;
    }
  }
  const int row = flat_block % params.query_blocks * Shape::kBlockQ + (Shape::kDqByRows ? 64 * warpgroup : 0) +
                  threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const float scale[2] = {params.scale, params.scale};
  const bool exists[2] = {row < params.queries, row + 8 < params.queries};
  store_sums(static_cast<Element*>(params.dq) + flat_head / params.heads * params.stride_dq_batch +
                 flat_head % params.heads * params.stride_dq_head + row * params.stride_dq_row,
             params.stride_dq_row, sums, scale, exists, Shape::kDqByRows ? 0 : 64 * warpgroup, params.channels_qk);
}

}  // namespace perceiver
