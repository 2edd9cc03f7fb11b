// One step of attention's backward in the registers of a warpgroup: weights, ds, and the sums of dk, dv and dq.
//
// A tile of keys lies in shared memory as slabs of 64 columns, rows of 128 bytes swizzled; so does a block of queries. The same
// tile is A of k q^T (K-major) and B of ds k (MN-major); ds lies as the keys do, with queries for columns, and is A MN-major.
#pragma once

#include "kernels/attention_enqueue.h"
#include "kernels/backward_columns.cuh"
#include "kernels/warpgroups.cuh"
#include "perceiver/device/element.cuh"
#include "perceiver/device/shared.cuh"
#include "perceiver/device/wgmma.cuh"

namespace perceiver {

template <int kColumns_>
struct BackwardShapeOf {
  static constexpr int kColumns = kColumns_, kBlockQ = attention_bwd_block_q(kColumns), kBlockKV = kAttentionBackwardBlockKV;
  static constexpr int kStages = 2;
  // Rows of 64 columns, 128 bytes; ds lies as the keys do, with queries for columns.
  static constexpr int kSlabs = kColumns / 64, kScoreSlabs = kBlockQ / 64;
  static constexpr int kKeySlabBytes = kBlockKV * 128, kKeyBytes = kSlabs * kKeySlabBytes;
  static constexpr int kQuerySlabBytes = kBlockQ * 128, kQueryBytes = kSlabs * kQuerySlabBytes;
  static constexpr int kScoreBytes = kScoreSlabs * kKeySlabBytes;
  static constexpr int kRowBytes = 2 * kBlockQ * 4;
  // A warpgroup computes 64 x 64 of a block's dq: 64 of its rows, or of its columns.
  static_assert(kBlockQ * kColumns == kConsumers * 64 * 64 && kBlockKV == kConsumers * 64);
  static constexpr int kDqSums = 32, kDqFloats = kDqSums * kWarpgroup;
  static constexpr bool kDqByRows = kBlockQ == kConsumers * 64;
  // A warpgroup's dq, and then its dv, on their way out.
  static constexpr int kOutBytes = 4 * kDqFloats, kOutSlabBytes = 64 * 128;
  static_assert(kSlabs * kOutSlabBytes <= kOutBytes);
  static constexpr int kStageBytes = kKeyBytes + 2 * kQueryBytes + kScoreBytes + kRowBytes;
  static constexpr int kBarriers = 4 * kStages + 2, kItemBytes = 64;
  static constexpr int kSharedBytes =
      1024 + kStages * kStageBytes + kKeyBytes + kConsumers * kOutBytes + kBarriers * 8 + kItemBytes;
};

// 64 keys of a tile, one row of a product each, in the registers of a warpgroup: a thread has two of them.
template <class Element, class Shape>
struct BackwardRows {
  float dk[Shape::kColumns / 2], dv[Shape::kColumns / 2];
  float scores[Shape::kBlockQ / 2], dweights[Shape::kBlockQ / 2], dq[Shape::kDqSums];
  uint32_t weights[Shape::kBlockQ / 16][4], dscores[Shape::kBlockQ / 16][4];

  // Starts sums = tokens rows^T for the 64 keys at `tokens` and the block of queries at `rows`.
  __device__ __forceinline__ static void start_scores(float (&sums)[Shape::kBlockQ / 2], uint32_t tokens, uint32_t rows) {
    const OperandTile<16, 1024, Swizzle::k128Bytes> a(tokens), b(rows);
#pragma unroll
    for (int slab = 0; slab < Shape::kSlabs; ++slab) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        Product<Element, Shape::kBlockQ>::template add<false>(sums, a.at(slab * Shape::kKeySlabBytes + 32 * step),
                                                              b.at(slab * Shape::kQuerySlabBytes + 32 * step), slab + step > 0);
      }
    }
    commit_products();
  }

  // Starts sums (+)= factors rows for the block of queries at `rows`.
  __device__ __forceinline__ static void start_sums(float (&sums)[Shape::kColumns / 2],
                                                    const uint32_t (&factors)[Shape::kBlockQ / 16][4], uint32_t rows,
                                                    bool accumulate) {
    const OperandTile<Shape::kQuerySlabBytes, 1024, Swizzle::k128Bytes> b(rows);
#pragma unroll
    for (int step = 0; step < Shape::kBlockQ / 16; ++step) {
      Product<Element, Shape::kColumns>::template add<true>(sums, factors[step], b.at(2048 * step), accumulate || step > 0);
    }
    commit_products();
  }

  // Starts dq (+)= ds k for this warpgroup's rows or columns of the block.
  __device__ __forceinline__ void start_dq(uint32_t scores_slab, uint32_t keys_slab, bool accumulate) {
    const OperandTile<16, 1024, Swizzle::k128Bytes> a(scores_slab), b(keys_slab);
#pragma unroll
    for (int step = 0; step < Shape::kBlockKV / 16; ++step) {
      Product<Element, 64>::template add<true, true>(dq, a.at(2048 * step), b.at(2048 * step), accumulate || step > 0);
    }
    commit_products();
  }

  __device__ __forceinline__ void weigh(uint32_t lse, float scale_log2) {
    weigh_columns<Element>(scores, weights, lse, scale_log2);
  }

  // The thread's first row exists where `keys_left` is more than 0, the other one where it is more than 8: others have ds 0.
  __device__ __forceinline__ void differentiate(uint32_t delta, int keys_left) {
    const uint32_t exists[2] = {keys_left > 0 ? ~0u : 0u, keys_left > 8 ? ~0u : 0u};
    differentiate_columns<Element, false>(dweights, weights, dscores, delta, 1.0f, exists);
  }

  // dq becomes this thread's share of a block's sum so far.
  __device__ __forceinline__ void load_dq(const float* gShare) {
#pragma unroll
    for (int i = 0; i < Shape::kDqSums; i += 4) {
      const float4 sum = __ldcg(reinterpret_cast<const float4*>(gShare + i * kWarpgroup));
      dq[i] = sum.x;
      dq[i + 1] = sum.y;
      dq[i + 2] = sum.z;
      dq[i + 3] = sum.w;
    }
  }

  // Writes dq where the copy engine takes it from; `place` is this thread's.
  __device__ __forceinline__ void share_dq(uint32_t place) const {
#pragma unroll
    for (int i = 0; i < Shape::kDqSums; i += 4) {
      store_shared(place + 4 * i * kWarpgroup, dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
    }
  }
};

// Writes 16 columns of a product's rows into their tile; `place` is where this lane's row of the first four matrices goes.
template <int kSlabBytes>
__device__ __forceinline__ void share(uint32_t place, int step, const uint32_t (&columns)[4]) {
  store_matrices((place ^ step % 4 * 32) + step / 4 * kSlabBytes, columns);
}

template <class Element, int kSlabBytes, int kCount>
__device__ __forceinline__ void share_sums(uint32_t place, const float (&sums)[kCount], float factor) {
#pragma unroll
  for (int step = 0; step < kCount / 8; ++step) {
    uint32_t columns[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      columns[i] = packed_pair<Element>(factor * sums[8 * step + 2 * i], factor * sums[8 * step + 2 * i + 1]);
    }
    share<kSlabBytes>(place, step, columns);
  }
}

}  // namespace perceiver
