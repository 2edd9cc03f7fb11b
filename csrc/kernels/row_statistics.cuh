// What the gradients of shared-KV attention start from: lse and delta of a query row.
#pragma once

#include "perceiver/device/element.cuh"
#include "perceiver/params.h"

namespace perceiver {

// lse in powers of two. A row that saw nothing, and one that does not exist, has lse +inf: its weights are 0.
struct RowStatistics {
  float lse = INFINITY, delta = 0.0f;

  __device__ __forceinline__ RowStatistics(const SharedKVBackwardParams& params, int entry, int row) {
    if (row >= params.rows) return;
    const int64_t flat_row = int64_t{entry} * params.rows + row;
    const float natural = params.lse[flat_row];
    if (natural != -INFINITY) lse = natural * kLog2E;
    delta = params.delta[flat_row];
  }
};

}  // namespace perceiver
