// Products of 64 rows of a warpgroup with a tile of tokens, and the sums of rows that they leave in registers.
//
// A tile of kBlockKV tokens lies in shared memory as slabs of 64 columns, rows of 128 bytes swizzled; so do 64 query rows. The
// same tile is B of q k^T (K-major) and of p v (MN-major).
#pragma once

#include "kernels/warpgroups.cuh"
#include "perceiver/device/element.cuh"
#include "perceiver/device/wgmma.cuh"

namespace perceiver {

// Rows of kColumns columns. A last piece of 16 columns is the front of one more slab of a tile, or, where kNarrowTail, a slab
// of rows of 32 bytes, as it is of the queries: less shared memory for one product more.
template <int kColumns_, int kBlockKV_, bool kNarrowTail_ = false>
struct TileShape {
  static constexpr int kColumns = kColumns_, kBlockKV = kBlockKV_;
  static constexpr int kFullSlabs = kColumns / 64, kTail = kColumns % 64;
  static constexpr int kSlabs = kFullSlabs + (kTail > 0 ? 1 : 0);
  static constexpr bool kNarrowTail = kNarrowTail_ && kTail > 0;
  static_assert(kTail == 0 || kTail == 16, "a tail is one step of a product");
  static_assert(kBlockKV % 16 == 0, "weights are taken 16 tokens at a time");
  // The columns of the sums: two products where one of at most 256 columns does not do, and one of a narrow tail.
  static constexpr int kThird = kNarrowTail ? kTail : 0;
  static constexpr int kFirst = kTail > kThird ? 64 * (kFullSlabs - 1) : kFullSlabs <= 4 ? 64 * kFullSlabs : 256;
  static constexpr int kSecond = kColumns - kFirst - kThird;
  // The queries of a warpgroup: slabs of 64 rows of 128 bytes, and their tail, 64 rows of 32.
  static constexpr int kQuerySlabBytes = 64 * 128;
  static constexpr int kWarpgroupQueryBytes = kFullSlabs * kQuerySlabBytes + 64 * 2 * kTail;
  static constexpr int kQueryBytes = kConsumers * kWarpgroupQueryBytes;
  static constexpr int kSlabBytes = kBlockKV * 128;
  // What arrives of a tile, and where the next one starts: on 1,024 bytes, which the swizzle counts from.
  static constexpr int kTileBytes = kFullSlabs * kSlabBytes + (kTail > 0 ? kBlockKV * (kNarrowTail ? 32 : 128) : 0);
  static constexpr int kTilePitch = (kTileBytes + 1023) / 1024 * 1024;
  // Tensors of rows that are multiplied with a tile.
  static constexpr int kOperands = 1;
  static constexpr int kMaskWords = (kBlockKV + 31) / 32;
};

// Adds q x^T over kCount slabs, of which the first lie at `query` and `tokens`, to scores that begin there or before.
template <class Element, class Shape, int kCount>
__device__ __forceinline__ void add_scores(float (&scores)[Shape::kBlockKV / 2], uint32_t query, uint32_t tokens, bool begun) {
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
template <class Element, class Shape>
__device__ __forceinline__ void start_scores(float (&scores)[Shape::kBlockKV / 2], uint32_t query, uint32_t tokens) {
  // Addresses of every step, kept through the loop, spill where rows are widest, and of two operands: there they are sums each
  // time.
  if constexpr (Shape::kSlabs > 5 || Shape::kOperands > 1) asm volatile("" : "+r"(query));
  add_scores<Element, Shape, Shape::kFullSlabs>(scores, query, tokens, false);
  if constexpr (Shape::kTail > 0) {
    const OperandTile<16, 1024, Swizzle::k128Bytes> b(tokens);
    const OperandTile<16, 256, Swizzle::k32Bytes> a_tail(query), b_narrow(tokens);
    const uint64_t tail = a_tail.at(Shape::kFullSlabs * Shape::kQuerySlabBytes);
    constexpr int kOffset = Shape::kFullSlabs * Shape::kSlabBytes;
    Product<Element, Shape::kBlockKV>::template add<false>(scores, tail,
                                                           Shape::kNarrowTail ? b_narrow.at(kOffset) : b.at(kOffset));
  }
  commit_products();
}

// All columns of two rows of one thread.
template <class Element, class Shape>
struct RowSums {
  float sums_first[Shape::kFirst / 2];
  float sums_second[Shape::kSecond > 0 ? Shape::kSecond / 2 : 1];
  float sums_third[Shape::kThird > 0 ? Shape::kThird / 2 : 1];

  // Visits the sums of each product, and the first of their columns.
  template <class Visit>
  __device__ __forceinline__ void visit_sums(Visit&& visit) {
    visit(sums_first, 0);
    if constexpr (Shape::kSecond > 0) visit(sums_second, Shape::kFirst);
    if constexpr (Shape::kThird > 0) visit(sums_third, Shape::kFirst + Shape::kSecond);
  }

  __device__ __forceinline__ void clear_sums() {
    visit_sums([](auto& sums, int) {
#pragma unroll
      for (float& sum : sums) sum = 0.0f;
    });
  }

  // Starts sums += weights x for the tile at `tokens`.
  __device__ __forceinline__ void start_sums(const uint32_t (&weights)[Shape::kBlockKV / 16][4], uint32_t tokens) {
    const OperandTile<Shape::kSlabBytes, 1024, Swizzle::k128Bytes> b(tokens);
    const OperandTile<Shape::kSlabBytes, 256, Swizzle::k32Bytes> b_narrow(tokens);
#pragma unroll
    for (int step = 0; step < Shape::kBlockKV / 16; ++step) {
      Product<Element, Shape::kFirst>::template add<true>(sums_first, weights[step], b.at(2048 * step));
      if constexpr (Shape::kSecond > 0) {
        Product<Element, Shape::kSecond>::template add<true>(
            sums_second, weights[step], b.at(2048 * step + Shape::kFirst / 64 * Shape::kSlabBytes));
      }
      if constexpr (Shape::kThird > 0) {
        Product<Element, Shape::kThird>::template add<true>(
            sums_third, weights[step], b_narrow.at(512 * step + Shape::kFullSlabs * Shape::kSlabBytes));
      }
    }
    commit_products();
  }

  __device__ __forceinline__ void pin_sums() {
    visit_sums([](auto& sums, int) { pin(sums); });
  }

  // Writes the two rows, times `factor`, as Out, from a column on.
  template <class Out>
  __device__ __forceinline__ void store(Out* gRow, int channels, const float (&factor)[2], const bool (&exists)[2],
                                        int column = 0) {
    visit_sums([&](auto& sums, int first) { store_sums(gRow, channels, sums, factor, exists, column + first, channels); });
  }
};

// The token of the tile that score i of this thread belongs to.
__device__ __forceinline__ int token_of(int i) { return 8 * (i / 4) + 2 * (threadIdx.x % 4) + i % 2; }

template <int kCount>
__device__ __forceinline__ void hide_past(float (&scores)[kCount], int count, float hidden = -INFINITY) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (token_of(i) >= count) scores[i] = hidden;
  }
}

}  // namespace perceiver
