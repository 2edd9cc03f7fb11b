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
  int parts = params.splits;
  if (params.balanced_tiles > 0) {
    // Of the blocks that have tiles of the head.
    const KeyTiles tiles(params);
    const int key_heads = params.heads / params.heads_per_key_head;
    const uint32_t line = flat_head / params.heads * key_heads + flat_head % params.heads / params.heads_per_key_head;
    parts = tiles.block_of((line + 1) * tiles.of_head - 1) - tiles.block_of(line * tiles.of_head) + 1;
  }
#pragma unroll 4
  for (int part = 0; part < parts; ++part, gPart += part_floats) {
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

// out [entries, heads, rows, channels] = factor times the sum of its parts [entries x heads, parts, rows, kColumns], in their
// order. A thread has four columns of a row.
template <class Out, int kColumns>
__global__ void __launch_bounds__(kRowThreads)
    attention_bwd_sum_kernel(const float* gParts, int parts, int64_t lead_pitch, int64_t leads, int heads, int64_t rows,
                             int channels, Out* gOut, int64_t batch_pitch, int64_t head_pitch, int64_t row_pitch, float factor) {
  constexpr int kVectors = kColumns / 4;
  const int64_t index = int64_t{blockIdx.x} * (kRowThreads / kVectors) + threadIdx.x / kVectors, row = index % rows;
  const int lead = static_cast<int>(index / rows), column = threadIdx.x % kVectors * 4;
  if (column >= channels || index >= leads * rows) return;
  const float* gPart = gParts + lead * lead_pitch + row * kColumns + column;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
  for (int part = 0; part < parts; ++part) {
    const float4 value = *reinterpret_cast<const float4*>(gPart + part * rows * kColumns);
    sum.x += value.x;
    sum.y += value.y;
    sum.z += value.z;
    sum.w += value.w;
  }
  Out* gRow = gOut + lead / heads * batch_pitch + lead % heads * head_pitch + row * row_pitch + column;
  store_pair(gRow, factor * sum.x, factor * sum.y);
  store_pair(gRow + 2, factor * sum.z, factor * sum.w);
}

inline int ceil_div(int64_t value, int64_t divisor) { return static_cast<int>((value + divisor - 1) / divisor); }

template <class Element, int kColumns>
void sum_parts(const AttentionBackwardParams& params, const float* gParts, int parts, int64_t lead_pitch, int heads, int64_t rows,
               int channels, void* out, int64_t batch_pitch, int64_t head_pitch, int64_t row_pitch, float factor) {
  const int64_t leads = int64_t{params.batch} * heads;
  const int blocks = ceil_div(leads * rows, kRowThreads / (kColumns / 4));
  attention_bwd_sum_kernel<Element, kColumns><<<blocks, kRowThreads, 0, static_cast<cudaStream_t>(params.stream)>>>(
      gParts, parts, lead_pitch, leads, heads, rows, channels, static_cast<Element*>(out), batch_pitch, head_pitch, row_pitch,
      factor);
}

// dk and dv of their slices.
template <class Element, int kColumns>
void sum_slices(const AttentionBackwardParams& params) {
  const int key_heads = params.heads / params.heads_per_key_head;
  const int64_t gradient_floats = int64_t{params.slices} * params.keys * kColumns;
  sum_parts<Element, kColumns>(params, params.key_parts, params.slices, 2 * gradient_floats, key_heads, params.keys,
                               params.channels_v, params.dv, params.stride_dv_batch, params.stride_dv_head,
                               params.stride_dv_row, 1.0f);
  sum_parts<Element, kColumns>(params, params.key_parts + gradient_floats, params.slices, 2 * gradient_floats, key_heads,
                               params.keys, params.channels_qk, params.dk, params.stride_dk_batch, params.stride_dk_head,
                               params.stride_dk_row, params.scale);
}

}  // namespace perceiver
