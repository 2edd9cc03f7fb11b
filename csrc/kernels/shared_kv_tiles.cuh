// What the query-stationary kernels of shared-KV attention have in common, but for rows past 336 channels: the block's shared
// memory, and the producer that copies rows once and tiles of tokens ahead.
#pragma once

#include "kernels/shared_kv_work.cuh"
#include "kernels/tile_products.cuh"
#include "perceiver/device/barrier.cuh"
#include "perceiver/device/tma.cuh"

namespace perceiver {

// kOperands tensors of rows stay in shared memory beside kStages tiles of tokens.
template <int kColumns_, int kBlockKV_, int kStages_, int kOperands_ = 1, bool kNarrowTail_ = false>
struct SharedKVShape : TileShape<kColumns_, kBlockKV_, kNarrowTail_> {
  using Tile = TileShape<kColumns_, kBlockKV_, kNarrowTail_>;
  static constexpr int kStages = kStages_, kOperands = kOperands_, kBlockQ = 64 * kConsumers;
  static constexpr bool kConsumersShareRows = false;
  static constexpr int kSharedBytes = 1024 + kOperands * Tile::kQueryBytes + sizeof(uint64_t) +
                                      kStages * (Tile::kTilePitch + 2 * sizeof(uint64_t) + Tile::kMaskWords * sizeof(uint32_t));
};

// The block's shared memory; tiles start on 1,024 bytes, which their swizzle counts from. One address is kept, the others are
// sums.
template <class Shape>
struct SharedKVMemory {
  uint32_t query;

  __device__ explicit SharedKVMemory(unsigned char* shared) : query((shared_address(shared) + 1023) & ~1023u) {}

  // The rows of one operand that a warpgroup owns.
  __device__ __forceinline__ uint32_t rows(int operand, int warpgroup) const {
    return query + operand * Shape::kQueryBytes + warpgroup * Shape::kWarpgroupQueryBytes;
  }
  __device__ __forceinline__ uint32_t tokens(int stage) const {
    return query + Shape::kOperands * Shape::kQueryBytes + stage * Shape::kTilePitch;
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return tokens(Shape::kStages) + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t query_full() const { return full(2 * Shape::kStages); }
  // The visibility of a stage's tokens comes and goes with them.
  __device__ __forceinline__ uint32_t visible_full(int stage) const { return full(stage); }
  __device__ __forceinline__ uint32_t visible_empty(int stage) const { return empty(stage); }
  // A word of it.
  __device__ __forceinline__ uint32_t visible(int stage, int word) const {
    return full(2 * Shape::kStages + 1) + 4 * (stage * Shape::kMaskWords + word);
  }
};

// By one thread, before the block synchronizes; `producers` threads report a tile.
template <class Shape>
__device__ __forceinline__ void init_barriers(SharedKVMemory<Shape> memory, int producers) {
  for (int stage = 0; stage < Shape::kStages; ++stage) {
    init_barrier(memory.full(stage), producers);
    init_barrier(memory.empty(stage), kConsumers * kWarpgroup / 32);
  }
  init_barrier(memory.query_full(), 1);
  publish_barriers();
}

// The block's rows of one operand: slabs of 64 columns, and of the 16 that are left.
template <class Shape>
__device__ __forceinline__ void load_rows(SharedKVMemory<Shape> memory, int operand, const CUtensorMap& map,
                                          const CUtensorMap& tail, const SharedKVWork& work) {
  for (int warpgroup = 0; warpgroup < kConsumers; ++warpgroup) {
    const uint32_t rows = memory.rows(operand, warpgroup);
    for (int slab = 0; slab < Shape::kSlabs; ++slab) {
      load_tile(rows + slab * Shape::kQuerySlabBytes, slab < Shape::kFullSlabs ? map : tail, memory.query_full(), 64 * slab,
                work.row + 64 * warpgroup, 0, work.entry);
    }
  }
}

// `tail` is read where the tail of a tile is narrow.
template <class Shape>
__device__ __forceinline__ void load_tokens(SharedKVMemory<Shape> memory, const CUtensorMap& map, const CUtensorMap& tail,
                                            const SharedKVWork& work) {
  Turn<Shape::kStages> turn;
  for (int tile = 0; tile < work.tiles; ++tile, turn.next()) {
    wait(memory.empty(turn.stage), turn.parity ^ 1);
    arrive_expecting(memory.full(turn.stage), Shape::kTileBytes);
    for (int slab = 0; slab < Shape::kSlabs; ++slab) {
      load_tile(memory.tokens(turn.stage) + slab * Shape::kSlabBytes,
                Shape::kNarrowTail && slab == Shape::kFullSlabs ? tail : map, memory.full(turn.stage), 64 * slab,
                work.token_begin + tile * Shape::kBlockKV, 0, work.entry);
    }
  }
}

}  // namespace perceiver
