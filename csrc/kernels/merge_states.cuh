// Merges softmax states: lse = log sum_s exp(lse_s), z = sum_s exp(lse_s - lse) z_s; or adds parts of a sum up. In a fixed
// order.
//
// Work: a thread per four columns of a row and group of splits; the groups' sums meet in shared memory. Device memory:
// 4 B S R (C + 1) bytes read, B R C elements written. On any GPU.
#pragma once

#include "perceiver/device/element.cuh"
#include "perceiver/params.h"

namespace perceiver {

constexpr int kMergeThreads = 256;

// Four columns of a sum of states, each weighed with exp(lse - safe).
struct MergedColumns {
  float value[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  float total = 0.0f;

  // lse is subtracted before it is scaled: the largest weight is 1, not 1 and the rounding of lse log2(e).
  __device__ __forceinline__ void add(float lse, float safe, const float* gColumns) {
    const float weight = exp2f((lse - safe) * kLog2E);
    const float4 columns = *reinterpret_cast<const float4*>(gColumns);
    total += weight;
    value[0] = fmaf(weight, columns.x, value[0]);
    value[1] = fmaf(weight, columns.y, value[1]);
    value[2] = fmaf(weight, columns.z, value[2]);
    value[3] = fmaf(weight, columns.w, value[3]);
  }

  __device__ __forceinline__ void add(const float* gColumns) {
    const float4 columns = *reinterpret_cast<const float4*>(gColumns);
    value[0] += columns.x;
    value[1] += columns.y;
    value[2] += columns.z;
    value[3] += columns.w;
  }

  __device__ __forceinline__ void add(const MergedColumns& other) {
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] += other.value[i];
    total += other.total;
  }
};

// Of the parts group, group + kGroups, ... of a row's columns: states weighed with exp(lse - maximum), or sums.
template <int kGroups, bool kStates>
__device__ __forceinline__ MergedColumns merged_columns(const MergeStatesParams& params, int64_t flat_row, int column,
                                                        int group, float& maximum) {
  const int64_t first = flat_row / params.rows * params.splits * params.rows + flat_row % params.rows;
  MergedColumns sum;
  const float* gState = params.z_state == nullptr ? nullptr : params.z_state + flat_row * params.channels + column;
  if constexpr (!kStates) {
    if (gState != nullptr && group == 0) sum.add(gState);
#pragma unroll 4
    for (int split = group; split < params.splits; split += kGroups) {
      sum.add(params.z_part + (first + int64_t{split} * params.rows) * params.channels + column);
    }
    return sum;
  }
  if (params.lse_state != nullptr) maximum = params.lse_state[flat_row];
#pragma unroll 8
  for (int split = 0; split < params.splits; ++split) {
    maximum = fmaxf(maximum, params.lse_part[first + int64_t{split} * params.rows]);
  }
  const float safe = maximum == -INFINITY ? 0.0f : maximum;
  if (gState != nullptr && group == 0) sum.add(params.lse_state[flat_row], safe, gState);
#pragma unroll 4
  for (int split = group; split < params.splits; split += kGroups) {
    const int64_t part = first + int64_t{split} * params.rows;
    sum.add(params.lse_part[part], safe, params.z_part + part * params.channels + column);
  }
  return sum;
}

// kGroups threads share the splits of the same columns.
template <class Out, int kGroups, bool kStates>
__global__ void __launch_bounds__(kMergeThreads) merge_states_kernel(const MergeStatesParams params) {
  constexpr int kPlaces = kMergeThreads / kGroups;
  __shared__ MergedColumns sSums[kGroups > 1 ? kGroups - 1 : 1][kPlaces];
  const int place = threadIdx.x % kPlaces, group = threadIdx.x / kPlaces, vectors = params.channels / 4;
  const int64_t index = int64_t{blockIdx.x} * kPlaces + place;
  const int64_t flat_row = index / vectors, entry = flat_row / params.rows;
  const int column = static_cast<int>(index % vectors) * 4;
  const bool exists = entry < params.batch;
  MergedColumns sum;
  float maximum = -INFINITY;
  if (exists) sum = merged_columns<kGroups, kStates>(params, flat_row, column, group, maximum);
  if constexpr (kGroups > 1) {
    if (group > 0) sSums[group - 1][place] = sum;
    __syncthreads();
    if (group > 0) return;
    for (int other = 0; other < kGroups - 1; ++other) sum.add(sSums[other][place]);
  }
  if (!exists) return;
  // A row that saw nothing has total 0: its z and rho are 0, its lse is -inf.
  const float inverse = !kStates ? 1.0f : sum.total == 0.0f ? 0.0f : 1.0f / sum.total;
  Out* gOut = static_cast<Out*>(params.z) + entry / params.heads * params.stride_z_batch +
              entry % params.heads * params.stride_z_head + flat_row % params.rows * params.stride_z_row + column;
  store_pair(gOut, sum.value[0] * inverse, sum.value[1] * inverse);
  store_pair(gOut + 2, sum.value[2] * inverse, sum.value[3] * inverse);
  if (kStates && column == 0) {
    params.lse[flat_row] = maximum + log2f(sum.total) * kLn2;
    if (params.rho != nullptr) params.rho[flat_row] = sum.total == 0.0f ? 0.0f : 1.0f;
  }
}

}  // namespace perceiver
