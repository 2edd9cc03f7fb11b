// One tile of attention's forward in the registers of a warpgroup: scores, weights, sums of rows, and their softmax state.
#pragma once

#include "kernels/tile_products.cuh"
#include "perceiver/device/shared.cuh"

namespace perceiver {

// A row's maximum is raised only when scores outgrow it by 2^8: weights stay below 2^8, and the division at the end is exact.
constexpr float kRescaleAbove = 8.0f;

// Two rows of one thread: scores and weights of a tile, and the softmax state. Maxima are in powers of two.
template <class Element, class Shape>
struct ForwardRows : RowSums<Element, Shape> {
  float scores[Shape::kBlockKV / 2];
  uint32_t weights[Shape::kBlockKV / 16][4];
  float maximum[2], total[2], factor[2];
  bool rescaled;

  __device__ __forceinline__ void clear() {
    this->clear_sums();
    maximum[0] = maximum[1] = -INFINITY;
    total[0] = total[1] = 0.0f;
  }

  // Bit j of the words at `visible` says whether token j of the tile is.
  __device__ __forceinline__ void hide_masked(uint32_t visible) {
#pragma unroll
    for (int word = 0; word < Shape::kMaskWords; ++word) {
      const uint32_t bits = load_shared(visible + 4 * word) >> 2 * (threadIdx.x % 4);
#pragma unroll
      for (int i = 16 * word; i < min(16 * word + 16, Shape::kBlockKV / 2); ++i) {
        if (!(bits >> (8 * (i / 4 % 4) + i % 2) & 1)) scores[i] = -INFINITY;
      }
    }
  }

  // Maxima of rows become `raised`, which are no less; `factor` brings older sums to them. Where no row of the warp needs it,
  // nothing is done.
  __device__ __forceinline__ void raise(bool needed, const float (&raised)[2]) {
    rescaled = __any_sync(0xffffffffu, needed);
    if (!rescaled) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // A row that has seen nothing yet is at -inf, and so is its new maximum where the tile is hidden from it.
      factor[half] = maximum[half] == -INFINITY ? 0.0f : exp2_approx(maximum[half] - raised[half]);
      maximum[half] = raised[half];
      total[half] *= factor[half];
    }
  }

  __device__ __forceinline__ void raise_to_scores(float scale_log2) {
    float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < Shape::kBlockKV / 2; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], scores[i]);
    bool outgrown = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffffu, largest[half], 1));
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffffu, largest[half], 2)) * scale_log2;
      outgrown |= largest[half] > maximum[half] + kRescaleAbove;
      largest[half] = fmaxf(maximum[half], largest[half]);
    }
    raise(outgrown, largest);
  }

  // scores become weights relative to the maxima.
  __device__ __forceinline__ void weigh_scores(float scale_log2) {
    float safe[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) safe[half] = maximum[half] == -INFINITY ? 0.0f : maximum[half];
#pragma unroll
    for (int i = 0; i < Shape::kBlockKV / 2; ++i) {
      const int half = i / 2 % 2;
      scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -safe[half]));
      total[half] += scores[i];
    }
  }

  __device__ __forceinline__ void softmax(float scale_log2) {
    raise_to_scores(scale_log2);
    weigh_scores(scale_log2);
  }

  __device__ __forceinline__ void rescale_sums() {
    if (!rescaled) return;
#pragma unroll
    for (int i = 0; i < Shape::kFirst / 2; ++i) this->sums_first[i] *= factor[i / 2 % 2];
    if constexpr (Shape::kSecond > 0) {
#pragma unroll
      for (int i = 0; i < Shape::kSecond / 2; ++i) this->sums_second[i] *= factor[i / 2 % 2];
    }
  }

  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int i = 0; i < Shape::kBlockKV / 4; ++i) {
      weights[i / 4][i % 4] = packed_pair<Element>(scores[2 * i], scores[2 * i + 1]);
    }
  }
};

// The totals of the two rows over the four threads that share them, and what their sums are multiplied with: a row that saw
// nothing has total 0, so its result is 0 and its lse -inf.
template <class Rows>
__device__ __forceinline__ void finish_totals(Rows& rows, float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& total = rows.total[half];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    inverse[half] = total == 0.0f ? 0.0f : reciprocal_approx(total);
    lse[half] = (rows.maximum[half] + log2_approx(total)) * kLn2;
  }
}

}  // namespace perceiver
