// Weights and ds in the registers of a warpgroup where rows are keys and columns are queries, whose lse and delta lie in shared
// memory.
#pragma once

#include "perceiver/device/element.cuh"
#include "perceiver/device/shared.cuh"

namespace perceiver {

// scores become weights, and those are rounded: exp2(scale_log2 score - lse).
template <class Element, int kCount>
__device__ __forceinline__ void weigh_columns(float (&scores)[kCount], uint32_t (&weights)[kCount / 8][4], uint32_t lse,
                                              float scale_log2) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float2 row = load_shared_pair(lse + 8 * i + 8 * (threadIdx.x % 4));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      scores[i + j] = exp2_approx(fmaf(scores[i + j], scale_log2, -(j % 2 == 0 ? row.x : row.y)));
    }
    weights[i / 8][i / 4 % 2 * 2] = packed_pair<Element>(scores[i], scores[i + 1]);
    weights[i / 8][i / 4 % 2 * 2 + 1] = packed_pair<Element>(scores[i + 2], scores[i + 3]);
  }
}

// dscores = weights (dweights - delta), with scale dweights where kScaled, and 0 in a row of the two that does not exist.
template <class Element, bool kScaled, int kCount>
__device__ __forceinline__ void differentiate_columns(const float (&dweights)[kCount], const uint32_t (&weights)[kCount / 8][4],
                                                      uint32_t (&dscores)[kCount / 8][4], uint32_t delta, float scale,
                                                      const uint32_t (&exists)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float2 row = load_shared_pair(delta + 8 * i + 8 * (threadIdx.x % 4));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = i / 4 % 2 * 2 + half, j = i + 2 * half;
      const float2 weight = unpacked_pair<Element>(weights[i / 8][at]);
      const float first = kScaled ? fmaf(scale, dweights[j], -row.x) : dweights[j] - row.x;
      const float second = kScaled ? fmaf(scale, dweights[j + 1], -row.y) : dweights[j + 1] - row.y;
      dscores[i / 8][at] = packed_pair<Element>(weight.x * first, weight.y * second) & exists[half];
    }
  }
}

}  // namespace perceiver
