// One tile of attention's forward in the registers of a warpgroup: scores, weights, sums of rows, and their softmax state.
//
// A tile of kBlockKV tokens lies in shared memory as slabs of 64 columns, rows of 128 bytes swizzled; so do 64 query rows. The
// same tile is B of q k^T (K-major) and of p v (MN-major).
#pragma once

#include "kernels/warpgroups.cuh"
#include "perceiver/device/element.cuh"
#include "perceiver/device/shared.cuh"
#include "perceiver/device/wgmma.cuh"

namespace perceiver {

// A row's maximum is raised only when scores outgrow it by 2^8: weights stay below 2^8, and the division at the end is exact.
constexpr float kRescaleAbove = 8.0f;

// Rows of kColumns columns; a last piece of 16 columns is the front of one more slab.
template <int kColumns_, int kBlockKV_>
struct TileShape {
  static constexpr int kColumns = kColumns_, kBlockKV = kBlockKV_;
  static constexpr int kFullSlabs = kColumns / 64, kTail = kColumns % 64;
  static constexpr int kSlabs = kFullSlabs + (kTail > 0 ? 1 : 0);
  static_assert(kTail == 0 || kTail == 16, "a tail is one step of a product");
  static_assert(kBlockKV % 16 == 0 && kBlockKV <= 128, "weights are taken 16 tokens at a time, masks 32 in four words");
  // The columns of the sums: two products where one of at most 256 columns does not do.
  static constexpr int kFirst = kTail > 0 ? 64 * (kFullSlabs - 1) : kColumns, kSecond = kColumns - kFirst;
  // The queries of a warpgroup: slabs of 64 rows of 128 bytes, and their tail, 64 rows of 32.
  static constexpr int kQuerySlabBytes = 64 * 128;
  static constexpr int kWarpgroupQueryBytes = kFullSlabs * kQuerySlabBytes + 64 * 2 * kTail;
  static constexpr int kQueryBytes = kConsumers * kWarpgroupQueryBytes;
  static constexpr int kSlabBytes = kBlockKV * 128;
  static constexpr int kTileBytes = kSlabs * kSlabBytes;
  static constexpr int kMaskWords = (kBlockKV + 31) / 32;
};

// Two rows of one thread: scores and weights of a tile, and the softmax state. Maxima are in powers of two.
template <class Element, class Shape>
struct ForwardRows {
  float sums_first[Shape::kFirst / 2];
  float sums_second[Shape::kSecond > 0 ? Shape::kSecond / 2 : 1];
  float scores[Shape::kBlockKV / 2];
  uint32_t weights[Shape::kBlockKV / 16][4];
  float maximum[2], total[2], factor[2];
  bool rescaled;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& sum : sums_first) sum = 0.0f;
#pragma unroll
    for (float& sum : sums_second) sum = 0.0f;
    maximum[0] = maximum[1] = -INFINITY;
    total[0] = total[1] = 0.0f;
  }

  // Adds q x^T over kCount slabs, of which the first lie at `query` and `tokens`, to scores that begin there or before.
  template <int kCount>
  __device__ __forceinline__ void add_scores(uint32_t query, uint32_t tokens, bool begun) {
    const OperandTile<16, 1024, Swizzle::k128Bytes> a(query), b(tokens);
#pragma unroll
    for (int slab = 0; slab < kCount; ++slab) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        Product<Element, Shape::kBlockKV>::template add<false>(scores, a.at(slab * Shape::kQuerySlabBytes + 32 * step),
                                                               b.at(slab * Shape::kSlabBytes + 32 * step),
                                                               begun || slab + step > 0);
      }
    }
  }

  // Starts scores = q x^T for the tile at `tokens`.
  __device__ __forceinline__ void start_scores(uint32_t query, uint32_t tokens) {
    // Addresses of every step, kept through the loop, spill where rows are widest: there they are sums each time.
    if constexpr (Shape::kSlabs > 5) asm volatile("" : "+r"(query));
    add_scores<Shape::kFullSlabs>(query, tokens, false);
    if constexpr (Shape::kTail > 0) {
      const OperandTile<16, 1024, Swizzle::k128Bytes> b(tokens);
      const OperandTile<16, 256, Swizzle::k32Bytes> a_tail(query);
      Product<Element, Shape::kBlockKV>::template add<false>(scores, a_tail.at(Shape::kFullSlabs * Shape::kQuerySlabBytes),
                                                             b.at(Shape::kFullSlabs * Shape::kSlabBytes));
    }
    commit_products();
  }

  // Starts sums += weights x for the tile at `tokens`.
  __device__ __forceinline__ void start_sums(uint32_t tokens) {
    const OperandTile<Shape::kSlabBytes, 1024, Swizzle::k128Bytes> b(tokens);
#pragma unroll
    for (int step = 0; step < Shape::kBlockKV / 16; ++step) {
      Product<Element, Shape::kFirst>::template add<true>(sums_first, weights[step], b.at(2048 * step));
      if constexpr (Shape::kSecond > 0) {
        Product<Element, Shape::kSecond>::template add<true>(
            sums_second, weights[step], b.at(2048 * step + Shape::kFirst / 64 * Shape::kSlabBytes));
      }
    }
    commit_products();
  }

  __device__ __forceinline__ void pin_sums() {
    pin(sums_first);
    if constexpr (Shape::kSecond > 0) pin(sums_second);
  }

  // The token of the tile that score i belongs to.
  __device__ __forceinline__ static int token_of(int i) { return 8 * (i / 4) + 2 * (threadIdx.x % 4) + i % 2; }

  __device__ __forceinline__ void hide_past(int count) {
#pragma unroll
    for (int i = 0; i < Shape::kBlockKV / 2; ++i) {
      if (token_of(i) >= count) scores[i] = -INFINITY;
    }
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
    for (int i = 0; i < Shape::kFirst / 2; ++i) sums_first[i] *= factor[i / 2 % 2];
    if constexpr (Shape::kSecond > 0) {
#pragma unroll
      for (int i = 0; i < Shape::kSecond / 2; ++i) sums_second[i] *= factor[i / 2 % 2];
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
    inverse[half] = total == 0.0f ? 0.0f : 1.0f / total;
    lse[half] = (rows.maximum[half] + log2f(total)) * kLn2;
  }
}

}  // namespace perceiver
